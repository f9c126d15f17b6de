"""Plans from the stored scores and curves of an output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import CostLimit, limits_within
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice, Keep
from optin_deploy.pruning.pruning import pick, planned
from optin_deploy.pruning.tokens import least_error, schedules
from optin_deploy.structure.labels import TOKENS


@dataclass(frozen=True, eq=False)
class Planner:
    """Plans from stored scores and curves, within any limits."""

    workspace: Workspace
    prepared: Prepared
    choice: Choice

    @cached_property
    def _scores(self) -> Any:
        return self.workspace.scores_of(self.prepared.ready.layout)

    @cached_property
    def _curves(self) -> Any:
        return self.workspace.read_curves()[0] if self.choice.allocation == "curves" else None

    def limits(self, limits: Limits, merges: tuple[int, ...] | None = None) -> list[CostLimit]:
        """Return the limits of MACs, parameters and bytes; without `merges`, with those that were asked for."""
        merges = self.choice.merges if merges is None else merges
        return limits_within(self.prepared.ready.costs_with(merges), limits)

    @property
    def merges_freely(self) -> bool:
        """Whether it is to be found how many tokens are merged."""
        return TOKENS in self.choice.kinds and not self.choice.merges

    def merging(self, merges: tuple[int, ...]) -> Planner:
        """The same with these merges."""
        return replace(self, choice=replace(self.choice, merges=merges))

    def schedules(self) -> list[tuple[int, ...]]:
        """Merges that are tried."""
        return schedules(self.prepared.ready, drops=self.choice.drops)

    def least_error(
        self, limits: Callable[[tuple[int, ...]], list[CostLimit]], merges: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], Keep]:
        """See `pruning.tokens.least_error`.

        Raises: InfeasibleBudget.
        """
        return least_error(self.prepared.ready, self._scores, self.choice, self._curves, limits, merges)

    def kept_units(self, limits: list[CostLimit], *, emptying: bool = True) -> Keep:
        """Choose what stays; see `pruning.pruning.pick`.

        Raises: BadInput, InfeasibleBudget.
        """
        return pick(self.prepared.ready, self._scores, limits, self.choice, self._curves, emptying=emptying)

    def plan(self, limits: Limits, keep: Keep | None = None, noted: Mapping[str, Any] | None = None) -> NetworkPlan:
        """The plan within these limits.

        Args: keep: what stays, where it was chosen already. noted: more to write down of how it was found.
        Raises: BadInput, InfeasibleBudget.
        """
        if limits.time is not None and keep is None:
            raise BadInput(f"{limits.time} is measured while planning: give it to optin-export.")
        ready, merges = self.prepared.ready, self.choice.merges
        if keep is None and self.merges_freely:
            merges, keep = self.least_error(lambda some: self.limits(limits, some), self.schedules())
        chosen = self.kept_units(self.limits(limits), emptying=not any(merges)) if keep is None else keep
        settings = {**asdict(limits), **asdict(self.choice), **(noted or {})}
        return planned(ready, chosen, self._scores, settings, merges)
