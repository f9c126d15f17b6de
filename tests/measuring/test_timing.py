"""The measuring protocol, on a fake clock that only the fake runtimes move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import pytest

from optin_deploy.errors import BadInput
from optin_deploy.measuring.timing import (
    MAX_ROUNDS,
    MAX_WARMUP,
    MIN_ROUNDS,
    MIN_WARMUP,
    PairTiming,
    measure_pair,
    measure_together,
    round_count,
)
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
    assert (timing.dense(50), timing.dense(95)) == (250.0, 250.0)
    assert (timing.pruned(50), timing.pruned(95)) == (125.0, 125.0)
    assert timing.throughput(batch=8) == (32.0, 64.0)


def test_the_machine_is_watched_before_the_first_block_and_after_each() -> None:
    bench = Bench()

    def watch() -> dict[str, float]:
        return {"opened": len(bench.of("open"))}

    models = [lambda name=name: FakeRuntime(bench, name, lambda: 1.0) for name in ("dense", "pruned")]
    timing = measure_pair(*models, FEEDS, blocks=2, clock=bench.clock, watch=watch)
    assert timing.states == ({"opened": 0}, {"opened": 3}, {"opened": 6})


def test_identical_noisy_runtimes_straddle_one_in_nearly_all_trials() -> None:
    rng, trials, straddled = np.random.default_rng(0), 40, 0

    def noisy() -> float:
        return float(0.1 * np.exp(0.1 * rng.standard_normal()))

    for seed in range(trials):
        low, high = measure(Bench(), noisy, noisy, seed=seed).ci95
        straddled += low < 1 < high
        assert 0.9 < low < high < 1.1
    # 34 or fewer of 40 would come by chance once in 70.
    assert straddled >= 35


def test_luck_that_a_block_shares_widens_the_interval() -> None:
    bench, rng = Bench(), np.random.default_rng(0)
    luck: dict[int, float] = {}

    def dense() -> float:
        block = len(bench.of("open")) // 3
        return 0.125 * luck.setdefault(block, float(np.exp(0.2 * rng.standard_normal())))

    # Each block has one ratio, repeated in all its pairs: treating pairs as replicates would shrink the interval.
    timing = measure(bench, dense, lambda: 0.125)
    low, high = timing.ci95
    standard_error = np.std(timing.log_ratios) / np.sqrt(12)
    assert np.log(high / low) == pytest.approx(2 * 2.30 * standard_error, rel=0.15)  # Student's t of 11


def test_every_block_opens_afresh_and_each_session_stands_in_each_place() -> None:
    bench = Bench()
    measure_together(
        {name: (lambda name=name: FakeRuntime(bench, name, lambda: 1.0)) for name in "abc"},
        FEEDS,
        blocks=6,
        clock=bench.clock,
    )
    opened = [name for _, name in bench.of("open")]
    orders = ["".join(opened[3 * block : 3 * block + 3]) for block in range(6)]
    assert sorted(orders) == ["abc", "acb", "bac", "bca", "cab", "cba"]
    assert [a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True)] == [True] * 3
    lives = [action for action, _ in bench.of("open", "close")]
    assert lives == ["open", "open", "open", "close", "close", "close"] * 6


def test_order_within_rounds_is_random_and_fixed_by_the_seed() -> None:
    def first_of_rounds(seed: int) -> list[str]:
        bench = Bench()
        measure(bench, lambda: 2**-10, lambda: 2**-10, blocks=2, seed=seed)
        runs = [name for _, name in bench.of("run")]
        block = runs[: len(runs) // 2][3 * MIN_WARMUP :]
        rounds = list(zip(block[::3], block[1::3], block[2::3], strict=True))
        assert all(sorted(names) == ["dense", "dense", "pruned"] for names in rounds)
        return [names[0] for names in rounds]

    firsts = first_of_rounds(0)
    assert 0.5 < firsts.count("dense") / len(firsts) < 0.83
    assert any(a == b for a, b in pairwise(firsts)), "random, not merely alternating"
    assert firsts == first_of_rounds(0) != first_of_rounds(1)


def test_samples_stay_raw_by_block_and_leave_warm_up_out() -> None:
    bench = Bench()
    counter = iter(range(1, 1000))
    found = measure_together(
        {
            "counts": lambda: FakeRuntime(bench, "counts", lambda: float(next(counter))),
            "even": lambda: FakeRuntime(bench, "even", lambda: 1.0),
        },
        FEEDS,
        blocks=2,
        clock=bench.clock,
    )
    assert found.ms["counts"] == ((4000.0, 5000.0, 6000.0), (10000.0, 11000.0, 12000.0))
    assert found.ms["even"] == ((1000.0,) * 3,) * 2
    assert found.load_ms == {"counts": (64_000.0,) * 2, "even": (64_000.0,) * 2}


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        ([8.0] * 99, MIN_WARMUP),
        ([8.0, 4.0, 2.0, 1.0, 0.99, 0.5], 5),  # 0.99 is not clearly faster than 1.0
        ([2.0**-i for i in range(99)], MAX_WARMUP),
    ],
)
def test_warming_up_goes_on_while_rounds_get_clearly_faster(seconds: list[float], rounds: int) -> None:
    bench = Bench()
    times = iter(seconds)

    def slower_at_first() -> float:
        return next(times, 8.0) if len(bench.of("open")) == 1 else 8.0

    measure_together({"one": lambda: FakeRuntime(bench, "one", slower_at_first)}, FEEDS, blocks=2, clock=bench.clock)
    first_block = bench.diary[1 : bench.diary.index(("close", "one"))]
    fastest = min(seconds[:rounds])
    assert len(first_block) == rounds + round_count(2 * fastest)


def test_a_second_session_of_the_dense_model_tells_whether_the_machine_can_be_trusted() -> None:
    bench = Bench()
    sessions = [0]

    def open_dense() -> FakeRuntime:
        sessions[0] += 1
        return FakeRuntime(bench, "dense", lambda: 0.25)

    timing = measure_pair(open_dense, lambda: FakeRuntime(bench, "pruned", lambda: 0.125), FEEDS, clock=bench.clock)
    assert timing.same_ci95 == pytest.approx((1.0, 1.0))
    assert not timing.unstable
    assert sessions == [24]


@pytest.mark.parametrize(
    ("ratios", "unstable"),
    [
        ([1.05, 1.06, 1.05, 1.06], True),
        ([0.94, 0.95, 0.94, 0.95], True),
        ([1.005, 1.006, 1.005, 1.006], False),  # beyond noise, but less than 1%
        ([0.97, 1.04, 0.98, 1.03, 0.97, 1.04], False),  # noise that leaves an interval
        ([0.9, 1.2, 0.9, 1.2], True),  # noise that hides everything
    ],
)
def test_unstable_is_a_difference_beyond_noise_or_too_much_noise(ratios: list[float], unstable: bool) -> None:
    dense = tuple((ratio,) for ratio in ratios)
    even = ((1.0,),) * len(ratios)
    timing = PairTiming(dense, even, even, seed=0, load_ms={})
    assert timing.unstable is unstable


def test_both_runtimes_get_the_same_feeds() -> None:
    bench = Bench()
    measure(bench, lambda: 1.0, lambda: 1.0, blocks=2)
    assert all(feeds is FEEDS for feeds in bench.feeds)


@pytest.mark.parametrize(
    ("pair_seconds", "rounds"),
    [(0.0, MAX_ROUNDS), (1e-6, MAX_ROUNDS), (0.025, MAX_ROUNDS), (0.125, 12), (0.4, 3), (9.0, MIN_ROUNDS)],
)
def test_rounds_fill_the_block_within_limits(pair_seconds: float, rounds: int) -> None:
    assert round_count(pair_seconds) == rounds


@pytest.mark.parametrize(("run_seconds", "rounds"), [(2**-12, 60), (0.0625, 12), (8.0, 3)])
def test_round_count_comes_from_the_warm_up(run_seconds: float, rounds: int) -> None:
    timing = measure(Bench(), lambda: run_seconds, lambda: run_seconds, blocks=2)
    assert [len(block) for block in timing.dense_ms] == [rounds, rounds]


def test_shorter_blocks_have_fewer_rounds() -> None:
    bench = Bench()
    opened = {name: partial(FakeRuntime, bench, name, lambda: 0.0625) for name in "abc"}
    found = measure_together(opened, FEEDS, blocks=2, block_seconds=0.625, clock=bench.clock)
    assert [len(block) for block in found.ms["a"]] == [5, 5]  # a pair takes 0.125 s


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
    assert sorted(bench.of("close")) == [("close", "dense"), ("close", "dense"), ("close", "pruned")]


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


@pytest.mark.parametrize("blocks", [0, 1])
def test_too_few_blocks_are_refused(blocks: int) -> None:
    def never() -> FakeRuntime:
        raise AssertionError("opened before the values were checked")

    with pytest.raises(BadInput):
        measure_pair(never, never, FEEDS, blocks=blocks)


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
        PairTiming(dense_ms=dense, pruned_ms=pruned, again_ms=dense, seed=0, load_ms={})


def test_speedup_weighs_blocks_alike_whatever_their_length() -> None:
    dense, pruned = ((4.0,) * 9, (1.0,)), ((1.0,) * 9, (1.0,))
    timing = PairTiming(dense_ms=dense, pruned_ms=pruned, again_ms=dense, seed=0, load_ms={})
    assert timing.speedup == pytest.approx(2.0, rel=1e-12)
