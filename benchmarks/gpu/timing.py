"""Time several variants side by side: interleaved in random order, in blocks that are the replicates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.engines import Run
from optin_deploy.measuring.device_clock import Timer, stretch_runs
from optin_deploy.measuring.stats import bootstrap_ci, percentile, throughput

WARMUP_SHARE = 0.2
"""Share of the timed seconds in which all variants run in turn before anything counts: clocks rise, caches and
allocators settle."""
FIRST_RUNS = 4
"""Untimed runs of each variant; torch.compile's CUDA graphs are recorded in the first three."""
MIN_ROUNDS, MAX_ROUNDS = 3, 60
"""Rounds of a block: fewest whose median ignores a disturbed one; more would only sharpen a block's own median."""


@dataclass(frozen=True)
class Samples:
    """Raw times of one variant; entry [block][round] was taken in the same round as the other variants'."""

    stretch_ms: tuple[tuple[float, ...], ...]
    """(blocks, rounds): milliseconds a run, back to back."""
    call_ms: tuple[tuple[float, ...], ...]
    """(blocks, rounds): milliseconds of a single synchronised run."""
    runs: int
    """Launches of a stretch."""

    def to_json(self, batch: int) -> dict[str, Any]:
        """Median, 95th percentile and throughput of both ways, and the raw medians of the blocks."""
        stretch, call = np.concatenate(self.stretch_ms), np.concatenate(self.call_ms)
        return {
            "p50_ms": percentile(stretch, 50),
            "p95_ms": percentile(stretch, 95),
            "throughput": throughput(percentile(stretch, 50), batch=batch),
            "call_p50_ms": percentile(call, 50),
            "call_p95_ms": percentile(call, 95),
            "block_ms": _medians(self.stretch_ms),
            "call_block_ms": _medians(self.call_ms),
            "runs_a_stretch": self.runs,
            "rounds_a_block": len(self.stretch_ms[0]),
        }


def measure(runs: Mapping[str, Run], timer: Timer, *, timed_s: float, blocks: int, seed: int = 0) -> dict[str, Samples]:
    """Time all variants in rounds of random order.

    Args: timed_s: seconds that are timed, over all blocks and variants (about; MIN_ROUNDS always run).
    """
    estimate = warm_up(runs, timer, warmup_ms=WARMUP_SHARE * timed_s * 1000)
    stretch = stretch_runs(min(estimate.values()))
    round_ms = sum(estimate.values()) * (stretch + 1)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(timed_s * 1000 / blocks / round_ms)))
    rng = np.random.default_rng(seed)
    names = list(runs)
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [[] for _ in range(blocks)] for name in names}
    for block in range(blocks):
        for _ in range(rounds):
            for index in rng.permutation(len(names)):
                run = runs[names[index]]
                taken[names[index]][block].append((timer.stretch_ms(run, stretch), timer.call_ms(run)))
    return {
        name: Samples(
            tuple(tuple(pair[0] for pair in block) for block in found),
            tuple(tuple(pair[1] for pair in block) for block in found),
            stretch,
        )
        for name, found in taken.items()
    }


def warm_up(runs: Mapping[str, Run], timer: Timer, *, warmup_ms: float) -> dict[str, float]:
    """Run all variants in turn for `warmup_ms` and at least FIRST_RUNS times; shortest milliseconds of each."""
    shortest = dict.fromkeys(runs, math.inf)
    spent, turns = 0.0, 0
    while turns < FIRST_RUNS or spent < warmup_ms:
        for name, run in runs.items():
            ms = timer.call_ms(run)
            shortest[name] = min(shortest[name], ms)
            spent += ms if turns else 0.0  # the very first runs may compile for minutes
        turns += 1
    return shortest


def compare(dense: Samples, pruned: Samples, *, seed: int = 0) -> dict[str, Any]:
    """How many times faster: geometric mean over blocks of dense / pruned medians, with its 95% bootstrap interval."""
    found: dict[str, Any] = {}
    for prefix, a, b in (("", dense.stretch_ms, pruned.stretch_ms), ("call_", dense.call_ms, pruned.call_ms)):
        logs = np.log(np.array(_medians(a)) / np.array(_medians(b)))
        found[f"{prefix}speedup"] = float(np.exp(logs.mean()))
        found[f"{prefix}ci95"] = bootstrap_ci(logs, seed=seed)
    return found


def _medians(blocks: Sequence[Sequence[float]]) -> list[float]:
    return [float(np.median(block)) for block in blocks]
