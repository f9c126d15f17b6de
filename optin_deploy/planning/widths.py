"""Choose how many units each group keeps under a budget of multiply-accumulates; the cost is exact, never exceeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from optin_deploy.budget import Budget
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.structure.groups import KINDS, Layout, UnitGroup
from optin_deploy.structure.macs import macs
from optin_deploy.structure.shares import Savings

DEFAULT_KINDS = ("heads", "groups", "neurons", "channels")
"""What is cut where nothing is said; widths of heads, and queries within a group, only where they are named."""
ALIGNED = ("neurons", "channels", "qk-width", "v-width")
"""Kinds that are cut in multiples; the others are whole parts of a layer."""
ALLOCATIONS = ("uniform", "paper")
DEFAULT_ALIGN = 8

Keep = dict[str, tuple[int, ...]]
"""Kept units by name of group, ascending; a group that is not there stays whole."""
Fits = Callable[[Sequence[int]], bool]
"""Whether a width for each group stays within the budget."""


@dataclass(frozen=True)
class Choice:
    """How widths are chosen."""

    flops: float
    """Share of the dense multiply-accumulates that may stay, in (0, 1]."""
    kinds: tuple[str, ...] = DEFAULT_KINDS
    align: int = DEFAULT_ALIGN
    """Neurons, channels and widths stay in multiples of this; a group of fewer units stays whole."""
    allocation: str = "uniform"
    """uniform: equal shares in all groups; paper: of each kind the units of least score by the MACs they save."""

    def __post_init__(self) -> None:
        Budget(self.flops)
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise BadInput(f"--units {unknown[0]!r}: possible are {', '.join(KINDS)}.")
        if self.align < 1:
            raise BadInput(f"--align {self.align}: give 1 or more.")
        if self.allocation not in ALLOCATIONS:
            raise BadInput(f"--allocation {self.allocation!r}: possible here are {', '.join(ALLOCATIONS)}.")


def choose(layout: Layout, scores: Mapping[str, np.ndarray], choice: Choice) -> Keep:
    """Return what to keep: at least one unit of each group, and as much as the budget allows.

    Raises: InfeasibleBudget: even the least that can be kept is more. BadInput: nothing can be cut.
    """
    groups = [_Group(group, _step(group, choice)) for group in layout.groups if group.kind in choice.kinds]
    groups = [group for group in groups if group.step < group.units]
    if not groups:
        kinds = ", ".join(sorted({group.kind for group in layout.groups})) or "none"
        raise BadInput(
            f"nothing can be cut: no group of {', '.join(choice.kinds)} has more units than --align {choice.align}. "
            f"This network has groups of: {kinds}; see `optin inspect`."
        )
    limit = math.floor(Fraction(str(choice.flops)) * macs(layout.structure))

    def fits(widths: Sequence[int]) -> bool:
        return _macs(layout, groups, widths) <= limit

    least = [group.step for group in groups]
    if not fits(least):
        raise _infeasible(layout, _macs(layout, groups, least), choice)
    widths = _uniform(groups, fits) if choice.allocation == "uniform" else _ranked(layout, groups, scores, fits)
    return {
        group.of.name: best(scores[group.of.name], width)
        for group, width in zip(groups, widths, strict=True)
        if width < group.units
    }


def best(scores: np.ndarray, width: int) -> tuple[int, ...]:
    """Return the units of the highest scores, ascending; of equal ones the first."""
    return tuple(sorted(int(unit) for unit in np.argsort(-scores, kind="stable")[:width]))


@dataclass(frozen=True)
class _Group:
    """A group that may be cut, in steps."""

    of: UnitGroup
    step: int

    @property
    def units(self) -> int:
        return self.of.units

    def width(self, share: Fraction) -> int:
        """The allowed width nearest to a share of the units."""
        if share >= 1:
            return self.units
        steps = math.floor(share * self.units / self.step + Fraction(1, 2))
        return min(self.units, max(1, steps) * self.step)


def _step(group: UnitGroup, choice: Choice) -> int:
    return choice.align if group.kind in ALIGNED else 1


def _macs(layout: Layout, groups: Sequence[_Group], widths: Sequence[int]) -> int:
    return macs(layout.structure, {group.of.leaf: width for group, width in zip(groups, widths, strict=True)})


def _uniform(groups: Sequence[_Group], fits: Fits) -> list[int]:
    """Find the largest share of all groups that fits, by bisection over those at which any width changes."""
    shapes = {(group.units, group.step) for group in groups}
    changes = {
        Fraction((2 * steps - 1) * step, 2 * units) for units, step in shapes for steps in range(1, units // step + 1)
    }
    shares = sorted({Fraction(0), *(share for share in changes if share < 1), Fraction(1)})
    low, high = 0, len(shares) - 1  # the first one fits
    while low < high:
        middle = (low + high + 1) // 2
        if fits([group.width(shares[middle]) for group in groups]):
            low = middle
        else:
            high = middle - 1
    return [group.width(shares[low]) for group in groups]


def _ranked(layout: Layout, groups: Sequence[_Group], scores: Mapping[str, np.ndarray], fits: Fits) -> list[int]:
    """Take away the fewest steps that fit, those of least score for what they save first.

    Each kind is a pool of its own, as scores of a head and of a neuron do not compare: all pools lose the same share.
    """
    savings = Savings(layout.structure)
    pools: dict[str, list[_Step]] = {}
    for number, group in enumerate(groups):
        rising, saved = np.sort(scores[group.of.name]), savings.of(group.of, group.units - 1)
        width = group.units
        while left := (width - 1) // group.step * group.step:
            lost = rising[group.units - width : group.units - left]
            pools.setdefault(group.of.kind, []).append(
                _Step(number, left, saved * (width - left), float(lost.mean()) / max(1, saved))
            )
            width = left
    ordered = sorted((place, step) for pool in pools.values() for place, step in _placed(pool))

    def after(count: int) -> list[int]:
        widths = [group.units for group in groups]
        for _, step in ordered[:count]:
            widths[step.group] = min(widths[step.group], step.left)
        return widths

    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if fits(after(middle)):
            high = middle
        else:
            low = middle + 1
    return after(low)


@dataclass(frozen=True, order=True)
class _Step:
    """A group made narrower by one step."""

    group: int
    left: int
    saved: int
    """Multiply-accumulates, as if nothing else were cut."""
    score: float
    """Of what it takes away, for each multiply-accumulate."""


def _placed(pool: Sequence[_Step]) -> Iterator[tuple[float, _Step]]:
    """Steps of one kind in the order in which they are taken, each with the share of the pool that is gone then."""
    whole, gone = sum(step.saved for step in pool), 0
    for step in sorted(pool, key=lambda step: step.score):  # of one group in the order of its widths: scores rise
        gone += step.saved
        yield gone / max(1, whole), step


def _infeasible(layout: Layout, least: int, choice: Choice) -> InfeasibleBudget:
    dense = macs(layout.structure)
    share = -(-100 * least // dense) / 100
    return InfeasibleBudget(
        f"--flops {choice.flops:g}: with the fewest units of {', '.join(choice.kinds)} that --align {choice.align} "
        f"allows, {least / dense:.3f} of the dense MACs are left. Use --flops {share:.2f} or more, or more kinds of "
        f"--units ({', '.join(KINDS)})."
    )
