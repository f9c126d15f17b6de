"""Unit groups: what is cut together, where it is masked, and which numbers speak of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import MOVING
from optin_deploy.network.operators import factors_of
from optin_deploy.network.operators.recurrent import RECURRENT
from optin_deploy.structure.structure import Contraction, Number, Structure


@dataclass(frozen=True)
class WeightSlice:
    """One axis of a weight, at one place that reads it, on which units of a group lie."""

    weight: str
    node: int
    place: int
    position: int
    axis: Axis
    """The whole axis; `network.axes.kept` maps kept units to its entries."""


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are cut together, everywhere they lie."""

    name: str
    """Name for people and plans; unique in a layout."""
    kind: str
    """One of `structure.labels.KINDS`."""
    units: int
    leaf: Axis
    slices: tuple[WeightSlice, ...]
    sites: tuple[Contraction, ...]
    """Places of masks: inputs of the contractions that consume the units."""
    numbers: tuple[Number, ...]
    depth: int
    """Place of the first site in the order of work."""

    @property
    def width(self) -> int:
        """Entries of the first site's axis for each unit, such as the width of a head."""
        return self.sites[0].axis.size // self.units


@dataclass(frozen=True)
class Frozen:
    """Units that stay whole, though weights hold them and a contraction consumes them; or what is not understood."""

    weights: tuple[str, ...]
    """Weights that hold them; none where an operator is not understood."""
    units: int
    """0 where an operator is not understood."""
    why: str
    """The reason, behind the name of an operator that is not understood."""


@dataclass(frozen=True, eq=False)
class Layout:
    """All groups of a network, in the order of work."""

    structure: Structure
    groups: tuple[UnitGroup, ...]
    frozen: tuple[Frozen, ...]

    def __repr__(self) -> str:
        """Tell what can be cut in one line; the fields hold the whole network."""
        units: Counter[str] = Counter()
        for group in self.groups:
            units[group.kind] += group.units
        found = ", ".join(f"{count:,} {kind}" for kind, count in units.items()) or "nothing to cut"
        return f"<Layout of {self.structure.network.source}: {found} in {len(self.groups)} groups>"

    @cached_property
    def by_name(self) -> Mapping[str, UnitGroup]:
        """Groups by name."""
        return {group.name: group for group in self.groups}

    @property
    def units(self) -> dict[str, int]:
        """How many units each group has, by name."""
        return {group.name: group.units for group in self.groups}

    def leaves(self, keep: Mapping[str, Sequence[int]]) -> dict[Axis, np.ndarray]:
        """Kept units by leaf, for groups that lose some; the others are left out."""
        found = {}
        for name, units in keep.items():
            group = self.by_name[name]
            if len(units) < group.units:
                found[group.leaf] = np.asarray(sorted(units), dtype=np.int64)
        return found


def leaf_slices(structure: Structure) -> dict[Axis, list[WeightSlice]]:
    """Slices of weights by leaf, for each leaf of more than one unit."""
    found: dict[Axis, list[WeightSlice]] = {}
    for use in structure.uses:
        for position, axis in enumerate(use.axes):
            for leaf in axis.leaves():
                if leaf.size > 1:
                    found.setdefault(leaf, []).append(WeightSlice(use.weight, use.node, use.place, position, axis))
    return found


def by_leaf(items: Iterable[Contraction] | Iterable[Number]) -> dict[Axis, list]:  # type: ignore[type-arg]
    """Items by the leaves of their axis, each item once a leaf."""
    found: dict[Axis, list] = {}  # type: ignore[type-arg]
    for item in items:
        for leaf in dict.fromkeys(item.axis.leaves()):
            found.setdefault(leaf, []).append(item)
    return found


