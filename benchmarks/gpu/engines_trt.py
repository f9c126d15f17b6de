"""TensorRT and TensorRT-RTX: wired to the library's own builder and runtime where those are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from benchmarks.gpu.engines import Run, Skipped, need_cuda


@contextmanager
def trt(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """A TensorRT plan, built here and run on the current stream."""
    need_cuda("trt", inputs)
    yield _open("trt", "tensorrt", model, inputs, precision)


@contextmanager
def trt_rtx(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """A TensorRT-RTX engine, built here and run on the current stream."""
    need_cuda("trt-rtx", inputs)
    yield _open("trt-rtx", "tensorrt_rtx_bindings", model, inputs, precision)


def _open(engine: str, package: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Run:
    """Build the engine of a model with the ONNX of `exporters`, and give what launches it."""
    for needed in (package, "optin_deploy.runtimes.tensorrt", "exporters.to_tensorrt"):
        _imported(engine, needed)
    raise Skipped(f"engine {engine} is not wired into the suite yet (benchmarks/gpu/engines_trt.py).")


def _imported(engine: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as err:
        raise Skipped(f"engine {engine}: {module} cannot be imported ({err}).") from err
