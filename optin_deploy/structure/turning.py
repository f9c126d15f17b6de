"""Which widths of heads may be turned: both sides of one product, with nothing between that tells entries apart.

Queries and keys meet in a product that sums over the width of a head, and so do what attention brings and the
projection behind it. Whatever invertible matrix the one side is multiplied by, and the other by its inverse, the
network computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from optin_deploy.network.axes import Axis, units_along
from optin_deploy.network.graph import SIZES, Node
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Place
from optin_deploy.structure.branches import REARRANGING, weight_place
from optin_deploy.structure.groups import UnitGroup
from optin_deploy.structure.solvable import Solvable, solvable
from optin_deploy.structure.structure import Structure

KINDS = ("qk-width", "v-width")
"""Groups that may be turned."""
MOVING = (*REARRANGING, "Split", "Slice", "Gather", "Concat", "Expand")
"""Operators that leave the entries of a head's width as they are, where they give all of them."""
SCALING = {"Mul": (0, 1), "Div": (0,)}
"""Operators that may scale them alike, with the places of what is scaled."""


@dataclass(frozen=True, eq=False)
class WidthProduct:
    """A product that makes the entries of a width, or uses them."""

    product: Solvable
    entries: np.ndarray
    """Entries of the product's outputs if it makes them, else of its inputs: (heads, width, again); `again` runs over
    what shares a head, such as queries that use one key."""


@dataclass(frozen=True, eq=False)
class Turnable:
    """A width that may be turned."""

    group: UnitGroup
    makers: tuple[WidthProduct, ...]
    """What is multiplied by the matrix of each head."""
    others: tuple[WidthProduct, ...]
    """What is multiplied by its inverse."""
    used: bool
    """Whether the others use the entries, as the projection behind attention does; else they make them too."""


def turnables(structure: Structure, groups: Iterable[UnitGroup]) -> tuple[list[Turnable], dict[str, str]]:
    """Return those of some groups that may be turned, and why the others may not, by name."""
    found, skipped = list[Turnable](), dict[str, str]()
    for group in groups:
        try:
            found.append(turnable(structure, group))
        except Unsupported as err:
            skipped[group.name] = str(err)
    return found, skipped


def turnable(structure: Structure, group: UnitGroup) -> Turnable:
    """Return how a group may be turned.

    Raises: Unsupported: it may not; says why.
    """
    nodes = {site.node for site in group.sites}
    if group.kind not in KINDS or len(nodes) != 1:
        raise Unsupported("several products sum over its entries")
    node = structure.network.nodes[nodes.pop()]
    weight = weight_place(structure, node)
    live = [name for name in node.inputs if _holds(structure, name, group.leaf)]
    live = live if weight is None else [node.inputs[1 - weight]]
    found = [_Way(structure, group.leaf, node, name) for name in live]
    if weight is None and len(found) != 2:
        raise Unsupported("it is no product of two values")
    makers = [[solvable(structure, index) for index in way.makers] for way in found]
    if weight is None and (set(found[0].makers) & set(found[1].makers) or any(len(each) > 1 for each in makers)):
        raise Unsupported("several products make one side, or one makes both")
    biases = {product.shift.place for some in makers for product in some if product.shift is not None}
    if not {place for way in found for place in way.added} <= biases:
        raise Unsupported("something else than a bias is added")
    users = [solvable(structure, node.index)] if weight is not None else []
    _check(structure, [*(product for some in makers for product in some), *users])
    given = [[(each, structure.axes[each.linear.gives][each.linear.outputs_axis]) for each in some] for some in makers]
    used = [(each, structure.axes[each.linear.reads][each.linear.features]) for each in users]
    heads = _shared([axis for _, axis in (*(pair for some in given for pair in some), *used)], group.leaf)
    sides = [
        tuple(WidthProduct(each, _entries(axis, group.leaf, heads)) for each, axis in some) for some in (*given, used)
    ]
    return Turnable(group, sides[0], sides[1], weight is not None)


