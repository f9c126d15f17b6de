"""Judge a candidate's latency beside its baseline's: within a limit, beyond it, or not to be told.

The limit is on the ratio candidate / baseline, and the judge is the 95% interval of that ratio, never the point
estimate: a gate fails only where the whole interval misses the limit. A measurement in which the baseline differs from
itself is not judged at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optin_deploy.errors import BadInput, GateFailed, TooUnstable
from optin_deploy.measuring.measurement import latency_figures
from optin_deploy.measuring.points import point_name
from optin_deploy.measuring.timing import PairTiming

SCHEMA_VERSION = 1
Outcome = Literal["holds", "straddles", "unstable", "fails"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "straddles", "unstable", "fails")
"""Outcomes from best to worst; the worst of all points is the gate's outcome."""
HEADER = ("batch x length", "baseline p50/p95 ms", "candidate p50/p95 ms", "candidate / baseline [95% CI]", "limit", "")


@dataclass(frozen=True)
class LatencyLimit:
    """How slow a candidate may be, in the words in which it was asked."""

    kind: Literal["max_ratio", "min_speedup"]
    value: float
    """Largest candidate / baseline time, or smallest baseline / candidate time."""

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise BadInput(f"--{self.kind.replace('_', '-')} {self.value:g}: give a positive number, such as 1.05.")

    @property
    def max_ratio(self) -> float:
        """Most that candidate / baseline time may be."""
        return self.value if self.kind == "max_ratio" else 1 / self.value

    def described(self, ratio: float, ci95: tuple[float, float]) -> str:
        """A ratio with its interval and the limit, in the words of the limit."""
        low, high = ci95
        if self.kind == "max_ratio":
            return f"candidate / baseline time is {ratio:.3f}, 95% CI {low:.3f} to {high:.3f}; limit {self.value:g}"
        return f"the speed-up is {1 / ratio:.3f}, 95% CI {1 / high:.3f} to {1 / low:.3f}; asked {self.value:g}"


def limit_of(max_ratio: float | None, min_speedup: float | None) -> LatencyLimit:
    """The limit of the two options, of which one must be given.

    Raises: BadInput: none, both, or not a positive number.
    """
    if max_ratio is not None and min_speedup is None:
        return LatencyLimit("max_ratio", max_ratio)
    if min_speedup is not None and max_ratio is None:
        return LatencyLimit("min_speedup", min_speedup)
    given = "neither" if max_ratio is None else "both"
    raise BadInput(f"{given} of --max-ratio and --min-speedup given: give one, e.g. --max-ratio 1.05 (5% slower).")


@dataclass(frozen=True)
class Verdict:
    """What an interval says about a limit."""

    outcome: Outcome
    ratio: float
    """Candidate / baseline time; 0.5 = the candidate takes half the time."""
    ci95: tuple[float, float]
    sentence: str
    """The numbers, the limit, and the next step."""


def verdict_of(timing: PairTiming, limit: LatencyLimit) -> Verdict:
    """Hold the 95% interval of candidate / baseline time against a limit.

    Args: timing: of the baseline (as `dense`) and the candidate (as `pruned`).
    """
    slowest, fastest = timing.ci95  # of baseline / candidate
    ratio, ci95 = 1 / timing.speedup, (1 / fastest, 1 / slowest)
    measured = limit.described(ratio, ci95)
    if timing.unstable:
        low, high = timing.same_ci95
        said = (
            f"is not judged: two sessions of the baseline itself differ by a factor of {low:.3f} to {high:.3f}. End "
            f"other work on this machine, or give fewer --threads, and measure again. (Measured: {measured}.)"
        )
        return Verdict("unstable", ratio, ci95, said)
    if ci95[0] > limit.max_ratio:
        said = (
            f"fails: {measured}. The whole interval misses the limit. Find what made the candidate slower; if that is "
            "meant, allow more, or pin it as the new baseline."
        )
        return Verdict("fails", ratio, ci95, said)
    if ci95[1] <= limit.max_ratio:
        return Verdict("holds", ratio, ci95, f"holds: {measured}.")
    said = (
        f"is undecided: {measured}. The limit lies within the interval. Measure again, on a quieter machine if you can."
    )
    return Verdict("straddles", ratio, ci95, said)


@dataclass(frozen=True)
class GatedPoint:
    """Baseline against candidate at one point, with the raw samples."""

    batch: int
    seq_len: int | None
    """Tokens a sample; None: the inputs have no open length."""
    timing: PairTiming
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """The verdict's, with the point."""
        return f"{point_name(self.batch, self.seq_len)} {self.verdict.sentence}"

    def row(self, limit: LatencyLimit) -> tuple[str, ...]:
        """Cells below HEADER."""
        t, (low, high) = self.timing, self.verdict.ci95
        return (
            point_name(self.batch, self.seq_len),
            f"{t.dense(50):.2f} / {t.dense(95):.2f}",
            f"{t.pruned(50):.2f} / {t.pruned(95):.2f}",
            f"{self.verdict.ratio:.3f} [{low:.3f}, {high:.3f}]",
            f"{limit.max_ratio:.3f}",
            self.verdict.outcome,
        )

    def to_json(self) -> dict[str, Any]:
        """A row of `points`."""
        t = self.timing
        throughput = t.throughput(self.batch)
        return {
            "batch": self.batch,
            "seq_len": self.seq_len,
            "baseline": latency_figures(t.dense, throughput[0], t.load_ms["dense"]),
            "candidate": latency_figures(t.pruned, throughput[1], t.load_ms["pruned"]),
            "ratio": self.verdict.ratio,
            "ci95": list(self.verdict.ci95),
            "same_ci95": list(t.same_ci95),
            "verdict": self.verdict.outcome,
            "samples_ms": {"baseline": t.dense_ms, "candidate": t.pruned_ms, "again": t.again_ms, "seed": t.seed},
            "machine": [*t.states],
        }


@dataclass(frozen=True)
class Gate:
    """All points of one comparison, and what decides."""

    limit: LatencyLimit
    points: Sequence[GatedPoint]
    settings: Mapping[str, Any]
    """Engine, precision, threads."""
    artifacts: Mapping[str, Mapping[str, Any]]
    """File, sha256 and size_bytes of `baseline` and `candidate`."""
    environment: Mapping[str, Any]

    @property
    def outcome(self) -> Outcome:
        """The worst of all points."""
        return max((point.verdict.outcome for point in self.points), key=OUTCOMES.index)

    @property
    def sentence(self) -> str:
        """Sentences about the points that decide, a line each."""
        return "\n".join(point.sentence for point in self.points if point.verdict.outcome == self.outcome)

    def rows(self) -> list[tuple[str, ...]]:
        """Rows below HEADER."""
        return [point.row(self.limit) for point in self.points]

    def check(self, *, strict: bool = False) -> None:
        """Refuse what is too slow.

        Args: strict: does an undecided point fail?
        Raises: GateFailed. TooUnstable: not to be judged.
        """
        if self.outcome == "unstable":
            raise TooUnstable(self.sentence)
        if self.outcome == "fails" or (strict and self.outcome == "straddles"):
            raise GateFailed(self.sentence)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.outcome,
            "limit": {self.limit.kind: self.limit.value},
            **self.settings,
            "artifacts": {name: dict(about) for name, about in self.artifacts.items()},
            "points": [point.to_json() for point in self.points],
            "environment": dict(self.environment),
        }
