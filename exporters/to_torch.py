"""The torch engine: the artifact is the saved transformers model itself."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from exporters.base import Artifact, ExportSpec, output_names
from optin_deploy.errors import BadInput
from optin_deploy.inputs import input_names
from optin_deploy.loading import load_dense
from optin_deploy.pruned import MANIFEST, load
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.torch import TorchRuntime
from optin_deploy.storage import sha256_file


class TorchExporter:
    """PyTorch on the CPU, eager with fused attention."""

    engine = "torch"
    precisions = ("fp32",)
    file_names = ("model", None)
    portable = None

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Describe the folder that the rewrite stage wrote; nothing more is needed."""
        if spec.pool is not None:
            raise BadInput(
                "--pool needs a graph: use --engine onnx; the torch engine is the transformers model itself."
            )
        weights = out / "model.safetensors"
        return Artifact(
            path=out,
            engine=self.engine,
            precision=self.precisions[0],
            inputs=input_names(model),
            outputs=output_names(model, spec.pool),
            sha256=sha256_file(weights),
            size_bytes=weights.stat().st_size,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def open(self, path: Path, *, threads: int = 0, task: str | None = None) -> Runtime:
        """A pruned or dense transformers model."""
        pruned = any((folder / MANIFEST).is_file() for folder in (path, path / "model"))
        return TorchRuntime(load(path) if pruned else load_dense(str(path), task).model, threads=threads)
