"""Dense against pruned on the device alone: inputs lie there already, outputs stay there, no transfer is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import BadInput
from optin_deploy.measuring.device_clock import Launch, Timer, stretch_runs, timer_for
from optin_deploy.measuring.points import BLOCKS
from optin_deploy.measuring.timing import PairTiming, measure_pair
from optin_deploy.runtimes.base import DeviceRuntime, Feeds

GRAPH, NO_GRAPH = "CUDA graph", "no CUDA graph"
DeviceOpener = Callable[[bool], DeviceRuntime]
"""Gives a fresh runtime; the argument says whether it records CUDA graphs."""


@dataclass(frozen=True)
class DeviceTime:
    """What launches take at one point; a sample is the mean of a stretch of them, back to back."""

    cuda_graph: PairTiming | None
    """Each launch replays a CUDA graph; None: none could be recorded."""
    no_cuda_graph: PairTiming
    """The processor launches every kernel."""

    @property
    def ways(self) -> dict[str, PairTiming | None]:
        """Both, by the name that people read."""
        return {GRAPH: self.cuda_graph, NO_GRAPH: self.no_cuda_graph}

    def transfers_ms(self, host: PairTiming) -> dict[str, float]:
        """What the rest of an ordinary run takes: transfers in and out, and its start and end.

        Args: host: the same artifacts, timed with transfers; graphs are replayed where they can be recorded.
        Returns: milliseconds of `dense` and `pruned`, host p50 - device p50.
        """
        device = self.cuda_graph or self.no_cuda_graph
        return {"dense": host.dense(50) - device.dense(50), "pruned": host.pruned(50) - device.pruned(50)}

    def to_json(self, host: PairTiming) -> dict[str, Any]:
        """The `device_time` of a row of measurements.json."""
        graph = self.cuda_graph
        return {
            "cuda_graph": None if graph is None else _figures(graph),
            "no_cuda_graph": _figures(self.no_cuda_graph),
            "transfers_ms": self.transfers_ms(host),
        }


def _figures(timing: PairTiming) -> dict[str, Any]:
    return {"dense": {"p50_ms": timing.dense(50)}, "pruned": {"p50_ms": timing.pruned(50)}, **timing.to_json()}


def measure_device_time(
    open_dense: DeviceOpener,
    open_pruned: DeviceOpener,
    feeds: Feeds,
    *,
    blocks: int = BLOCKS,
    seed: int = 0,
    timer_of: Callable[[torch.device], Timer] = timer_for,
    stage: Stage = silent_stage,
) -> DeviceTime:
    """Dense beside pruned as by `measure_pair`, but on the clock of the device; one stage with graphs, one without.

    Args: blocks, seed: as of `measure_pair`. timer_of: gives the timer of a runtime's device.
    Returns: timings whose `load_ms` is 0, since only launches move the clock.
    """

    def timed(title: str, *, cuda_graph: bool) -> PairTiming:
        clock = DeviceClock()

        def fresh(opener: DeviceOpener) -> _Launches:
            runtime = opener(cuda_graph)
            return _Launches(runtime, clock, timer_of(runtime.device), cuda_graph=cuda_graph)

        with stage(f"on the device, {title}") as progress:
            return measure_pair(
                lambda: fresh(open_dense),
                lambda: fresh(open_pruned),
                feeds,
                blocks=blocks,
                seed=seed,
                clock=clock,
                on_block=progress,
            )

    try:
        replayed = timed(GRAPH, cuda_graph=True)
    except _NoGraph:
        replayed = None
    return DeviceTime(replayed, timed(NO_GRAPH, cuda_graph=False))


class _NoGraph(BadInput):
    """A CUDA graph was asked for and could not be recorded."""


class DeviceClock:
    """Seconds that launches have taken."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """The seconds so far."""
        return self.seconds


class _Launches:
    """A runtime for `measure_pair` whose run launches a stretch and moves the clock by one launch of it."""

    def __init__(self, runtime: DeviceRuntime, clock: DeviceClock, timer: Timer, *, cuda_graph: bool) -> None:
        self.engine = runtime.engine
        self._runtime, self._clock, self._timer, self._cuda_graph = runtime, clock, timer, cuda_graph
        # Not the default stream: there TensorRT adds synchronisation to a launch.
        on_gpu = runtime.device.type == "cuda"
        self._stream = torch.cuda.Stream(runtime.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._launch: Launch | None = None
        self._fastest_ms = math.inf

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        launch = self._launch = self._launch or self._ready(feeds)
        with torch.cuda.stream(self._stream):
            ms = self._timer.stretch_ms(launch, stretch_runs(self._fastest_ms))
        self._fastest_ms = min(self._fastest_ms, ms)
        self._clock.seconds += ms / 1000
        return {}

    def synchronize(self) -> None:
        """A stretch ends when its work is done."""

    def __enter__(self) -> Self:
        self._runtime.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._launch = None
        self._runtime.__exit__(*error)

    def _ready(self, feeds: Feeds) -> Launch:
        launch = self._runtime.launcher({name: torch.from_numpy(values) for name, values in feeds.items()})
        if self._cuda_graph and not self._runtime.replays:
            raise _NoGraph(f"no CUDA graph of {self.engine} could be recorded.")
        return launch
