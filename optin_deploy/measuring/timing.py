"""Time models against each other, in blocks of interleaved rounds, and one of them against itself.

Two runs one after the other differ by more than pruning does: identical code looked 1.20x slower. So each
block opens all models afresh (memory layout and threads are redrawn), in another order, and times them in
rounds of random order. Samples within a block share its luck, so the block is the replicate, not the sample.

The dense model is opened twice. Its two sessions should differ by nothing: where they do, the measurement is unstable
and nothing should be decided by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.measuring.points import BLOCKS
from optin_deploy.measuring.state import State, machine_state
from optin_deploy.measuring.stats import bootstrap_ci, percentile, throughput
from optin_deploy.runtimes.base import Feeds, Runtime

BLOCK_SECONDS = 1.5
"""Timed seconds a block that a pair of models takes: 12 of them take half a minute, opening and warming up included."""
MIN_ROUNDS = 3
"""Fewest whose median ignores one disturbed round."""
MAX_ROUNDS = 60
"""More rounds only sharpen a block's own median; what is left is the spread between blocks."""
MIN_WARMUP, MAX_WARMUP = 3, 20
"""Untimed rounds; the first run also allocates memory."""
STILL_FALLING = 0.95
"""Warming up goes on while a round takes less than this share of the fastest before it."""
DRIFT, NOISE = 0.01, 0.1
"""A measurement is unstable if identical models differ by more than 1% beyond their interval, or if that interval is so
wide that they could differ by more than 10%."""

Clock = Callable[[], float]
"""Seconds from any fixed start."""
Opener = Callable[[], Runtime]
"""Gives a fresh runtime each call; it is entered and closed where it is measured."""
Blocks = tuple[tuple[float, ...], ...]
"""(blocks, rounds) latencies in milliseconds; blocks may differ in their number of rounds."""


@dataclass(frozen=True)
class LatencySamples:
    """Raw latencies of models that ran beside each other."""

    ms: Mapping[str, Blocks]
    """Milliseconds by model; entry [b][r] of all models is of the same round."""
    load_ms: Mapping[str, tuple[float, ...]]
    """Milliseconds from file to a session that is ready, by model, one a block."""
    states: tuple[State, ...] = ()
    """States of the machine before the first block, and after each block."""


@dataclass(frozen=True)
class PairTiming:
    """Raw samples of one comparison, and what follows from them."""

    dense_ms: Blocks
    pruned_ms: Blocks
    """Entry [b][p] was run beside dense_ms[b][p]."""
    again_ms: Blocks
    """Milliseconds of a second session of the dense model, which runs beside both."""
    seed: int
    """Drew the order within rounds and draws the bootstrap."""
    load_ms: Mapping[str, float]
    """Median milliseconds from file to session, of `dense` and `pruned`."""
    states: tuple[State, ...] = ()
    """See `LatencySamples`."""

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, blocks)) for blocks in (self.dense_ms, self.pruned_ms, self.again_ms)}
        first = next(iter(shapes))
        if len(shapes) > 1 or len(first) < 2 or 0 in first:
            raise BadInput(
                "A comparison needs 2 or more blocks of as many samples of each session; got "
                f"{[tuple(map(len, blocks)) for blocks in (self.dense_ms, self.pruned_ms, self.again_ms)]}."
            )
        every = (ms for blocks in (self.dense_ms, self.pruned_ms, self.again_ms) for block in blocks for ms in block)
        if not all(0 < ms < np.inf for ms in every):
            raise BadInput(
                "A latency is not a positive number of milliseconds; the clock is too coarse for this model."
            )

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """Natural log of median dense / median pruned latency, one per block."""
        return log_ratios(self.dense_ms, self.pruned_ms)

    @property
    def speedup(self) -> float:
        """Geometric mean over blocks of dense / pruned latency; 2.0 = the pruned model takes half the time."""
        return mean_ratio(self.dense_ms, self.pruned_ms)

    @property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap 95% interval (low, high) of `speedup`, the block being the replicate."""
        return bootstrap_ci(self.log_ratios, level=0.95, seed=self.seed)

    @property
    def same_ci95(self) -> tuple[float, float]:
        """The same of the dense model's two sessions, whose true ratio is 1."""
        return bootstrap_ci(log_ratios(self.dense_ms, self.again_ms), level=0.95, seed=self.seed)

    @property
    def unstable(self) -> bool:
        """Do identical models differ by more than 1% beyond noise, or is the noise above 10%?"""
        low, high = self.same_ci95
        differ = low > 1 + DRIFT or high < 1 / (1 + DRIFT)
        return differ or math.sqrt(high / low) > 1 + NOISE

    @property
    def pruned_ci95_ms(self) -> tuple[float, float]:
        """Bootstrap 95% interval of the pruned model's typical time, the geometric mean of its blocks' medians."""
        return bootstrap_ci([float(np.log(np.median(block))) for block in self.pruned_ms], level=0.95, seed=self.seed)

    def dense(self, q: float) -> float:
        """The q-th percentile over all dense samples, in milliseconds."""
        return percentile(np.concatenate(self.dense_ms), q)

    def pruned(self, q: float) -> float:
        """The q-th percentile over all pruned samples, in milliseconds."""
        return percentile(np.concatenate(self.pruned_ms), q)

    def to_json(self) -> dict[str, Any]:
        """The comparison and its raw samples, as every report has them."""
        return {
            "speedup": self.speedup,
            "ci95": list(self.ci95),
            "same_ci95": list(self.same_ci95),
            "unstable": self.unstable,
            "samples_ms": {
                "dense": self.dense_ms,
                "pruned": self.pruned_ms,
                "again": self.again_ms,
                "seed": self.seed,
            },
        }

    def throughput(self, batch: int) -> tuple[float, float]:
        """(dense, pruned) samples per second at the median latency, `batch` samples a run."""
        return throughput(self.dense(50), batch=batch), throughput(self.pruned(50), batch=batch)


