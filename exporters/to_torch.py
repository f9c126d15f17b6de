"""The torch engines: the artifact is the saved transformers model, or the graph as a module; eager or compiled."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.checkpoint.reloading import load
from optin_deploy.checkpoint.smaller import MANIFEST, check_weights
from optin_deploy.errors import BadInput
from optin_deploy.exporters.base import Artifact, ExporterDefaults, ExportSpec, Form
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.precisions import DTYPES
from optin_deploy.files.storage import sha256_file
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_onnx import read_file
from optin_deploy.runtimes.base import Runtime, torch_threads
from optin_deploy.runtimes.device import current_gpu, missing_compiler
from optin_deploy.runtimes.torch import TorchRuntime

MODULE = "model"
"""Folder of the transformers model in an output folder."""
SHAPES = 64
"""Input shapes that are compiled for one model class in a process."""


class TorchExporter(ExporterDefaults):
    """PyTorch, eager with fused attention, on the GPU if there is one."""

    engine = "torch"
    precisions = ("fp32", "fp16", "bf16")
    reads_onnx = False

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        is_graph = folder is not None and not (folder / MODULE).is_dir() and (folder / f"{MODULE}.onnx").is_file()
        return (f"{MODULE}.onnx", "dense.onnx") if is_graph else (MODULE, None)

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """See `Exporter.check`."""
        if pool is not None:
            raise BadInput(
                f"--pool needs a graph: use --engine onnx; the {self.engine} engine is the transformers model itself."
            )

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """Describe what the rewrite stage wrote; nothing more is needed."""
        self.check(self.options.of(spec.options), spec.pool)
        weights = form.graph if form.module is None or out.suffix == ".onnx" else check_weights(form.module)
        return Artifact(
            path=out,
            engine=self.engine,
            precision=spec.precision or self.precisions[0],
            inputs=tuple(port.name for port in form.network.inputs),
            outputs=tuple(port.name for port in form.network.outputs),
            sha256=sha256_file(weights),
            size_bytes=weights.stat().st_size,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`."""
        return asked or torch_threads()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """A pruned or dense transformers model, or the graph of an ONNX file."""
        return TorchRuntime(self._prepared(path, precision, task), engine=self.engine, threads=threads)

    def _prepared(self, path: Path, precision: str | None, task: str | None) -> Any:
        return module_of(path, task).to(current_gpu() or "cpu", DTYPES[precision or "fp32"])


def module_of(path: Path, task: str | None = None) -> nn.Module:
    """The torch module in a file or folder.

    Args: task: of a dense transformers model.
    Raises: BadInput: see `load_dense` and `read_file`.
    """
    if path.suffix == ".onnx":
        return NetworkModule(read_file(path)).eval()
    model: nn.Module = load(path) if (path / MANIFEST).is_file() else load_dense(str(path), task).model
    return model


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
