"""A budget in time: plan by the latency table, measure the plan, correct, until the measured time is within the budget.

The table says which widths are worth their time; only the measurement says whether the budget is met.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporters.profiling import stored_table, table_at
from exporters.yardstick import Yardstick
from optin_deploy.bench.report import Measurement
from optin_deploy.bench.timing import PairTiming
from optin_deploy.budget import Limits, TimeTarget
from optin_deploy.cost.latency import NS, LatencyTable
from optin_deploy.errors import InfeasibleBudget, MissedTime
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.stages import plan_stage
from optin_deploy.sweep import measure_curves
from optin_deploy.workspace import Workspace

LATENCY = "latency.json"
"""The latency table of an output folder."""
ROUNDS = 5
AIM, LEAST = 0.98, 0.95
"""Of the budget: what is aimed at, so that noise does not lead over it, and what need not be made better."""


@dataclass(frozen=True)
class Round:
    """One plan that was measured."""

    asked_ms: float
    """What the plan may take by the table."""
    measured_ms: float


def plan_in_time(
    workspace: Workspace,
    limits: Limits,
    yard: Yardstick,
    table: Path | None = None,
    *,
    align: int,
    allocation: str,
    stage: Stage = silent_stage,
) -> list[Round]:
    """Plan for `limits.time`, after the curves and the latency table that this needs.

    Args: table: file of the latency table; default: the workspace's own, measured if need be.
    Raises: BadInput: no table of this model and setting. InfeasibleBudget.
    """
    measure_curves(workspace, yard.prepared, allocation, stage)
    if table is not None:
        known = stored_table(table, yard)
    else:
        with stage("profile") as progress:
            known = table_at(workspace.root / LATENCY, yard, align=align, progress=progress)
    return plan_within_time(workspace, limits, known, yard, align=align, allocation=allocation, stage=stage)[1]


def plan_within_time(
    workspace: Workspace,
    limits: Limits,
    table: LatencyTable,
    yard: Yardstick,
    *,
    align: int,
    allocation: str,
    stage: Stage = silent_stage,
) -> tuple[PruningPlan, list[Round]]:
    """Write the plan of the widest model whose measured time is within `limits.time`, and within all other budgets.

    Raises: InfeasibleBudget: the time cannot be met; says what can.
    """
    target = limits.time
    assert target is not None, "there is a time to plan for"
    goal = target.limit_ms(table.dense_ms, yard.point.batch)
    how: dict[str, Any] = {"align": align, "allocation": allocation}
    _check(target, goal, table, yard.point.batch)
    asked, rounds = AIM * goal, list[Round]()
    seen: set[str] = set()
    while len(rounds) < ROUNDS:
        asked = max(asked, table.fixed / NS)
        plan = plan_stage(workspace, limits, **how, latency=(table, int(asked * NS)), write=False)
        if plan.hash in seen:
            break
        seen.add(plan.hash)
        with stage(f"try {asked:.3g} ms") as progress:
            measured = measured_ms(target, yard.against_dense(plan, progress), table.dense_ms)
        rounds.append(Round(asked, measured))
        if LEAST * goal <= measured <= goal:
            break
        asked *= AIM * goal / measured
    within = [each for each in rounds if each.measured_ms <= goal]
    if not within:
        least = min(each.measured_ms for each in rounds)
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch; the fastest of {len(rounds)} plans took {least:.3g} ms on "
            f"{yard.target.engine}. Use {_as_asked(target, least, table.dense_ms, yard.point.batch)}."
        )
    best = max(within, key=lambda each: each.measured_ms)
    found = {"time": asdict(best), "table": table.setting}
    plan = plan_stage(workspace, limits, **how, latency=(table, int(best.asked_ms * NS)), noted=found)
    return plan, rounds


def _check(target: TimeTarget, goal: float, table: LatencyTable, batch: int) -> None:
    fixed = table.fixed / NS
    if goal < fixed:
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch, but what cannot be cut takes {fixed:.3g} ms of the dense model's "
            f"{table.dense_ms:.3g}. Use {_as_asked(target, fixed / LEAST, table.dense_ms, batch)}, at the least."
        )
    if goal >= table.dense_ms:
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch, and the dense model takes {table.dense_ms:.3g} ms already: "
            "nothing has to be cut for it."
        )


def _as_asked(target: TimeTarget, ms: float, dense_ms: float, batch: int) -> str:
    """The option with which a time could be met."""
    told = {
        "--latency": f"{ms:.3g}ms or more",
        "--speedup": f"{dense_ms / ms:.2f} or less",
        "--throughput": f"{1000 * batch / ms:.0f} or less",
    }
    return f"{target.option} {told[target.option]}"


def measured_ms(target: TimeTarget, timing: PairTiming, dense_ms: float) -> float:
    """What a measurement says of a target; of a speed-up, in times of the dense model of the table."""
    return dense_ms / timing.speedup if target.option == "--speedup" else timing.pruned(50)


def check_met(target: TimeTarget, measured: Measurement) -> None:
    """Compare the last word, the shipped model's own measurement, with the target.

    Raises: MissedTime.
    """
    dense_ms = measured.timing.dense(50)
    goal, found = target.limit_ms(dense_ms, measured.batch), measured_ms(target, measured.timing, dense_ms)
    if found > goal:
        raise MissedTime(
            f"{target} is {goal:.4g} ms a batch; the last measurement says {found:.4g} ms, after a plan that met it. "
            "Everything is written. Ask for a little less, or measure again on a quieter machine."
        )
