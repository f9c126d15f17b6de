"""Which widths of which groups to measure for a latency table, and the table that the times make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from optin_deploy.network.hashing import network_hash
from optin_deploy.planning.costs import costs_of
from optin_deploy.planning.ladder import Ladder
from optin_deploy.planning.latency import LatencyTable, Steps, TimeCost
from optin_deploy.planning.widths import Choice, Keep, ladders_of
from optin_deploy.structure.find import expression
from optin_deploy.structure.groups import Layout, UnitGroup

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Measured shares of a group's units, beside all units and the fewest that it may keep."""


@dataclass(frozen=True)
class WidthCell:
    """All groups of one shape at one width."""

    groups: tuple[str, ...]
    count: int


def cells(layout: Layout, choice: Choice, emptying: Collection[str] = ()) -> tuple[WidthCell, ...]:
    """Return the points to measure: of all groups of a shape at once, whose times must be alike.

    Raises: BadInput: nothing can be cut.
    """
    alike: dict[object, list[Ladder]] = {}
    shapes = _shapes(layout)
    for each in ladders_of(layout, choice, emptying):
        alike.setdefault((each.counts, shapes[each.name]), []).append(each)
    return tuple(
        WidthCell(tuple(each.name for each in ladders), count)
        for ladders in alike.values()
        for count in _counts(ladders[0])
    )


def _counts(each: Ladder) -> list[int]:
    found = {each.counts[0], *(each.nearest(share) for share in SHARES)}
    return sorted(found - {each.units})


def _shapes(layout: Layout) -> dict[str, object]:
    """Something to compare by: which products and weights a group lies on, and how."""
    structure, found = layout.structure, dict[str, object]()
    products: dict[UnitGroup, Counter[object]] = {group: Counter() for group in layout.groups}
    by_leaf = {group.leaf: group for group in layout.groups}
    for index, axes in structure.products:
        leaves = {leaf: None for axis in axes for leaf in axis.leaves()}
        for group in [by_leaf[leaf] for leaf in leaves if leaf in by_leaf]:
            expressions = tuple(expression(axis, group.leaf) for axis in axes)
            products[group][structure.network.nodes[index].op, expressions] += 1
    for group in layout.groups:
        shapes = Counter(
            (tuple(structure.network.weights[part.weight].shape.numpy()), part.position) for part in group.slices
        )
        found[group.name] = group.kind, frozenset(products[group].items()), frozenset(shapes.items())
    return found


def keep_at(layout: Layout, cell: WidthCell) -> Keep:
    """Return what to keep for a point: times do not depend on which units these are."""
    return {name: tuple(range(cell.count)) for name in cell.groups}


def table_of(
    layout: Layout, dense_ns: int, measured: Mapping[WidthCell, int], setting: Mapping[str, str | int]
) -> LatencyTable:
    """Make the table of a network from the times of its points."""
    costs = costs_of(layout)
    found: dict[str, dict[int, int]] = {}
    for cell, ns in measured.items():
        alone = {name: Steps((cell.count, layout.by_name[name].units), (0, 0)) for name in cell.groups}
        guess = TimeCost(LatencyTable(dense_ns, alone, "", {}), costs.macs)
        widths = costs.widths(keep_at(layout, cell))
        saved = (dense_ns - ns) / sum(guess.part(name, widths) for name in cell.groups)
        for name in cell.groups:
            found.setdefault(name, {})[cell.count] = round(saved)
    steps = {name: _steps(saved, layout.by_name[name].units) for name, saved in found.items()}
    return LatencyTable(dense_ns, steps, network_hash(layout.structure.network), setting)


def _steps(saved: Mapping[int, int], units: int) -> Steps:
    counts: Sequence[int] = sorted(saved)
    return Steps((*counts, units), (*(saved[count] for count in counts), 0))
