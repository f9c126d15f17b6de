"""A budget in time: plan by the latency table, measure the plan, correct, until the measured time is within it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.profiling import BLOCKS, NS
from optin_deploy.jobs.time_rounds import AIM, LEAST, MOST, ROUNDS, Round, as_asked, measured_ms
from optin_deploy.jobs.width_timer import DENSE, WidthTimer
from optin_deploy.measuring.timing import mean_ratio
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import CostLimit
from optin_deploy.planning.ladder import narrowest
from optin_deploy.planning.latency import LatencyTable, TimeCost
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.planning.widths import Keep, ladders_of
from optin_deploy.pruning.pruning import emptiable, emptied
from optin_deploy.pruning.trial import unseen_error

EVERY = 2
"""One in so many of the merges that are tried is timed, as an engine is built for each."""


@dataclass(frozen=True, eq=False)
class Planning:
    """What planning for a time works with."""

    planner: Planner
    yard: WidthTimer
    limits: Limits
    compensation: bool = True
    stage: Stage = silent_stage
    merging_ns: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False)
    """Nanoseconds of the network with all widths, for the merges that were timed."""
    _emptying: list[bool] = field(default_factory=list, init=False, repr=False)
    """Whether branches may be left without any unit, once that is found out."""

    def within(self, table: LatencyTable) -> tuple[NetworkPlan, list[Round]]:
        """Plan for `limits.time`: near it by measurement, and within all other budgets.

        Raises: InfeasibleBudget: the time cannot be met; says what can.
        """
        target, batch, stage = self.limits.time, self.yard.point.batch, self.stage
        assert target is not None, "there is a time to plan for"
        dense_ms, others = table.dense_ns / NS, self.planner.limits(self.limits)
        goal = target.limit_ms(dense_ms, batch)
        if not others:
            target.check_needed(dense_ms, batch)
        if self.planner.merges_freely:
            return self._freely(table, goal)
        costs, cost = self.planner.prepared.ready.costs, self._cost(table, self.merges)
        least = self._least({self.merges: cost}, goal)
        tried: list[tuple[Round, Keep]] = []
        asked_ms, too_much_ns = AIM * goal, cost.table.dense_ns + 1
        while len(tried) < ROUNDS:
            allowed = max(least, min(int(asked_ms * NS), too_much_ns - 1))
            try:
                keep = self._chosen([*others, CostLimit(cost, allowed, str(target))])
            except InfeasibleBudget:
                if not tried:
                    raise
                break
            if any(keep == known for _, known in tried):
                break
            predicted = cost.total(costs.widths(keep)) / NS
            with stage(f"try plan {len(tried) + 1}, {allowed / NS:.3g} ms") as progress:
                measured = measured_ms(target, self._yard.against_dense(keep, progress), dense_ms)
            if LEAST * goal <= measured <= goal:  # by luck, perhaps: measured once more, and what both say counts
                with stage(f"confirm plan {len(tried) + 1}") as progress:
                    again = measured_ms(target, self._yard.against_dense(keep, progress), dense_ms)
                measured = math.sqrt(measured * again)
            tried.append((Round(allowed, predicted, measured), keep))
            if LEAST * goal <= measured <= MOST * goal:
                break
            if measured > MOST * goal:  # these widths must not come again, however coarse the steps are
                too_much_ns = min(too_much_ns, math.floor(predicted * NS))
            asked_ms = predicted * AIM * goal / measured
        rounds = [each for each, _ in tried]
        fast = [(each, keep) for each, keep in tried if each.measured_ms <= goal]
        if not fast:
            fastest = min(each.measured_ms for each in rounds)
            raise InfeasibleBudget(
                f"{target} is {goal:.3g} ms a batch; the fastest of {len(rounds)} plans took {fastest:.3g} ms on "
                f"{self.yard.target.engine}. Use {as_asked(target, fastest, dense_ms, batch)}."
            )
        best, keep = min(fast, key=lambda each: abs(each[0].measured_ms - AIM * goal))
        noted = {"measured": {**asdict(best), "emptied": emptied(keep)}, "table": dict(table.setting)}
        return self.planner.plan(self.limits, keep, noted), rounds

    @property
    def merges(self) -> tuple[int, ...]:
        """Tokens that every plan merges, block by block."""
        return self.planner.choice.merges

    @property
    def _yard(self) -> WidthTimer:
        return replace(self.yard, merges=self.merges)

    def _freely(self, table: LatencyTable, goal: float) -> tuple[NetworkPlan, list[Round]]:
        """Plan with the merges of least error at the goal, as the table and their own times foretell.

        Where they are too slow in the end, others are tried.
        Raises: InfeasibleBudget.
        """
        left = self.planner.schedules()[::EVERY]
        costs = {merges: self._cost(table, merges) for merges in left}
        self._least(costs, goal)

        def limits(merges: tuple[int, ...]) -> list[CostLimit]:
            time = CostLimit(costs[merges], int(AIM * goal * NS), str(self.limits.time))
            return [*self.planner.limits(self.limits, merges), time]

        problem: InfeasibleBudget | None = None
        while True:
            try:
                merges, _ = self.planner.least_error(limits, left)
            except InfeasibleBudget as err:
                raise problem or err from err
            try:
                return replace(self, planner=self.planner.merging(merges)).within(table)
            except InfeasibleBudget as err:
                problem, left = err, [each for each in left if each != merges]

    def _cost(self, table: LatencyTable, merges: tuple[int, ...]) -> TimeCost:
        """What plans with these merges take: measured where nothing else is cut."""
        ready = self.planner.prepared.ready
        macs = ready.costs_with(merges).macs
        if not any(merges):
            return TimeCost(table, macs)
        if merges not in self.merging_ns:
            with self.stage(f"time with fewer tokens {merges}"):
                samples = replace(self.yard, merges=merges).together([{}], blocks=BLOCKS).ms
            self.merging_ns[merges] = round(table.dense_ns * mean_ratio(samples["0"], samples[DENSE]))
        expected = table.merging(self.merging_ns[merges], ready.costs.macs, macs)
        return TimeCost(expected, macs, base=table.dense_ns)

    def _least(self, costs: Mapping[tuple[int, ...], TimeCost], goal: float) -> int:
        """Nanoseconds of the narrowest plan with any of these merges.

        Raises: InfeasibleBudget: even that takes longer than the goal; says what is possible.
        """
        target, choice, layout = self.limits.time, self.planner.choice, self.yard.layout
        assert target is not None, "there is a time to plan for"
        narrow = {merges: narrowest(ladders_of(layout, choice, self._may_go(merges)), layout.units) for merges in costs}
        least = min(cost.total(narrow[merges]) for merges, cost in costs.items())
        dense = next(iter(costs.values())).dense
        if least <= int(AIM * goal * NS):
            return least
        message = (
            f"{target} is {goal:.3g} ms a batch, but by the latency table {least / NS:.3g} ms of the dense model's "
            f"{dense / NS:.3g} are left where every group keeps the fewest units"
        )
        if least / AIM >= dense:
            raise InfeasibleBudget(
                f"{message}, as merging takes a while itself. Give a higher --tokens, or leave it out."
            )
        asked = as_asked(target, least / NS / AIM, dense / NS, self.yard.point.batch)
        raise InfeasibleBudget(f"{message}. Use {asked}.")

    def _may_go(self, merges: tuple[int, ...]) -> frozenset[str]:
        """Groups that this allocation may empty; none where tokens are merged behind their attention."""
        empties = self.planner.choice.allocation == "curves" and not any(merges)
        return emptiable(self.yard.layout) if empties else frozenset()

    def _chosen(self, limits: list[CostLimit]) -> Keep:
        """What stays; branches are emptied only if that keeps the outputs nearer than the best plan that empties none.

        A whole branch less saves more time than its units do, and error curves, each of one group alone, know least of
        that. Whether they may be emptied is found out at the first plan that would, for trials take long.
        """
        if any(self.merges):
            return self.planner.kept_units(limits, emptying=False)
        if self._emptying == [False]:
            with suppress(InfeasibleBudget):  # where nothing else is in time, they are
                return self.planner.kept_units(limits, emptying=False)
        keep = self.planner.kept_units(limits)
        if self._emptying or not emptied(keep):
            return keep
        try:
            whole = self.planner.kept_units(limits, emptying=False)
        except InfeasibleBudget:
            return keep
        if whole == keep:  # of an allocation that does not ask
            return keep
        errors = [self._error(some, title) for some, title in ((keep, "emptied branches"), (whole, "none emptied"))]
        self._emptying.append(errors[0] < errors[1])
        return keep if self._emptying[0] else whole

    def _error(self, keep: Keep, title: str) -> float:
        ready = self.planner.prepared.ready
        with self.stage(f"try {title}") as progress:
            plan = plan_of(ready.layout, keep, sizes=ready.sizes)
            return unseen_error(ready, plan, compensation=self.compensation, progress=progress)
