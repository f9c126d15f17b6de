"""How time is taken on a device: stretches of launches, by CUDA events on a GPU and by the wall clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Launch = Callable[[], object]
"""Start one forward on torch's current stream."""

STRETCH_MS = 4.0
"""Back-to-back runs are repeated until a stretch lasts about so long: launches and event ticks then hardly count."""
MAX_RUNS = 50


class Timer(Protocol):
    """How time is taken on one kind of device."""

    def stretch_ms(self, run: Launch, runs: int) -> float:
        """Milliseconds of each of `runs` launches one after the other, as the device sees it."""

    def call_ms(self, run: Launch) -> float:
        """Milliseconds from one launch on an idle device until its work is done, as a caller sees it."""


class CpuTimer:
    """Wall clock; a CPU run is done when it returns."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def stretch_ms(self, run: Launch, runs: int) -> float:
        """See `Timer`."""
        start = self._clock()
        for _ in range(runs):
            run()
        return (self._clock() - start) * 1000 / runs

    def call_ms(self, run: Launch) -> float:
        """See `Timer`."""
        return self.stretch_ms(run, 1)


class CudaTimer:
    """CUDA events around a stretch, synchronised wall clock around a call; on the current stream."""

    def stretch_ms(self, run: Launch, runs: int) -> float:
        """See `Timer`."""
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / runs

    def call_ms(self, run: Launch) -> float:
        """See `Timer`."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1000


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def stretch_runs(run_ms: float) -> int:
    """Launches that fill a stretch, 1..MAX_RUNS, if one takes `run_ms`."""
    return max(1, min(MAX_RUNS, math.ceil(STRETCH_MS / run_ms)))
