"""Products whose weights can be solved for anew: a matrix, the way behind it, and the vector that is added there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import REAL_TYPES, Place
from optin_deploy.structure.branches import Way, way_from
from optin_deploy.structure.flow import Structure
from optin_deploy.structure.linear import Linear, linear_of
from optin_deploy.structure.stored import Stored, stored_at


@dataclass(frozen=True)
class Shift:
    """A vector that is added to what a product gives."""

    place: Place
    stored: Stored
    value: str
    """Name of the sum."""
    factor: float = 1.0
    """By which the vector is multiplied before."""


@dataclass(frozen=True)
class Solvable:
    """A product whose weight can be solved for anew."""

    linear: Linear
    way: Way
    shift: Shift | None


def solvable(structure: Structure, index: int) -> Solvable:
    """Return a node as a product with a matrix, and the vector that is added behind it.

    Raises: Unsupported: it is none; says why.
    """
    network = structure.network
    linear, way = linear_of(structure, network.nodes[index]), way_from(structure, index)
    factors = [name for scale in way.scale for name in network.nodes[scale].inputs if name in network.fixed]
    if any(math.prod(structure.shapes.shape(name) or ()) not in (1, linear.outputs) for name in factors):
        raise Unsupported("what it gives is multiplied by other numbers in other places")
    return Solvable(linear, way, _shift(structure, linear, way))


def _shift(structure: Structure, linear: Linear, way: Way) -> Shift | None:
    """The vector behind a product; None where there is none, or where its entries are not the outputs."""
    if way.bias is None:
        return None
    index, place = way.bias
    node = structure.network.nodes[index]
    try:
        stored = stored_at(structure, node.inputs[place])
    except Unsupported:
        if node.inputs[place] not in structure.network.weights:
            return None
        tensor = structure.network.weights[node.inputs[place]]  # read elsewhere too: this place gets a copy
        if int(tensor.dtype) not in REAL_TYPES:
            return None
        stored = Stored(node.inputs[place], tuple(tensor.shape.numpy()), ())
    if math.prod(stored.shape) != linear.outputs:
        return None
    value = way.value if way.add is not None and index == way.add[0] else node.outputs[0]
    out = structure.axes[linear.gives][linear.outputs_axis]
    alike = any(tuple(axis.leaves()) == tuple(out.leaves()) for axis in structure.axes[value])
    own = not linear.seen or (index == linear.node.index)
    if not (own or alike):
        return None
    return Shift(way.bias, stored, value, node.get("beta", 1.0) if node.op == "Gemm" else 1.0)
