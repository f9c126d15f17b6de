"""Engines: (model, inputs on the device, precision) -> a context manager that gives run(), a launch of the work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu.precision import cast, cast_inputs

Run = Callable[[], Tensor]
"""Start one forward on the current stream (or wait until it is done elsewhere: events of the current stream time it);
the main output, valid until the next call."""
Opener = Callable[[nn.Module, Mapping[str, Tensor], str], AbstractContextManager[Run]]

ENGINES = {
    "eager": "benchmarks.gpu.engines:eager",
    "graph": "benchmarks.gpu.engines:graph",
    "compile": "benchmarks.gpu.engines:compiled",
    "aoti": "benchmarks.gpu.engines:aoti",
    "ort-cuda": "benchmarks.gpu.engines_ort:ort_cuda",
    "ort-trt": "benchmarks.gpu.engines_ort:ort_trt",
    "trt": "benchmarks.gpu.engines_trt:trt",
    "trt-rtx": "benchmarks.gpu.engines_trt:trt_rtx",
}
"""Name -> module:function, imported when asked for."""


class Skipped(Exception):
    """This engine cannot run here; the message says why and what would help. Not a failure."""


def open_engine(
    name: str, model: nn.Module, inputs: Mapping[str, Tensor], precision: str
) -> AbstractContextManager[Run]:
    """Open an engine by its name.

    Args: model: dense or pruned, float32, in evaluation mode; stays as it is. inputs: on the model's device.
    Raises: Skipped: by the context manager on entering, where the engine cannot run.
    """
    module, _, function = ENGINES[name].partition(":")
    opener: Opener = getattr(import_module(module), function)
    return opener(model, inputs, precision)


class MainOutput(nn.Module):
    """A transformers base model whose output is one tensor, (batch, tokens, hidden)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # a fresh module is in training mode

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return `last_hidden_state`."""
        states: Tensor = self.model(**inputs).last_hidden_state
        return states


def need_cuda(engine: str, inputs: Mapping[str, Tensor]) -> torch.device:
    """The inputs' device.

    Raises: Skipped: it is not a GPU.
    """
    device = next(iter(inputs.values())).device
    if device.type != "cuda":
        raise Skipped(f"engine {engine} needs a CUDA device; this run is on {device.type}.")
    return device


@contextmanager
def eager(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """PyTorch without compilation, attention by scaled_dot_product_attention."""
    main, feeds = MainOutput(cast(model, precision)), cast_inputs(inputs, precision)

    def run() -> Tensor:
        with torch.inference_mode():
            states: Tensor = main(**feeds)
            return states

    yield run


@contextmanager
def graph(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """The eager kernels captured once in a CUDA graph with static inputs, then replayed."""
    device = need_cuda("graph", inputs)
    with eager(model, inputs, precision) as run, torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own gap
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries set themselves up in first runs, which a capture must not hold
                run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            output = run()

        def replay() -> Tensor:
            captured.replay()
            return output

        try:
            yield replay
        finally:
            torch.cuda.synchronize()
            captured.reset()


@contextmanager
def compiled(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """torch.compile, mode max-autotune (which uses CUDA graphs of its own), static shapes."""
    main, feeds = MainOutput(cast(model, precision)), cast_inputs(inputs, precision)
    # fullgraph: falling back to eager, also at the recompilation limit, must be an error and not a number.
    fast = torch.compile(main, mode="max-autotune", dynamic=False, fullgraph=True)

    def run() -> Tensor:
        # The last output may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's own gap
        with torch.inference_mode():
            states: Tensor = fast(**feeds)
            return states

    try:
        yield run
    finally:
        torch.compiler.reset()  # the variants share code objects, whose compiled versions are limited in number


@contextmanager
def aoti(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """torch.export, compiled ahead of time by Inductor into a package, loaded again from disk."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    main, feeds = MainOutput(cast(model, precision)), cast_inputs(inputs, precision)
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():
            program = torch.export.export(main, (), kwargs=dict(feeds), strict=False)
            package = aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        loaded = aoti_load_package(package)

        def run() -> Tensor:
            with torch.inference_mode():
                states: Tensor = loaded(**feeds)
                return states

        yield run
