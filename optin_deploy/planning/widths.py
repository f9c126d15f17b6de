"""Choose how many units each group keeps: within several limits at once, by exact costs, never over any of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.planning.costs import CostLimit, fits
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.ladder import ALIGNED, Ladder, best, ladder, narrowest
from optin_deploy.planning.pools import Pool, by_score, by_share, filled, largest_total, together, widths_of
from optin_deploy.planning.trading import check_curves, least_summed_error
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.labels import DEFAULT_KINDS, KINDS, TOKENS

ALLOCATIONS = ("curves", "uniform", "paper")
DEFAULT_ALIGN = 8

Align = int | Mapping[str, int]
"""Multiples that are asked for: one of all kinds, or one of each kind that is named."""
Keep = dict[str, tuple[int, ...]]
"""Kept units by name of group, ascending; a group that is not there stays whole."""


@dataclass(frozen=True)
class Choice:
    """How widths are chosen."""

    kinds: tuple[str, ...] = DEFAULT_KINDS
    align: int = DEFAULT_ALIGN
    """Neurons, channels and widths stay in multiples of this; a group of fewer units stays whole."""
    allocation: str = "uniform"
    """uniform: one share for all groups of a kind; paper: one ranking of all units of a kind by score per cost; curves:
    the least summed error by error curves."""
    one_measure: bool = True
    """Whether scores of units of different kinds compare, so that kinds share what may be spent by the largest total;
    False: all kinds keep the same part."""
    merges: tuple[int, ...] = ()
    """Tokens that go behind the attention of each block, as in `planning.plan.NetworkPlan`; none where it is empty."""
    drops: bool = False
    """Whether tokens that go are dropped, not merged."""
    by_kind: tuple[tuple[str, int], ...] = ()
    """Multiples of single kinds, in place of `align`."""

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in (*KINDS, TOKENS)]:
            raise BadInput(f"--units {unknown[0]!r}: possible are {', '.join((*KINDS, TOKENS))}.")
        if self.align < 1:
            raise BadInput(f"--align {self.align}: give 1 or more, such as 16.")
        for kind, multiple in self.by_kind:
            if kind not in ALIGNED or multiple < 1:
                raise BadInput(f"--align {kind}={multiple}: possible are {', '.join(ALIGNED)}, each with 1 or more.")
        if self.allocation not in ALLOCATIONS:
            raise BadInput(f"--allocation {self.allocation!r}: possible are {', '.join(ALLOCATIONS)}.")

    def multiple(self, kind: str) -> int:
        """Return the multiple in which units of a kind stay."""
        return dict(self.by_kind).get(kind, self.align) if kind in ALIGNED else 1

    def in_multiples(self, asked: Align | None) -> Choice:
        """Return the choice in the multiples that are asked for; kinds that are not named keep theirs."""
        if isinstance(asked, Mapping):
            return replace(self, by_kind=tuple(sorted(asked.items())))
        return self if asked is None else replace(self, align=asked)


def default_align(layout: Layout, choice: Choice) -> int:
    """Return the multiple of a choice, or less where no group that is aligned has so many units."""
    units = [group.units for group in layout.groups if group.kind in choice.kinds]
    aligned = [group.units for group in layout.groups if group.kind in ("neurons", "channels")]
    widest = max(aligned or units, default=choice.align)
    return choice.align if widest > choice.align else max(1, widest // 2)


def aligned(layout: Layout, choice: Choice, asked: Align | None) -> Choice:
    """Return the choice with the multiples that are asked for; others are its own, or `default_align`.

    Raises: BadInput: no group has so many units; says the largest that one has.
    """
    found = replace(choice, align=default_align(layout, choice)).in_multiples(asked)
    named: list[tuple[tuple[str, ...], int]] = [((kind,), multiple) for kind, multiple in found.by_kind]
    for kinds, multiple in named or [(ALIGNED, found.align)]:
        units = [group.units for group in layout.groups if group.kind in choice.kinds and group.kind in kinds]
        widest = max(units, default=multiple)
        if asked is not None and multiple > widest:
            option = f"--align {kinds[0]}=" if named else "--align "
            raise BadInput(
                f"{option}{multiple}: the widest group that is cut in multiples has {widest} units, so that nothing "
                f"would go. Give {option}{widest} or less."
            )
    return found


def choose(
    layout: Layout,
    scores: Mapping[str, np.ndarray],
    limits: Sequence[CostLimit],
    choice: Choice,
    *,
    curves: Mapping[str, Curve] | None = None,
    emptying: Collection[str] = (),
) -> Keep:
    """Return what to keep: as much as the limits allow.

    Args:
        scores: one for each unit of each group, by name; higher = keep.
        curves: by name of group; needed by the allocation `curves` alone.
        emptying: groups that may lose all of their units; the others keep one step.
    Raises: InfeasibleBudget: even the least that can be kept is more. BadInput: nothing can be cut, or scores or curves
        are not those of the layout.
    """
    ladders = check_choice(layout, limits, choice, emptying)
    _check_scores(layout, ladders, scores)
    whole = layout.units
    if choice.allocation == "curves":
        if curves is None:
            raise BadInput("--allocation curves needs error curves, which need data. Use uniform or paper.")
        check_curves(ladders, curves)
        even = [by_share(ladders, scores)]
        widths = least_summed_error(ladders, curves, limits, widths_of(even, together(even, limits, whole), whole))
    else:
        pools = _pools(ladders, scores, limits, whole, choice)
        sizes = (largest_total if choice.one_measure else together)(pools, limits, whole)
        spend = filled if choice.allocation == "paper" else None
        widths = spend(pools, sizes, limits, whole) if spend else widths_of(pools, sizes, whole)
    assert fits(limits, widths), "a plan is within its limits"
    smaller = {each.name: widths[each.name] for each in ladders if widths[each.name] < each.units}
    if choice.allocation == "curves" and curves is not None:
        return {name: tuple(sorted(curves[name].order[:width])) for name, width in smaller.items()}
    return {name: best(scores[name], width) for name, width in smaller.items()}


def check_choice(
    layout: Layout, limits: Sequence[CostLimit], choice: Choice, emptying: Collection[str] = ()
) -> list[Ladder]:
    """Return the widths of all groups that may be cut.

    Raises: BadInput: there is none. InfeasibleBudget: even the least that can be kept is more than the limits.
    """
    ladders = ladders_of(layout, choice, emptying)
    _check_feasible(limits, narrowest(ladders, layout.units), choice)
    return ladders


def ladders_of(layout: Layout, choice: Choice, emptying: Collection[str] = ()) -> list[Ladder]:
    """Return the widths of all groups that may be cut.

    Raises: BadInput: there is none.
    """
    chosen = [group for group in layout.groups if group.kind in choice.kinds]
    ladders = [ladder(group, choice.multiple(group.kind), emptying=group.name in emptying) for group in chosen]
    ladders = [each for each in ladders if len(each.counts) > 1]
    if not ladders:
        kinds = ", ".join(sorted({group.kind for group in layout.groups})) or "none"
        raise BadInput(
            f"nothing can be cut: no group of {', '.join(choice.kinds)} has more units than --align {choice.align}. "
            f"This network has groups of: {kinds}; see `optin inspect`."
        )
    return ladders


def _pools(
    ladders: Sequence[Ladder],
    scores: Mapping[str, np.ndarray],
    limits: Sequence[CostLimit],
    whole: Mapping[str, int],
    choice: Choice,
) -> list[Pool]:
    kinds = [[each for each in ladders if each.kind == kind] for kind in KINDS]
    if choice.allocation == "uniform":
        return [by_share(alike, scores) for alike in kinds if alike]
    return [by_score(alike, scores, limits, whole) for alike in kinds if alike]


def _check_scores(layout: Layout, ladders: Sequence[Ladder], scores: Mapping[str, np.ndarray]) -> None:
    """Raises: BadInput: scores are missing, of another network, or no numbers."""
    for each in ladders:
        found = np.asarray(scores[each.name]) if each.name in scores else None
        if found is None or found.shape != (each.units,) or not np.isfinite(found).all():
            fault = "there are none" if found is None else f"they are {found.shape}, or not all are numbers"
            raise BadInput(
                f"scores of {each.name}: {fault}; a finite number for each of {each.units} units is needed. "
                f"Score {layout.structure.network.source} again."
            )


def _check_feasible(limits: Sequence[CostLimit], least: Mapping[str, int], choice: Choice) -> None:
    """Raises: InfeasibleBudget: names what is possible."""
    found = [(limit, limit.resource.total(least)) for limit in limits]
    if all(amount <= limit.most for limit, amount in found):
        return
    asked = " and ".join(limit.asked for limit, amount in found if amount > limit.most)
    shares = ", ".join(
        f"{amount / max(1, limit.resource.dense):.3f} of the dense network's {limit.resource.option.removeprefix('--')}"
        for limit, amount in found
        if amount > limit.most
    )
    possible = " ".join(limit.option_for(amount) for limit, amount in found if amount > limit.most)
    raise InfeasibleBudget(
        f"{asked}: with the fewest units of {', '.join(choice.kinds)} that --align {choice.align} allows, {shares} "
        f"are left. Use {possible} or more, or more kinds of --units ({', '.join(KINDS)})."
    )
