"""The torch engines: the artifact is the saved transformers model, or the graph as a module; eager or compiled."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from optin_deploy.runtimes.device import NO_GPU, current_gpu, missing_compiler
from optin_deploy.runtimes.torch import WITHOUT_GRAPHS, TorchRuntime, compiled

MODULE = "model"
"""Folder of the transformers model in an output folder."""


class TorchExporter(ExporterDefaults):
    """PyTorch, eager with fused attention, on the GPU if there is one."""

    engine = "torch"
    compiles = False
    """Does torch.compile come first?"""
    precisions = ("fp32", "fp16", "bf16", "tf32")
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
        self.check(self.options.checked(spec.options), None if spec.head is None else spec.head.pooling)
        module = form.module
        weights = check_weights(module) if isinstance(module, Path) and out.suffix != ".onnx" else form.graph
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

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`; only GPUs round to TF32."""
        return NO_GPU if precision == "tf32" and current_gpu() is None else None

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """A pruned or dense transformers model, or the graph of an ONNX file."""
        mode = "default" if current_gpu() is None else "max-autotune"
        return self._runtime(path, precision, task, mode=mode, threads=threads)

    def open_device(
        self, path: Path, *, precision: str | None = None, cuda_graph: bool = True, task: str | None = None
    ) -> TorchRuntime:
        """See `DeviceExporter.open_device`."""
        return self._runtime(path, precision, task, mode=WITHOUT_GRAPHS, cuda_graph=cuda_graph)

    def _runtime(
        self, path: Path, precision: str | None, task: str | None, *, mode: str, **options: Any
    ) -> TorchRuntime:
        """Args: mode: of torch.compile, for engines that compile."""
        model = module_of(path, task).to(current_gpu() or "cpu", DTYPES[precision or "fp32"])
        return TorchRuntime(
            compiled(model, mode) if self.compiles else model, engine=self.engine, tf32=precision == "tf32", **options
        )


def module_of(source: Path | nn.Module, task: str | None = None) -> nn.Module:
    """The torch module in a file or folder, or a copy of one in memory.

    Args: task: of a dense transformers model.
    Raises: BadInput: see `load_dense` and `read_file`.
    """
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    if source.suffix == ".onnx":
        return NetworkModule(read_file(source)).eval()
    model: nn.Module = load(source) if (source / MANIFEST).is_file() else load_dense(str(source), task).model
    return model


class CompiledTorchExporter(TorchExporter):
    """`torch.compile`, tuned for each input shape; on a GPU with CUDA graphs."""

    engine = "torch-compile"
    compiles = True

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return missing_compiler() or super().obstacle(precision)
