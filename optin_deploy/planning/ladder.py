"""The widths that a group may have, and what its best units are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from optin_deploy.structure.groups import UnitGroup

ALIGNED = ("neurons", "channels", "qk-width", "v-width")
"""Kinds that are cut in multiples; the others are whole parts of a layer."""


@dataclass(frozen=True)
class Ladder:
    """A group that may be cut, in steps."""

    name: str
    kind: str
    counts: tuple[int, ...]
    """Kept units, ascending; the last one is all."""

    @property
    def units(self) -> int:
        """All of them."""
        return self.counts[-1]

    @cached_property
    def rung(self) -> Mapping[int, int]:
        """Places of the counts."""
        return {count: place for place, count in enumerate(self.counts)}

    def nearest(self, share: float) -> int:
        """Return the count nearest to a share of the units, the larger of two."""
        return min(self.counts, key=lambda count: (abs(count - share * self.units), -count))

    def values(self, scores: np.ndarray) -> np.ndarray:
        """Return the summed scores of the best units for each count."""
        summed = np.concatenate([[0.0], np.cumsum(-np.sort(-np.asarray(scores, dtype=np.float64), kind="stable"))])
        found: np.ndarray = summed[list(self.counts)]
        return found


def ladder(group: UnitGroup, step: int, *, emptying: bool) -> Ladder:
    """Return the widths of a group: multiples of `step`, and all units.

    Args: emptying: whether it may lose all units.
    """
    return Ladder(group.name, group.kind, (*range(0 if emptying else step, group.units, step), group.units))


def best(scores: np.ndarray, width: int) -> tuple[int, ...]:
    """Return the units of the highest scores, ascending; of equal ones the first."""
    return tuple(sorted(int(unit) for unit in np.argsort(-np.asarray(scores), kind="stable")[:width]))


def narrowest(ladders: Sequence[Ladder], whole: Mapping[str, int]) -> dict[str, int]:
    """Return the least widths of all groups."""
    return {**whole, **{each.name: each.counts[0] for each in ladders}}
