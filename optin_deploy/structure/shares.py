"""What each group costs: the part of all multiply-accumulates and weights that would go with all of its units."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optin_deploy.network.axes import Axis
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs, weight_entries
from optin_deploy.structure.structure import WeightUse


@dataclass(frozen=True)
class CostShares:
    """Parts of the whole network, in [0, 1]; what two groups lie on counts for both."""

    macs: float
    weights: float


def shares(layout: Layout) -> dict[str, CostShares]:
    """Return the share of each group by name."""
    structure, found = layout.structure, dict[str, CostShares]()
    dense, entries = max(1, macs(structure)), max(1, weight_entries(structure))
    uses: dict[str, list[WeightUse]] = {}
    products: dict[Axis, list[tuple[int, tuple[Axis, ...]]]] = {}
    for use in structure.uses:
        uses.setdefault(use.weight, []).append(use)
    for index, axes in structure.products:
        for leaf in {leaf: None for axis in axes for leaf in axis.leaves()}:
            products.setdefault(leaf, []).append((index, axes))
    for group in layout.groups:
        weights, none = dict.fromkeys(part.weight for part in group.slices), {group.leaf: 0}
        read = [use for name in weights for use in uses[name]]
        near = replace(structure, uses=read, products=products.get(group.leaf, []))
        saved, lost = macs(near) - macs(near, none), weight_entries(near) - weight_entries(near, none)
        found[group.name] = CostShares(saved / dense, lost / entries)
    return found