def _given(structure: Structure) -> set[str]:
    """Values of which no weight is a part, but single numbers and sizes: the inputs and what follows from them."""
    network, tensors = structure.network, structure.shapes.tensors
    found = {port.name for port in network.inputs}
    for node in network.nodes:
        read = [name for name in node.inputs if name]
        others = [tensors.get(name) if name in network.fixed else None for name in read if name not in found]
        if len(others) < len(read) and all(
            one is not None and (one.numel() == 1 or not one.is_floating_point()) for one in others
        ):
            found.update(node.outputs)
    return found


def _experts(structure: Structure) -> set[str]:
    """Values that are matrices of a stored stack, picked for each token: those of the experts that it is sent to."""
    network, found = structure.network, set[str]()
    for node in network.nodes:
        read = next(iter(node.inputs), "")  # damaged files hold nodes that read nothing
        picked = node.op in ("Gather", "GatherND") and read in network.fixed
        if (picked and len(structure.axes.get(read, ())) > 2) or (node.op in MOVING and read in found):
            found.update(node.outputs)
    return found


def _read_alike(structure: Structure, factors: Sequence[str], out: str) -> list[Axis]:
    """Leaves along which many matrices are multiplied with one and the same: queries' heads that share keys."""
    one, other, result = (structure.axes[name] for name in (*factors, out))
    return [
        leaf
        for place in range(3, 1 + min(len(one), len(other), len(result)))
        if min(one[-place].size, other[-place].size) == 1 < result[-place].size
        for leaf in result[-place].leaves()
        if not leaf.frozen
    ]


def kinds(structure: Structure) -> dict[Axis, str]:
    """Labels of leaves, by where they stand in products of two activations, and whether convolutions read them."""
    network, fixed = structure.network, structure.network.fixed
    found: dict[Axis, str] = {}

    def note(leaves: Iterable[Axis], kind: str) -> None:
        for leaf in leaves:
            found.setdefault(leaf, kind)

    def note_heads(leaves: Sequence[Axis]) -> None:
        note(leaves[:1], "heads" if len(leaves) == 1 else "groups")
        note(leaves[1:], "queries")

    for axis, kind in structure.labels:
        if kind == "heads":
            note_heads([leaf for leaf in axis.leaves() if leaf.size > 1])
        note(axis.leaves(), kind)
    compared, joined, given, weights = [], [], _given(structure), fixed | _experts(structure)
    for index, _ in structure.products:
        node = network.nodes[index]
        factors = [node.inputs[place] for place in factors_of(node)]
        if (
            not factors
            or "Conv" in node.op
            or node.op in RECURRENT
            or any(name not in structure.axes for name in (*factors, node.outputs[0]))
        ):
            continue
        one, other, out = (
            {leaf: None for axis in structure.axes[name] for leaf in axis.leaves()}
            for name in (*factors, node.outputs[0])
        )
        both = [leaf for leaf in one if leaf in other]
        batch = [leaf for leaf in both if leaf in out and not leaf.frozen]
        if not batch and weights.intersection(factors):
            continue  # a projection, or one that learned positions take part in
        if not batch and given.intersection(factors):
            continue  # over the neighbours of a graph, which an input tells
        note_heads(batch or _read_alike(structure, factors, node.outputs[0]))
        compared += [leaf for leaf in both if leaf not in out]
        joined += [leaf for leaf in other if leaf not in one and leaf in out]
    note(compared, "qk-width")
    note(joined, "v-width")  # after all others: so stands also the result of a weight that is sliced while it runs
    filters = (use.axes for use in structure.uses if "Conv" in network.nodes[use.node].op)
    made = (structure.axes.get(node.inputs[1], ()) for node in network.nodes if "Conv" in node.op)  # from fewer bits
    for axes in chain(filters, made):
        if len(axes) > 2 and axes[1].size > 1:  # not depthwise
            note((leaf for axis in axes[:2] for leaf in axis.leaves()), "channels")
    for contraction in structure.contractions:
        free = [leaf for leaf in contraction.axis.leaves() if not leaf.frozen]
        if contraction.axis.kind == "product" and len(free) == 2:  # attention that multiplies entry by entry
            note(free[:1], "heads")
            note(free[1:], "v-width")
    return found