def log_ratios(over: Blocks, under: Blocks) -> tuple[float, ...]:
    """Natural log of the ratio of median latencies, one per block."""
    return tuple(float(np.log(np.median(a) / np.median(b))) for a, b in zip(over, under, strict=True))


def mean_ratio(over: Blocks, under: Blocks) -> float:
    """Geometric mean over blocks of the ratio of median latencies."""
    return float(np.exp(np.mean(log_ratios(over, under))))


def round_count(pair_seconds: float, block_seconds: float = BLOCK_SECONDS) -> int:
    """Rounds that fill a block, within MIN_ROUNDS..MAX_ROUNDS, if a pair of models takes `pair_seconds`."""
    if pair_seconds * MAX_ROUNDS <= block_seconds:
        return MAX_ROUNDS
    return max(MIN_ROUNDS, int(block_seconds / pair_seconds))


def run_ms(runtime: Runtime, feeds: Feeds, clock: Clock) -> float:
    """Milliseconds from handing over the feeds until all work is done."""
    start = clock()
    runtime.run(feeds)
    runtime.synchronize()
    return (clock() - start) * 1000.0


def measure_pair(
    open_dense: Opener,
    open_pruned: Opener,
    feeds: Feeds,
    *,
    blocks: int = BLOCKS,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    watch: Callable[[], State] = machine_state,
    on_block: Callable[[int, int], object] | None = None,
) -> PairTiming:
    """Time both models on the same feeds, and the dense one against itself; see `measure_together`."""
    openers = {"dense": open_dense, "pruned": open_pruned, "again": open_dense}
    found = measure_together(openers, feeds, blocks=blocks, seed=seed, clock=clock, watch=watch, on_block=on_block)
    return PairTiming(
        dense_ms=found.ms["dense"],
        pruned_ms=found.ms["pruned"],
        again_ms=found.ms["again"],
        seed=seed,
        load_ms={name: percentile(found.load_ms[name], 50) for name in ("dense", "pruned")},
        states=found.states,
    )


def measure_together(
    openers: Mapping[str, Opener],
    feeds: Feeds,
    *,
    blocks: int = BLOCKS,
    block_seconds: float = BLOCK_SECONDS,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    watch: Callable[[], State] = machine_state,
    on_block: Callable[[int, int], object] | None = None,
) -> LatencySamples:
    """Time models on the same feeds, each beside all others.

    Args: openers: of each model, by name. blocks: replicates, 2 or more. block_seconds: what a pair of models is timed
        in each. seed: of the order within rounds. clock: gives seconds. watch: tells what the machine does.
        on_block: called after each block with (blocks done, blocks in all).
    Raises: BadInput: too few blocks. What a runtime raises goes through, all being closed first.
    """
    if blocks < 2:
        raise BadInput(f"blocks is {blocks}; use 2 or more.")
    rng = np.random.default_rng(seed)
    names = tuple(openers)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    load_ms: dict[str, list[float]] = {name: [] for name in names}
    states = [watch()]
    for block in range(blocks):
        with ExitStack() as stack:
            runtimes = {}
            for name in _opening_order(names, block):
                started = clock()
                runtimes[name] = stack.enter_context(openers[name]())
                load_ms[name].append((clock() - started) * 1000.0)
            round_seconds = warm_up(runtimes, feeds, clock)
            block_ms: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(round_count(round_seconds * 2 / len(names), block_seconds)):
                for i in rng.permutation(len(names)):
                    block_ms[names[i]].append(run_ms(runtimes[names[i]], feeds, clock))
        for name, values in block_ms.items():
            samples[name].append(tuple(values))
        states.append(watch())
        if on_block is not None:
            on_block(block + 1, blocks)
    return LatencySamples(
        {name: tuple(values) for name, values in samples.items()},
        {name: tuple(values) for name, values in load_ms.items()},
        tuple(states),
    )


def _opening_order(names: Sequence[str], block: int) -> list[str]:
    """Order in which models are opened: over two blocks each comes before and after each other one; over all, in every
    place."""
    turn = block // 2 % len(names)
    turned = [*names[turn:], *names[:turn]]
    return turned if block % 2 == 0 else turned[::-1]


def warm_up(runtimes: Mapping[str, Runtime], feeds: Feeds, clock: Clock) -> float:
    """Run all models in turn until a round is no longer clearly faster than all before; seconds of the fastest."""
    fastest = math.inf
    for done in range(MAX_WARMUP):
        took = sum(run_ms(runtime, feeds, clock) for runtime in runtimes.values())
        if done >= MIN_WARMUP - 1 and took >= STILL_FALLING * fastest:
            break
        fastest = min(fastest, took)
    return min(fastest, took) / 1000.0
