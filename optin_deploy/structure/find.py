"""Find the unit groups of any network by the algebra of its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, freeze
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.shapes import Shapes, shapes_of
from optin_deploy.structure.flow import walk
from optin_deploy.structure.groups import Frozen, Layout, UnitGroup, WeightSlice, by_leaf, kinds, leaf_slices
from optin_deploy.structure.names import group_names
from optin_deploy.structure.structure import Structure

Signature = tuple[int, frozenset[tuple[str, int, int, int, str]]]


@uncollected()
def find(network: Network, probes: Sequence[Mapping[str, Tensor]] | None = None) -> Layout:
    """Find what can be cut.

    Args: probes: inputs of two sizes; what is a unit group with one and not with the other stays whole.
    """
    if probes is None:
        from optin_deploy.network.probe import probes_of

        probes = probes_of(network)
    structure, *others = [walk(network, all_shapes(network, feeds)) for feeds in probes]
    for other in others:
        confirm(structure, other)
    return layout_of(structure)


def all_shapes(network: Network, feeds: Mapping[str, Tensor]) -> Shapes:
    """Find shapes without computing, or with, where they follow from real numbers."""
    found = shapes_of(network, feeds)
    if not found.problems:
        return found
    computed = shapes_of(network, feeds, compute=True)
    return computed if len(computed.problems) < len(found.problems) else found


def confirm(structure: Structure, other: Structure) -> None:
    """Freeze what another probe sees differently."""
    seen = set(signatures(other).values())
    for leaf, signature in signatures(structure).items():
        if signature not in seen and not leaf.frozen:
            freeze([leaf], "it looks different for inputs of other sizes")


def signatures(structure: Structure) -> dict[Axis, Signature]:
    """Leaves that are not frozen, each with all that is known of where it lies."""
    return {
        leaf: (
            leaf.size,
            frozenset((s.weight, s.node, s.place, s.position, expression(s.axis, leaf)) for s in slices),
        )
        for leaf, slices in leaf_slices(structure).items()
        if not leaf.frozen
    }


def carried(layout: Layout, structure: Structure) -> Layout:
    """Return the groups of a layout as they lie in another structure that holds the same weights.

    Only names, units and leaves are those of the other: enough to count what plans cost.
    Raises: BadInput: a group is not there.
    """
    leaves = {_lies(slices, leaf): leaf for leaf, slices in leaf_slices(structure).items()}
    found, groups = leaf_slices(layout.structure), []
    for group in layout.groups:
        leaf = leaves.get(_lies(found[group.leaf.root], group.leaf))
        if leaf is None:
            raise BadInput(f"{structure.network.source}: the group {group.name!r} cannot be found again in it.")
        groups.append(replace(group, leaf=leaf))
    return Layout(structure, tuple(groups), ())


def _lies(slices: Sequence[WeightSlice], leaf: Axis) -> frozenset[tuple[str, int, str]]:
    return frozenset((each.weight, each.position, expression(each.axis, leaf)) for each in slices)


def expression(axis: Axis, leaf: Axis) -> str:
    """Write an axis down, with one of its leaves marked."""
    axis = axis.root
    if axis.kind == "leaf":
        return "@" if axis is leaf else str(axis.size)
    sign = "*" if axis.kind == "product" else "+"
    return "(" + sign.join(expression(part, leaf) for part in axis.parts) + ")"


def layout_of(structure: Structure) -> Layout:
    """Gather the groups of a structure, and tell what is frozen and why."""
    sites, numbers = by_leaf(structure.contractions), by_leaf(structure.numbers)
    labels = kinds(structure)
    groups: list[UnitGroup] = []
    frozen: list[Frozen] = []
    for leaf, slices in leaf_slices(structure).items():
        if leaf not in sites:
            continue
        if leaf.frozen:
            frozen.append(Frozen(tuple(dict.fromkeys(s.weight for s in slices)), leaf.size, leaf.frozen))
            continue
        groups.append(
            UnitGroup(
                name="",
                kind=labels.get(leaf, "neurons"),
                units=leaf.size,
                leaf=leaf,
                slices=tuple(slices),
                sites=tuple(sites[leaf]),
                numbers=tuple(numbers.get(leaf, ())),
                depth=min(site.node for site in sites[leaf]),
            )
        )
    groups.sort(key=lambda group: group.depth)
    names = group_names(structure, groups)
    named = tuple(replace(group, name=name) for group, name in zip(groups, names, strict=True))
    frozen += [Frozen((), 0, f"{op}: {why}") for (op, why), _ in structure.not_understood.most_common()]
    return Layout(structure, named, tuple(frozen))
