"""Time launches beside each other by the library's protocol; each stays open from the first block to the last.

`measure_device_time` opens all anew in each block, for which a suite of many cells has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.engines import Launch
from optin_deploy.measuring.device_clock import Timer, stretch_runs
from optin_deploy.measuring.device_time import DeviceClock
from optin_deploy.measuring.stats import bootstrap_ci, percentile
from optin_deploy.measuring.timing import Blocks, log_ratios, mean_ratio, measure_together
from optin_deploy.runtimes.base import Closing, Feeds

FIRST_RUNS = 4
"""Launches of each variant before anything counts; the first may compile for minutes."""


def back_to_back(
    launches: Mapping[str, Launch], timer: Timer, *, timed_s: float, blocks: int, seed: int = 0
) -> Mapping[str, Blocks]:
    """Milliseconds a launch in stretches of them, by name.

    Args: timed_s: seconds that are timed, over all blocks and variants (about; a few rounds always run).
    """
    first = [timer.call_ms(launch) for _ in range(FIRST_RUNS) for launch in launches.values()]
    runs = stretch_runs(min(first))

    def stretch_ms(launch: Launch) -> float:
        return timer.stretch_ms(launch, runs) * runs

    taken = _measured(launches, stretch_ms, timed_s=timed_s, blocks=blocks, seed=seed)
    return {name: tuple(tuple(ms / runs for ms in block) for block in found) for name, found in taken.items()}


def single_calls(
    launches: Mapping[str, Launch], timer: Timer, *, timed_s: float, blocks: int, seed: int = 0
) -> Mapping[str, Blocks]:
    """Milliseconds from one launch until its work is done; arguments as of `back_to_back`."""
    return _measured(launches, timer.call_ms, timed_s=timed_s, blocks=blocks, seed=seed)


def times(ms: Blocks, prefix: str = "") -> dict[str, Any]:
    """Median and 95th percentile, and medians and numbers of rounds of the blocks; names begin with `prefix`."""
    every = np.concatenate(ms)
    found = {
        "p50_ms": percentile(every, 50),
        "p95_ms": percentile(every, 95),
        "block_ms": [percentile(block, 50) for block in ms],
        "rounds_a_block": [*map(len, ms)],
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def speedup(dense: Blocks, pruned: Blocks, prefix: str = "", *, seed: int = 0) -> dict[str, Any]:
    """How many times faster, with its 95% interval, as of `PairTiming`; names begin with `prefix`."""
    interval = bootstrap_ci(log_ratios(dense, pruned), seed=seed)
    return {f"{prefix}speedup": mean_ratio(dense, pruned), f"{prefix}ci95": interval}


def _measured(
    launches: Mapping[str, Launch], ms_of: Callable[[Launch], float], *, timed_s: float, blocks: int, seed: int
) -> Mapping[str, Blocks]:
    clock = DeviceClock()
    return measure_together(
        {name: _Timed(partial(ms_of, launch), clock).__enter__ for name, launch in launches.items()},
        {},
        blocks=blocks,
        block_seconds=timed_s / blocks * 2 / len(launches),
        seed=seed,
        clock=clock,
        watch=dict,  # the worker tells the state of the GPU once a cell
    ).ms


class _Timed(Closing):
    """A runtime for `measure_together` whose run takes what a timer says."""

    engine = "suite"

    def __init__(self, ms_of: Callable[[], float], clock: DeviceClock) -> None:
        self._ms_of, self._clock = ms_of, clock

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        self._clock.seconds += self._ms_of() / 1000
        return {}

    def synchronize(self) -> None:
        """The timer has waited."""

    def close(self) -> None:
        """It stays open for the next block."""
