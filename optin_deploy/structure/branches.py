"""Branches: the ways from the products that use a group's units to the residual Adds that their results flow into.

There a cut can be made up for: the projection out of a branch, and its bias, can be solved again against what is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from optin_deploy.network.graph import MOVING, SIZES, Node
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Place
from optin_deploy.structure.groups import Layout, UnitGroup
from optin_deploy.structure.stored import stored_at
from optin_deploy.structure.structure import Contraction, Structure

REARRANGING = (*MOVING, "Dropout")
"""Operators that compute nothing; their other inputs are sizes."""
SCALING = {"Mul": (0, 1), "Div": (0,), "BatchNormalization": (0,)}
"""Operators that multiply by fixed vectors, with the places of what they multiply."""
SKIPS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Operators of ONNX Runtime that add their first two inputs, with the place of a bias."""
BIASED = ("BiasGelu", "FastGelu", "BiasSplitGelu")
"""Operators of ONNX Runtime that add their second input and apply an activation."""


@dataclass(frozen=True)
class Way:
    """The way of a product's result as long as it is affine, at most to a residual Add."""

    bias: Place | None
    """Node and place of the vector that is added, the first if there are several; the shift of a BatchNorm is one."""
    scale: tuple[int, ...]
    """Nodes that multiply by fixed vectors."""
    nodes: tuple[int, ...]
    """All nodes on it, in the order of work, without the product and the Add."""
    value: str
    """What comes out at its end; what arrives at the Add."""
    add: Place | None
    """The residual Add and the place where the way arrives; None: it ends before."""
    residual: str | None
    """The value that is added there."""


def branches(structure: Structure, group: UnitGroup) -> tuple[Way | None, ...]:
    """Return the way behind each site of a group, affine to a residual Add; None where none leads to one."""
    return tuple(_branch(structure, site) for site in group.sites)


def weight_place(structure: Structure, node: Node) -> int | None:
    """Return the place of the factor of a product that follows from weights alone; None if both are activations, or
    none is."""
    fixed = [name in structure.network.fixed for name in node.inputs[:2]]
    return fixed.index(True) if len(set(fixed)) == 2 else None


def _branch(structure: Structure, site: Contraction) -> Way | None:
    if not site.with_weight or weight_place(structure, structure.network.nodes[site.node]) is None:
        return None
    found = way_from(structure, site.node)
    return None if found.add is None else found


def way_from(structure: Structure, index: int) -> Way:
    """Follow what a product gives for as long as it is only scaled by fixed vectors, shifted and moved around."""
    node = structure.network.nodes[index]
    bias = own_bias(structure, node)
    scale: list[int] = []
    way: list[int] = []
    value = node.outputs[0]
    while (step := _next(structure, value)) is not None:
        after, place, passed = step
        others = [name for at, name in enumerate(after.inputs) if at != place and name]
        if after.op in SKIPS and place < 2:
            own = SKIPS[after.op]
            if bias is None and len(after.inputs) > own and after.inputs[own]:
                bias = (after.index, own)
            return Way(bias, tuple(scale), tuple(way), value, (after.index, place), after.inputs[1 - place])
        live = [name for name in others if name not in structure.network.fixed]
        if after.op in BIASED and place == 0 and others and not live:
            return Way(bias or (after.index, 1), tuple(scale), tuple(way), value, None, None)
        if after.op == "Add" and live:
            if structure.shapes.shape(live[0]) == structure.shapes.shape(value):
                return Way(bias, tuple(scale), tuple(way), value, (after.index, place), live[0])
            break
        if after.op == "Add":
            bias = bias or ((after.index, 1 - place) if _is_vector(structure, others[0]) else None)
        elif place in SCALING.get(after.op, ()) and not live:
            scale.append(after.index)
            if after.op == "BatchNormalization":
                bias = bias or (after.index, 2)
        elif not passed and not (after.op in REARRANGING and place == 0):
            break
        way += [*passed, after.index]
        value = after.outputs[0]
    return Way(bias, tuple(scale), tuple(way), value, None, None)


def own_bias(structure: Structure, node: Node) -> Place | None:
    """Place at which a product itself adds a vector of the file; None if it adds none, or a computed one, such as
    zeros."""
    if len(node.inputs) < 3 or not node.inputs[2]:
        return None
    try:
        stored_at(structure, node.inputs[2])
    except Unsupported:
        return None
    return node.index, 2


def _next(structure: Structure, value: str) -> tuple[Node, int, tuple[int, ...]] | None:
    """The one node that reads a value, at which place, and nodes between them that only move entries around.

    A rotation is several Slices of a value that a Concat joins again.
    """
    network = structure.network
    readers = [(node, place) for node, place in network.consumers.get(value, ()) if node.op not in SIZES]
    if any(port.name == value for port in network.outputs):
        return None
    if len(readers) == 1:
        return *readers[0], ()
    if not readers or any(node.op != "Slice" or place for node, place in readers):
        return None
    joined = [network.consumers.get(node.outputs[0], ()) for node, _ in readers]
    ends = {node.index for each in joined for node, _ in each}
    if len(ends) > 1 or any(len(each) != 1 for each in joined):
        return None
    concat = joined[0][0][0]
    entries = math.prod(structure.shapes.shape(concat.outputs[0]) or (0,))
    whole = concat.op == "Concat" and len(concat.inputs) == len(readers)
    if not whole or entries != math.prod(structure.shapes.shape(value) or (1,)):
        return None
    return concat, joined[0][0][1], tuple(node.index for node, _ in readers)


def _is_vector(structure: Structure, name: str) -> bool:
    return sum(size > 1 for size in structure.shapes.shape(name) or (2, 2)) < 2


def bypassed(layout: Layout) -> frozenset[str]:
    """Return the names of the groups that a residual stream goes around: they may lose all of their units.

    A network without any unit of another group, such as the channels of a stage, computes nothing from there on.
    """
    return frozenset(group.name for group in layout.groups if all(branches(layout.structure, group)))
