"""TensorRT and TensorRT-RTX: the plan that the product builds, launched on the current stream without transfers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from benchmarks.gpu.engines import Run, Skipped, need_cuda

if TYPE_CHECKING:
    from optin_deploy.exporters.profiles import Profile


@contextmanager
def trt(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """A TensorRT plan, built here, with its CUDA graph."""
    with _opened("trt", model, inputs, precision) as run:
        yield run


@contextmanager
def trt_rtx(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """A TensorRT-RTX plan, built here, with its CUDA graph."""
    with _opened("trt-rtx", model, inputs, precision) as run:
        yield run


@contextmanager
def _opened(engine: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    need_cuda(engine, inputs)
    if find_spec("pydantic") is None:
        raise Skipped(f"engine {engine}: pydantic, which reads engine.json, is not installed; bring it along.")
    try:
        from benchmarks.gpu.engines_ort import form_of
        from optin_deploy.exporters import exporter
        from optin_deploy.exporters.base import ExportSpec
        from optin_deploy.exporters.tensorrt_plan import PlanOptions
        from optin_deploy.runtimes.tensorrt import TensorRTRuntime
    except ImportError as err:
        raise Skipped(f"engine {engine}: {err}; bring it along.") from err
    chosen = exporter(engine)
    obstacle = chosen.cannot_build()
    if obstacle is not None:
        raise Skipped(f"engine {engine}: {obstacle}")
    if precision not in chosen.precisions:
        raise Skipped(f"engine {engine} has no precision {precision}; possible: {', '.join(chosen.precisions)}.")
    with tempfile.TemporaryDirectory() as folder:
        spec = ExportSpec(precision, options=PlanOptions(profiles=(_profile(inputs),)))
        artifact = chosen.export(form_of(model, Path(folder)), spec, Path(folder) / "model.engine")
        with TensorRTRuntime(artifact.path, engine=engine) as runtime:
            launch = runtime.launcher(with_mask(inputs))
            yield lambda: launch()[artifact.outputs[0]]


def _profile(inputs: Mapping[str, Tensor]) -> Profile:
    """The one shape that is measured; images have no length."""
    from optin_deploy.exporters.profiles import Profile

    batch, *rest = next(iter(inputs.values())).shape
    tokens = rest[0] if len(rest) == 1 else 1
    return Profile((batch,) * 3, (tokens,) * 3)


def with_mask(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exported graphs always take a mask; full sequences have one of ones."""
    ids = inputs.get("input_ids")
    masks = {} if ids is None else {"attention_mask": ids.new_ones(ids.shape)}
    return {name: value.contiguous() for name, value in {**masks, **inputs}.items()}
