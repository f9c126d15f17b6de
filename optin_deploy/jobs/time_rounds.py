"""What a budget in time asks of measurements: where plans aim, what is near enough, and the last word."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from optin_deploy.errors import MissedTime, TooUnstable
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.timing import PairTiming
from optin_deploy.planning.budget import TimeTarget

ROUNDS = 6
AIM, LEAST, MOST = 0.975, 0.95, 0.99
"""Parts of the budget: what is aimed at, and between what a plan need not be made better; nearer to the budget, the
next measurement lies above it as often as not."""


@dataclass(frozen=True)
class Round:
    """One plan that was measured."""

    allowed_ns: int
    """What the plan might take by the table."""
    predicted_ms: float
    """What it takes by the table."""
    measured_ms: float
    """Measured twice if once was within the budget: the geometric mean."""


def as_asked(target: TimeTarget, ms: float, dense_ms: float, batch: int) -> str:
    """The option with which a time could be met, rounded to the safe side."""
    amounts = {
        "--latency": f"{math.ceil(ms * 1000) / 1000:.3f}ms or more",
        "--speedup": f"{math.floor(100 * dense_ms / ms) / 100:.2f} or less",
        "--throughput": f"{math.floor(10_000 * batch / ms) / 10:.1f} or less",
    }
    return f"{target.option} {amounts[target.option]}"


def measured_ms(target: TimeTarget, timing: PairTiming, dense_ms: float) -> float:
    """What a measurement says of a target; of a speed-up, in times of the dense model of the table."""
    return dense_ms / timing.speedup if target.option == "--speedup" else timing.pruned(50)


@dataclass(frozen=True)
class TimeVerdict:
    """What the shipped model's own measurement says of the target."""

    outcome: Literal["holds", "undecided", "missed", "unstable"]
    sentence: str

    def check(self) -> None:
        """Refuse what is too slow beyond doubt.

        Raises: MissedTime. TooUnstable.
        """
        if self.outcome == "missed":
            raise MissedTime(self.sentence)
        if self.outcome == "unstable":
            raise TooUnstable(self.sentence)


def verdict_on(target: TimeTarget, measured: Measurement) -> TimeVerdict:
    """Hold the interval of the last measurement against the target, as gates do: only what it excludes is missed."""
    timing = measured.timing
    dense_ms = timing.dense(50)
    goal = target.limit_ms(dense_ms, measured.batch)
    low, high = timing.pruned_ci95_ms
    if target.option == "--speedup":
        low, high = dense_ms / timing.ci95[1], dense_ms / timing.ci95[0]
    found = measured_ms(target, timing, dense_ms)
    message = (
        f"`{target}` is {goal:.4g} ms a batch; measured at the end: {found:.4g} ms, 95% CI {low:.4g} to {high:.4g}."
    )
    again = "Everything is written; measure again on a quieter machine"
    if timing.unstable:
        return TimeVerdict("unstable", f"{message} But the dense model differs from itself: not to be judged. {again}.")
    if low > goal:
        return TimeVerdict("missed", f"{message} That is too slow. {again}, or ask for a little less.")
    if found > goal:
        return TimeVerdict("undecided", f"{message} The target lies within the interval.")
    if found < LEAST * goal:
        return TimeVerdict("holds", f"{message} No plan came nearer, by its steps or by another budget.")
    return TimeVerdict("holds", message)
