"""The torch engines: the artifact is the saved transformers model itself, run eagerly or compiled."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.base import Artifact, ExportSpec, WithoutPlan, output_names
from exporters.graph import DTYPES
from exporters.tensorrt_plan import EngineOptions
from optin_deploy.errors import BadInput
from optin_deploy.inputs import input_names
from optin_deploy.loading import load_dense
from optin_deploy.pruned import MANIFEST, load
from optin_deploy.runtimes.base import Runtime, torch_threads
from optin_deploy.runtimes.device import current_gpu, missing_compiler
from optin_deploy.runtimes.torch import TorchRuntime
from optin_deploy.storage import sha256_file

SHAPES = 64
"""Input shapes that are compiled for one model class in a process."""


class TorchExporter(WithoutPlan):
    """PyTorch, eager with fused attention, on the GPU if there is one."""

    engine = "torch"
    precisions = ("fp32", "fp16", "bf16")
    reads_onnx = False

    def file_names(self, precision: str) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return "model", None

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """See `Exporter.check`."""
        super().check(options)
        if pool is not None:
            raise BadInput(
                f"--pool needs a graph: use --engine onnx; the {self.engine} engine is the transformers model itself."
            )

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Describe the folder that the rewrite stage wrote; nothing more is needed."""
        self.check(spec.options, spec.pool)
        weights = out / "model.safetensors"
        return Artifact(
            path=out,
            engine=self.engine,
            precision=spec.precision or self.precisions[0],
            inputs=input_names(model),
            outputs=output_names(model, spec.pool),
            sha256=sha256_file(weights),
            size_bytes=weights.stat().st_size,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`."""
        return asked or torch_threads()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """A pruned or dense transformers model."""
        return TorchRuntime(self._prepared(path, precision, task), engine=self.engine, threads=threads)

    def _prepared(self, path: Path, precision: str | None, task: str | None) -> Any:
        pruned = any((folder / MANIFEST).is_file() for folder in (path, path / "model"))
        model: nn.Module = load(path) if pruned else load_dense(str(path), task).model
        return model.to(current_gpu() or "cpu", DTYPES[precision or "fp32"])


class CompiledTorchExporter(TorchExporter):
    """`torch.compile`, tuned for each input shape; on a GPU with CUDA graphs."""

    engine = "torch-compile"

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return missing_compiler()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """Compiles at the first run of each shape, which takes seconds to minutes."""
        model = self._prepared(path, precision, task)
        mode = "default" if current_gpu() is None else "max-autotune"
        # Past the limit torch would go on without compiling, and such a time must not pass as compiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        model.forward = torch.compile(model.forward, mode=mode, dynamic=False)
        return TorchRuntime(model, engine=self.engine, threads=threads)
