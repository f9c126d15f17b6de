"""A budget in time: plan by the latency table, measure the plan, correct, until the measured time is within the budget.

The table says which widths are worth their time; only the measurement says whether the budget is met. A whole branch
less saves more time than its units do, and error curves, each of one branch alone, know least of that: a plan that
empties branches must keep the outputs nearer than the best plan that empties none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from exporters.bench.profiling import table_at
from exporters.bench.yardstick import Yardstick
from optin_deploy.bench.report import Measurement
from optin_deploy.bench.timing import PairTiming
from optin_deploy.budget import Limits, TimeTarget
from optin_deploy.cost.latency import NS, LatencyTable, read_table
from optin_deploy.errors import InfeasibleBudget, MissedTime, TooUnstable
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.stages import Prepared, plan_stage
from optin_deploy.sweep import measure_curves
from optin_deploy.trial import unseen_error
from optin_deploy.workspace import Workspace

LATENCY = "latency.json"
"""The latency table of an output folder."""
ROUNDS = 6
AIM, LEAST = 0.975, 0.95
"""Of the budget: what is aimed at, so that noise leads neither over it nor below what need not be made better."""


@dataclass(frozen=True)
class Round:
    """One plan that was measured."""

    allowed_ns: int
    """What the plan might take by the table."""
    predicted_ms: float
    """What it takes by the table."""
    measured_ms: float
    """Measured twice if once was within the budget: the geometric mean."""
    emptying: bool = True
    """Whether branches might be left without any unit."""


def plan_in_time(
    workspace: Workspace,
    limits: Limits,
    yard: Yardstick,
    table: Path | None = None,
    *,
    allocation: str,
    compensation: bool = True,
    stage: Stage = silent_stage,
) -> list[Round]:
    """Plan for `limits.time`, after the curves and the latency table that this needs.

    Args:
        table: file of the latency table; default: the workspace's own, measured if need be.
        compensation: whether the model of the plan will be compensated.
    Raises: BadInput: no table of this model and setting. InfeasibleBudget.
    """
    measure_curves(workspace, yard.prepared, allocation, stage)
    if table is not None:
        known = read_table(table, yard.prepared.layout, yard.setting)
    else:
        with stage("profile") as progress:
            known = table_at(workspace.root / LATENCY, yard, progress=progress)
    how: dict[str, Any] = {"allocation": allocation, "compensation": compensation, "stage": stage}
    return plan_within_time(workspace, limits, known, yard, **how)[1]


def plan_within_time(
    workspace: Workspace,
    limits: Limits,
    table: LatencyTable,
    yard: Yardstick,
    *,
    allocation: str,
    compensation: bool = True,
    stage: Stage = silent_stage,
) -> tuple[PruningPlan, list[Round]]:
    """Write the plan of a model whose measured time is within `limits.time`, near it, and within all other budgets.

    Raises: InfeasibleBudget: the time cannot be met; says what can.
    """
    target = limits.time
    assert target is not None, "there is a time to plan for"
    batch = yard.point.batch
    goal = target.limit_ms(table.dense_ms, batch)
    how: dict[str, Any] = {"align": yard.align, "allocation": allocation}
    _check(target, goal, table, batch, alone=not limits.budgets())
    choice = _Choice(yard.prepared, stage, compensation=compensation)
    rounds: list[Round] = []
    seen: set[str] = set()
    asked_ms, too_much_ns = AIM * goal, table.dense + 1
    while len(rounds) < ROUNDS:
        # Whole nanoseconds: rounding must not lead below what cannot be cut.
        allowed = max(table.fixed, min(int(asked_ms * NS), too_much_ns - 1))
        plan, emptying = choice.of(partial(plan_stage, workspace, limits, **how, latency=(table, allowed), write=False))
        if plan.hash in seen:
            break
        seen.add(plan.hash)
        number = len(rounds) + 1
        with stage(f"try plan {number}, {allowed / NS:.3g} ms") as progress:
            measured = measured_ms(target, yard.against_dense(plan, progress), table.dense_ms)
        if LEAST * goal <= measured <= goal:  # by luck, perhaps: measured once more, and what both say counts
            with stage(f"confirm plan {number}") as progress:
                again = measured_ms(target, yard.against_dense(plan, progress), table.dense_ms)
            measured = math.sqrt(measured * again)
        predicted = table.predict_ms([*map(len, plan.heads)], [*map(len, plan.neurons)])
        rounds.append(Round(allowed, predicted, measured, emptying))
        if LEAST * goal <= measured <= goal:
            break
        if measured > goal:  # this plan must not come again, however coarse the steps are
            too_much_ns = min(too_much_ns, math.floor(predicted * NS))
        # By what the plan takes, not by what it might: other budgets and coarse widths can lie between.
        asked_ms = predicted * AIM * goal / measured
    within = [each for each in rounds if each.measured_ms <= goal]
    if not within:
        least = min(each.measured_ms for each in rounds)
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch; the fastest of {len(rounds)} plans took {least:.3g} ms on "
            f"{yard.target.engine}. Use {as_asked(target, least, table.dense_ms, batch)}."
        )
    best = min(within, key=lambda each: abs(each.measured_ms - AIM * goal))
    noted = {"measured": asdict(best), "table": dict(table.setting)}
    within_time = (table, best.allowed_ns)
    return plan_stage(workspace, limits, **how, latency=within_time, emptying=best.emptying, noted=noted), rounds


class _Choice:
    """Whether branches may be emptied: found out at the first plan that would, for trials take long."""

    def __init__(self, prepared: Prepared, stage: Stage, *, compensation: bool) -> None:
        self.prepared, self.stage, self.compensation = prepared, stage, compensation
        self._emptying: bool | None = None

    def of(self, plan_with: Callable[..., PruningPlan]) -> tuple[PruningPlan, bool]:
        """Args: plan_with: takes `emptying`. Returns: the plan, and the `emptying` that gives it."""
        plan = plan_with(emptying=True)
        if self._emptying or all((*plan.heads, *plan.neurons)):
            return plan, True
        try:
            whole = plan_with(emptying=False)
        except InfeasibleBudget:
            return plan, True
        if whole.hash == plan.hash:  # of an allocation that does not ask
            return plan, True
        if self._emptying is None:
            self._emptying = self._error(plan, "try emptied branches") < self._error(whole, "try none emptied")
        return (plan, True) if self._emptying else (whole, False)

    def _error(self, plan: PruningPlan, told: str) -> float:
        prepared = self.prepared
        with self.stage(told) as progress:
            return unseen_error(
                prepared.loaded.model,
                prepared.layout,
                plan,
                prepared.calibration.batches,
                compensation=self.compensation,
                token_weights=prepared.token_weights() if self.compensation else None,
                progress=progress,
            )


def _check(target: TimeTarget, goal: float, table: LatencyTable, batch: int, *, alone: bool) -> None:
    """Args: alone: is there no other budget?"""
    fixed = table.fixed / NS
    if goal < fixed:
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch, but what cannot be cut takes {fixed:.3g} ms of the dense model's "
            f"{table.dense_ms:.3g}. Use {as_asked(target, fixed / LEAST, table.dense_ms, batch)}, at the least."
        )
    if alone:
        target.check_needed(table.dense_ms, batch)


def as_asked(target: TimeTarget, ms: float, dense_ms: float, batch: int) -> str:
    """The option with which a time could be met, rounded to the safe side."""
    told = {
        "--latency": f"{math.ceil(ms * 1000) / 1000:.3f}ms or more",
        "--speedup": f"{math.floor(100 * dense_ms / ms) / 100:.2f} or less",
        "--throughput": f"{math.floor(10_000 * batch / ms) / 10:.1f} or less",
    }
    return f"{target.option} {told[target.option]}"


def measured_ms(target: TimeTarget, timing: PairTiming, dense_ms: float) -> float:
    """What a measurement says of a target; of a speed-up, in times of the dense model of the table."""
    return dense_ms / timing.speedup if target.option == "--speedup" else timing.pruned(50)


@dataclass(frozen=True)
class LastWord:
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


def judged(target: TimeTarget, measured: Measurement) -> LastWord:
    """Hold the interval of the last measurement against the target, as gates do: only what it excludes is missed."""
    timing = measured.timing
    dense_ms = timing.dense(50)
    goal = target.limit_ms(dense_ms, measured.batch)
    low, high = timing.pruned_ci95_ms
    if target.option == "--speedup":
        low, high = dense_ms / timing.ci95[1], dense_ms / timing.ci95[0]
    found = measured_ms(target, timing, dense_ms)
    told = f"`{target}` is {goal:.4g} ms a batch; measured at the end: {found:.4g} ms, 95% CI {low:.4g} to {high:.4g}."
    again = "Everything is written; measure again on a quieter machine"
    if timing.unstable:
        return LastWord("unstable", f"{told} But the dense model differs from itself: not to be judged. {again}.")
    if low > goal:
        return LastWord("missed", f"{told} That is too slow. {again}, or ask for a little less.")
    if found > goal:
        return LastWord("undecided", f"{told} The target lies within the interval.")
    if found < LEAST * goal:
        return LastWord("holds", f"{told} No plan came nearer, by its steps or by another budget.")
    return LastWord("holds", told)
