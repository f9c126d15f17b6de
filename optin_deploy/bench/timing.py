"""Time a dense and a pruned model against each other, in blocks of interleaved pairs.

Two runs one after the other differ by more than pruning does: identical code looked 1.20x slower. So each
block opens both models afresh (memory layout and threads are redrawn), in alternating order, and times them in
pairs of random order. Samples within a block share its luck, so the block is the replicate, not the sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from optin_deploy.bench.stats import bootstrap_ci, percentile, throughput
from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds, Runtime

BLOCKS = 12
"""With 12 the interval held 1 in 4 of 4 trials of identical models; a single session pair, in 2 of 5."""
BLOCK_SECONDS = 1.5
"""Timed seconds a block: 12 of them take half a minute, opening and warming up included."""
MIN_PAIRS = 3
"""Fewest whose median ignores one disturbed pair."""
MAX_PAIRS = 60
"""More pairs only sharpen a block's own median; what is left is the spread between blocks."""
WARMUP_RUNS = 3
"""The first run also allocates memory; the fastest of the three tells how long a pair takes."""

Clock = Callable[[], float]
"""Seconds from any fixed start."""


@dataclass(frozen=True)
class PairTiming:
    """Raw samples of one comparison, and what follows from them."""

    dense_ms: tuple[tuple[float, ...], ...]
    """(blocks, pairs) latencies in milliseconds; blocks may differ in their number of pairs."""
    pruned_ms: tuple[tuple[float, ...], ...]
    """The same of the pruned model; entry [b][p] was run beside dense_ms[b][p]."""
    seed: int
    """Drew the order within pairs and draws the bootstrap."""

    def __post_init__(self) -> None:
        pairs = tuple(map(len, self.dense_ms))
        if pairs != tuple(map(len, self.pruned_ms)) or len(pairs) < 2 or 0 in pairs:
            raise BadInput(
                f"A comparison needs 2 or more blocks of as many dense as pruned samples; got {pairs} dense "
                f"and {tuple(map(len, self.pruned_ms))} pruned."
            )
        if not all(0 < ms < np.inf for blocks in (self.dense_ms, self.pruned_ms) for block in blocks for ms in block):
            raise BadInput(
                "A latency is not a positive number of milliseconds; the clock is too coarse for this model."
            )

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """Natural log of median dense / median pruned latency, one per block."""
        return tuple(
            float(np.log(np.median(dense) / np.median(pruned)))
            for dense, pruned in zip(self.dense_ms, self.pruned_ms, strict=True)
        )

    @property
    def speedup(self) -> float:
        """Geometric mean over blocks of dense / pruned latency; 2.0 = the pruned model takes half the time."""
        return float(np.exp(np.mean(self.log_ratios)))

    @property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap 95% interval (low, high) of `speedup`, the block being the replicate."""
        return bootstrap_ci(self.log_ratios, level=0.95, seed=self.seed)

    @property
    def dense_p50_ms(self) -> float:
        """Median over all dense samples."""
        return percentile(np.concatenate(self.dense_ms), 50)

    @property
    def dense_p95_ms(self) -> float:
        """95th percentile over all dense samples."""
        return percentile(np.concatenate(self.dense_ms), 95)

    @property
    def pruned_p50_ms(self) -> float:
        """Median over all pruned samples."""
        return percentile(np.concatenate(self.pruned_ms), 50)

    @property
    def pruned_p95_ms(self) -> float:
        """95th percentile over all pruned samples."""
        return percentile(np.concatenate(self.pruned_ms), 95)

    def throughput(self, batch: int) -> tuple[float, float]:
        """(dense, pruned) samples per second at the median latency, `batch` samples a run."""
        return throughput(self.dense_p50_ms, batch=batch), throughput(self.pruned_p50_ms, batch=batch)


def pair_count(pair_seconds: float) -> int:
    """Pairs that fill a block, within MIN_PAIRS..MAX_PAIRS, if one takes `pair_seconds`."""
    if pair_seconds * MAX_PAIRS <= BLOCK_SECONDS:
        return MAX_PAIRS
    return max(MIN_PAIRS, int(BLOCK_SECONDS / pair_seconds))


def run_ms(runtime: Runtime, feeds: Feeds, clock: Clock) -> float:
    """Milliseconds from handing over the feeds until all work is done."""
    start = clock()
    runtime.run(feeds)
    runtime.synchronize()
    return (clock() - start) * 1000.0


def measure_pair(
    open_dense: Callable[[], Runtime],
    open_pruned: Callable[[], Runtime],
    feeds: Feeds,
    *,
    blocks: int = BLOCKS,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    warmup_runs: int = WARMUP_RUNS,
    on_block: Callable[[int, int], object] | None = None,
) -> PairTiming:
    """Time both models on the same feeds.

    Args: open_dense, open_pruned: give a fresh runtime each call; it is entered and closed here.
        blocks: replicates, 2 or more. seed: of the order within pairs. clock: gives seconds.
        warmup_runs: untimed runs of each model a block, 1 or more; they also tell how many pairs fit.
        on_block: called after each block with (blocks done, blocks in all).
    Raises: BadInput: too few blocks or warm-up runs. What a runtime raises goes through, both being closed first.
    """
    if blocks < 2 or warmup_runs < 1:
        raise BadInput(f"blocks is {blocks} and warmup_runs {warmup_runs}; use 2 or more, and 1 or more.")
    rng = np.random.default_rng(seed)
    openers = {"dense": open_dense, "pruned": open_pruned}
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in openers}
    for block in range(blocks):
        order = ("dense", "pruned") if block % 2 == 0 else ("pruned", "dense")
        with ExitStack() as stack:
            runtimes = {name: stack.enter_context(openers[name]()) for name in order}
            warm = [sum(run_ms(runtimes[name], feeds, clock) for name in order) for _ in range(warmup_runs)]
            block_ms: dict[str, list[float]] = {name: [] for name in openers}
            for _ in range(pair_count(min(warm) / 1000.0)):
                for name in order if rng.random() < 0.5 else reversed(order):
                    block_ms[name].append(run_ms(runtimes[name], feeds, clock))
        for name, values in block_ms.items():
            samples[name].append(tuple(values))
        if on_block is not None:
            on_block(block + 1, blocks)
    return PairTiming(dense_ms=tuple(samples["dense"]), pruned_ms=tuple(samples["pruned"]), seed=seed)
