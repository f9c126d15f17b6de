"""Open a model of the suite in an engine of the library, on inputs that lie on the device."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import MissingDependency
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.exporters.precisions import DTYPES
from optin_deploy.runtimes.base import DeviceRuntime
from optin_deploy.runtimes.device import missing_compiler
from optin_deploy.runtimes.torch import WITHOUT_GRAPHS, TorchRuntime, compiled

GRAPH = "graph"
"""Engine torch whose kernels are replayed from a CUDA graph."""
TORCH = ("torch", GRAPH, "torch-compile")
"""These take the module in memory and need torch alone: the suite runs where the product's packages are not."""
NAMES = (GRAPH, *ENGINES)
"""Engines of cells; all but `torch` replay a CUDA graph where the library records one."""

Launch = Callable[[], Tensor]
"""Start one forward as a `DeviceRuntime` does; the main output, valid until the next call."""


class Skipped(Exception):
    """This engine cannot run here; the message says why and what would help. Not a failure."""


@contextmanager
def open_engine(name: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Launch]:
    """Open an engine by its name.

    Args: model: dense or pruned, float32, in evaluation mode; stays as it is. inputs: on the model's device.
    Raises: Skipped: on entering, where the engine cannot run.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = _module if name in TORCH else _artifact
        with opened(name, model, inputs, precision, Path(folder)) as runtime:
            launch = runtime.launcher(inputs if name in TORCH else with_mask(inputs))
            if name in TORCH and name != "torch" and runtime.device.type == "cuda" and not runtime.replays:
                raise Skipped(f"engine {name}: no CUDA graph could be recorded; see worker.log.")
            yield lambda: launch()["last_hidden_state"]


def _module(name: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str, folder: Path) -> DeviceRuntime:
    on_gpu = next(iter(inputs.values())).device.type == "cuda"
    if name == GRAPH and not on_gpu:
        raise Skipped(f"engine {GRAPH} needs a CUDA device; this run is on a CPU.")
    smaller = copy.deepcopy(model).to(DTYPES[precision])
    if name == "torch-compile":
        obstacle = missing_compiler()
        if obstacle is not None:
            raise Skipped(f"engine {name}: {obstacle}")
        smaller = compiled(smaller, WITHOUT_GRAPHS if on_gpu else "default")
    return TorchRuntime(smaller, engine=name, tf32=precision == "tf32", cuda_graph=name != "torch")


def _artifact(name: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str, folder: Path) -> DeviceRuntime:
    """Export as the product does, for the one shape that is measured if the engine has profiles, and open it."""
    try:
        from optin_deploy.exporters.base import DeviceExporter, ExportSpec, Form
        from optin_deploy.exporters.profiles import Profile
        from optin_deploy.exporters.tensorrt_plan import PlanOptions
        from optin_deploy.network.read import read
        from optin_deploy.network.sealed import store

        target = exporter(name)
        obstacle = target.cannot_build() or target.obstacle(precision)
        if obstacle is not None:
            raise Skipped(f"engine {name}: {obstacle}")
        if precision not in target.precisions:
            raise Skipped(f"engine {name} has no precision {precision}; possible: {', '.join(target.precisions)}.")
        if not isinstance(target, DeviceExporter):
            raise Skipped(f"engine {name} cannot launch without transfers.")
        network, path = read(copy.deepcopy(model).cpu()), folder / "model.onnx"
        store(network, path, "of the suite")
        config: Any = model.config
        form = Form(path, network, module=model, longest=getattr(config, "max_position_embeddings", None))
        batch, *rest = next(iter(inputs.values())).shape
        profile = Profile((batch,) * 3, (rest[0] if len(rest) == 1 else 1,) * 3)  # images have no length
        options = PlanOptions(profiles=(profile,)) if target.options is PlanOptions else None
        out = folder / target.file_names(precision)[0]
        artifact = target.export(form, ExportSpec(precision, options=options), out)
        return target.open_device(artifact.path, precision=precision)
    except (ImportError, MissingDependency) as err:
        raise Skipped(f"engine {name}: {err}; bring it along.") from err


def with_mask(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exported graphs always take a mask; full sequences have one of ones."""
    ids = inputs.get("input_ids")
    masks = {} if ids is None else {"attention_mask": torch.ones_like(ids)}
    return {**masks, **inputs}
