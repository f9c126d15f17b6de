"""What each group costs: the part of all multiply-accumulates and weights that would go with all of its units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from optin_deploy.network.axes import Axis, size
from optin_deploy.structure.groups import Layout, UnitGroup
from optin_deploy.structure.macs import macs, weight_entries
from optin_deploy.structure.structure import Structure, WeightUse


@dataclass(frozen=True)
class Share:
    """Parts of the whole network, in [0, 1]; what two groups lie on counts for both."""

    macs: float
    weights: float


def shares(layout: Layout) -> dict[str, Share]:
    """Return the share of each group by name."""
    structure = layout.structure
    saved, entries = Savings(structure), weight_entries(structure)
    uses: dict[str, list[WeightUse]] = {}
    for use in structure.uses:
        uses.setdefault(use.weight, []).append(use)

    def lost(group: UnitGroup) -> int:
        weights = dict.fromkeys(part.weight for part in group.slices)
        touched = replace(structure, uses=[use for name in weights for use in uses[name]])
        return weight_entries(touched) - weight_entries(touched, {group.leaf: 0})

    return {
        group.name: Share(saved.of(group, 0) / max(1, saved.dense), lost(group) / max(1, entries))
        for group in layout.groups
    }


class Savings:
    """Multiply-accumulates that go with units of one group, while all others stay."""

    def __init__(self, structure: Structure) -> None:
        self.dense = macs(structure)
        self._products: dict[Axis, list[Sequence[Axis]]] = {}
        for _, axes in structure.products:
            for leaf in {leaf: None for axis in axes for leaf in axis.leaves()}:
                self._products.setdefault(leaf, []).append(axes)

    def of(self, group: UnitGroup, left: int) -> int:
        """Return how many go when so many units are left."""
        products, sizes = self._products.get(group.leaf, ()), {group.leaf: left}
        return sum(_count(axes, {}) - _count(axes, sizes) for axes in products)


def _count(axes: Iterable[Axis], sizes: Mapping[Axis, int]) -> int:
    return math.prod(size(axis, sizes) for axis in axes)