class _Way:
    """What a value with the entries comes from, back to the products with weights."""

    def __init__(self, structure: Structure, leaf: Axis, site: Node, value: str) -> None:
        network, passed, values = structure.network, {site.index}, set[str]()
        products = {index for index, _ in structure.products}
        self.makers: list[int] = []
        self.added: set[Place] = set()
        waiting = [value]
        while waiting:
            name = waiting.pop()
            if name in values:
                continue
            values.add(name)
            node = network.producer.get(name)
            if node is None or any(port.name == name for port in network.outputs):
                raise Unsupported("they are an input or an output")
            if node.index in products and weight_place(structure, node) is not None:
                self.makers.append(node.index)
                continue
            passed.add(node.index)
            held = [place for place, read in enumerate(node.inputs) if _holds(structure, read, leaf)]
            if not _passes(structure, node, name, held, leaf):
                raise Unsupported(f"{node.op} stands between")
            if node.op == "Add":
                self.added |= {(node.index, place) for place in range(len(node.inputs)) if place not in held}
            waiting += [node.inputs[place] for place in held]
        readers = {node.index for name in values for node, _ in network.consumers.get(name, ()) if node.op not in SIZES}
        if not readers <= passed:
            raise Unsupported("something else reads them")


def _holds(structure: Structure, name: str, leaf: Axis) -> bool:
    live = name in structure.axes and name not in structure.network.fixed
    return live and any(each is leaf for axis in structure.axes[name] for each in axis.leaves())


def _passes(structure: Structure, node: Node, value: str, held: Sequence[int], leaf: Axis) -> bool:
    """Whether a value that a node gives follows from what holds the entries in the same way for all of them."""
    out = structure.axes[value]
    at = next((position for position, axis in enumerate(out) if any(each is leaf for each in axis.leaves())), None)
    if at is None or not held:
        return False
    if node.op in MOVING:
        return node.op == "Concat" or held == [0]
    others = [node.inputs[place] for place in range(len(node.inputs)) if place not in held]
    if node.op == "Add":
        return all(name in structure.network.fixed for name in others)
    if node.op in SCALING:
        sizes = [structure.shapes.shape(name) or () for name in others]
        alike = all(len(size) < len(out) - at or size[at - len(out)] == 1 for size in sizes)
        return len(held) == 1 and held[0] in SCALING[node.op] and alike
    return node.op in ("MatMul", "FusedMatMul") and len(held) == 1


def _check(structure: Structure, products: Sequence[Solvable]) -> None:
    """Raises: Unsupported: a product cannot be multiplied by another matrix."""
    for product in products:
        linear = product.linear
        if structure.network.weights[linear.stored.name].dtype.bitwidth < 32:
            raise Unsupported("a weight is stored in 16 bits, which would round anew")
        if not linear.plain or linear.groups > 1 or not linear.seen:
            raise Unsupported("a product of another kind makes or uses them")
        if product.way.bias is not None and product.shift is None:
            raise Unsupported("the vector behind a product is not known by its entries")


def _shared(axes: Sequence[Axis], leaf: Axis) -> list[Axis]:
    """The leaves beside the width that all sides have: of heads, or of groups of them."""
    found = [[each for each in axis.leaves() if each is not leaf and each.size > 1] for axis in axes]
    return [each for each in dict.fromkeys(found[0]) if all(each in some for some in found)]


def _entries(axis: Axis, leaf: Axis, heads: Sequence[Axis]) -> np.ndarray:
    units = units_along(axis, leaf)
    where = np.flatnonzero(units >= 0)
    head = np.zeros(len(where), dtype=np.int64)
    for each in heads:
        head = head * each.size + units_along(axis, each)[where]
    order = np.lexsort((where, units[where], head))
    count = math.prod(each.size for each in heads)
    if len(where) % (count * leaf.size):
        raise Unsupported("its heads are not all of one width")
    return where[order].reshape(count, leaf.size, -1)
