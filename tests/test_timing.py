"""The measuring protocol, on a fake clock that only the fake runtimes move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import pytest

from optin_deploy.bench.timing import MAX_PAIRS, MIN_PAIRS, WARMUP_RUNS, PairTiming, measure_pair, pair_count
from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds

FEEDS = {"input_ids": np.zeros((1, 4), dtype=np.int64)}


@dataclass
class Bench:
    """A clock in seconds and a diary of what was done, in order."""

    now: float = 0.0
    diary: list[tuple[str, str]] = field(default_factory=list)
    feeds: list[Feeds] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def of(self, *actions: str) -> list[tuple[str, str]]:
        return [entry for entry in self.diary if entry[0] in actions]


class FakeRuntime:
    """Takes `seconds()` a run, all of it in `synchronize`, as a GPU engine does."""

    engine = "fake"

    def __init__(self, bench: Bench, name: str, seconds: Callable[[], float]) -> None:
        self.bench, self.name, self.seconds = bench, name, seconds
        bench.now += 64.0  # opening is slow, and must not be counted
        bench.diary.append(("open", name))

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        self.bench.diary.append(("run", self.name))
        self.bench.feeds.append(feeds)
        return {}

    def synchronize(self) -> None:
        self.bench.now += self.seconds()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bench.diary.append(("close", self.name))


def measure(
    bench: Bench, dense: Callable[[], float], pruned: Callable[[], float], *, blocks: int = 12, seed: int = 0
) -> PairTiming:
    return measure_pair(
        lambda: FakeRuntime(bench, "dense", dense),
        lambda: FakeRuntime(bench, "pruned", pruned),
        FEEDS,
        blocks=blocks,
        seed=seed,
        clock=bench.clock,
    )


def test_half_the_time_is_a_speedup_of_two() -> None:
    timing = measure(Bench(), lambda: 0.25, lambda: 0.125)
    assert timing.speedup == pytest.approx(2.0, rel=1e-12)
    assert timing.ci95 == pytest.approx((2.0, 2.0), rel=1e-12)
    assert (timing.dense_p50_ms, timing.dense_p95_ms) == (250.0, 250.0)
    assert (timing.pruned_p50_ms, timing.pruned_p95_ms) == (125.0, 125.0)
    assert timing.throughput(batch=8) == (32.0, 64.0)


def test_identical_noisy_runtimes_straddle_one_in_nearly_all_trials() -> None:
    rng, trials, straddled = np.random.default_rng(0), 40, 0

    def noisy() -> float:
        return float(0.1 * np.exp(0.1 * rng.standard_normal()))

    for seed in range(trials):
        low, high = measure(Bench(), noisy, noisy, seed=seed).ci95
        straddled += low < 1 < high
        assert 0.9 < low < high < 1.1
    # A 95% interval of 12 blocks covers about 0.91; 31 or fewer of 40 would come by chance once in 100.
    assert straddled >= 32


def test_luck_that_a_block_shares_widens_the_interval() -> None:
    bench, rng = Bench(), np.random.default_rng(0)
    luck: dict[int, float] = {}

    def dense() -> float:
        block = len(bench.of("open")) // 2
        return 0.125 * luck.setdefault(block, float(np.exp(0.2 * rng.standard_normal())))

    # Each block has one ratio, repeated in all its pairs: treating pairs as replicates would shrink the interval.
    timing = measure(bench, dense, lambda: 0.125)
    low, high = timing.ci95
    standard_error = np.std(timing.log_ratios) / np.sqrt(12)
    assert np.log(high / low) == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_creation_order_alternates_and_each_block_opens_afresh() -> None:
    bench = Bench()
    measure(bench, lambda: 0.25, lambda: 0.125, blocks=3)
    opened = [name for _, name in bench.of("open")]
    assert opened == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    lives = [action for action, _ in bench.of("open", "close")]
    assert lives == ["open", "open", "close", "close"] * 3


def test_order_within_pairs_is_random_and_fixed_by_the_seed() -> None:
    def first_of_pairs(seed: int) -> list[str]:
        bench = Bench()
        measure(bench, lambda: 2**-10, lambda: 2**-10, blocks=2, seed=seed)
        runs = [name for _, name in bench.of("run")]
        block = runs[: len(runs) // 2][2 * WARMUP_RUNS :]
        pairs = list(zip(block[::2], block[1::2], strict=True))
        assert all(set(pair) == {"dense", "pruned"} for pair in pairs)
        return [first for first, _ in pairs]

    firsts = first_of_pairs(0)
    assert 0.3 < firsts.count("dense") / len(firsts) < 0.7
    assert any(a == b for a, b in pairwise(firsts)), "random, not merely alternating"
    assert firsts == first_of_pairs(0) != first_of_pairs(1)


def test_samples_stay_raw_by_block_and_leave_warm_up_out() -> None:
    bench = Bench()
    counter = iter(range(1, 1000))
    timing = measure(bench, lambda: float(next(counter)), lambda: 1.0, blocks=2)
    assert timing.dense_ms == ((4000.0, 5000.0, 6000.0), (10000.0, 11000.0, 12000.0))
    assert timing.pruned_ms == ((1000.0,) * 3,) * 2


def test_both_runtimes_get_the_same_feeds() -> None:
    bench = Bench()
    measure(bench, lambda: 1.0, lambda: 1.0, blocks=2)
    assert all(feeds is FEEDS for feeds in bench.feeds)


@pytest.mark.parametrize(
    ("pair_seconds", "pairs"),
    [(0.0, MAX_PAIRS), (1e-6, MAX_PAIRS), (0.025, MAX_PAIRS), (0.125, 12), (0.4, 3), (9.0, MIN_PAIRS)],
)
def test_pairs_fill_the_block_within_limits(pair_seconds: float, pairs: int) -> None:
    assert pair_count(pair_seconds) == pairs


@pytest.mark.parametrize(("run_seconds", "pairs"), [(2**-12, 60), (0.0625, 12), (8.0, 3)])
def test_pair_count_comes_from_the_warm_up(run_seconds: float, pairs: int) -> None:
    timing = measure(Bench(), lambda: run_seconds, lambda: run_seconds, blocks=2)
    assert [len(block) for block in timing.dense_ms] == [pairs, pairs]


@pytest.mark.parametrize("failing", ["dense", "pruned"])
@pytest.mark.parametrize("run", [1, 5])
def test_a_failing_run_propagates_after_both_are_closed(failing: str, run: int) -> None:
    bench = Bench()

    def seconds(name: str) -> Callable[[], float]:
        def take() -> float:
            if name == failing and bench.of("run").count(("run", name)) == run:
                raise RuntimeError("engine died")
            return 1.0

        return take

    with pytest.raises(RuntimeError, match="engine died"):
        measure(bench, seconds("dense"), seconds("pruned"))
    assert sorted(bench.of("close")) == [("close", "dense"), ("close", "pruned")]


def test_a_runtime_that_cannot_open_closes_the_other() -> None:
    bench = Bench()

    def broken() -> FakeRuntime:
        raise OSError("no such engine")

    with pytest.raises(OSError, match="no such engine"):
        measure_pair(lambda: FakeRuntime(bench, "dense", lambda: 1.0), broken, FEEDS, clock=bench.clock)
    assert bench.diary == [("open", "dense"), ("close", "dense")]


def test_progress_is_told_after_each_block() -> None:
    bench, seen = Bench(), list[tuple[int, int]]()

    def open_fake() -> FakeRuntime:
        return FakeRuntime(bench, "either", lambda: 1.0)

    measure_pair(
        open_fake,
        open_fake,
        FEEDS,
        blocks=3,
        clock=bench.clock,
        on_block=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("blocks", "warmup_runs"), [(0, 3), (1, 3), (12, 0)])
def test_too_few_blocks_or_warm_up_runs_are_refused(blocks: int, warmup_runs: int) -> None:
    def never() -> FakeRuntime:
        raise AssertionError("opened before the values were checked")

    with pytest.raises(BadInput):
        measure_pair(never, never, FEEDS, blocks=blocks, warmup_runs=warmup_runs)


@pytest.mark.parametrize(
    ("dense", "pruned"),
    [
        ((), ()),
        (((1.0,),), ((1.0,),)),
        (((1.0,), ()), ((1.0,), ())),
        (((1.0,), (1.0, 2.0)), ((1.0,), (1.0,))),
        (((1.0,), (0.0,)), ((1.0,), (1.0,))),
        (((1.0,), (1.0,)), ((1.0,), (float("nan"),))),
    ],
)
def test_incomplete_or_impossible_samples_are_no_timing(
    dense: tuple[tuple[float, ...], ...], pruned: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(BadInput):
        PairTiming(dense_ms=dense, pruned_ms=pruned, seed=0)


def test_speedup_weighs_blocks_alike_whatever_their_length() -> None:
    timing = PairTiming(dense_ms=((4.0,) * 9, (1.0,)), pruned_ms=((1.0,) * 9, (1.0,)), seed=0)
    assert timing.speedup == pytest.approx(2.0, rel=1e-12)
