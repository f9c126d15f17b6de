"""Products whose weights can be solved for anew: a matrix, the way behind it, and the vector that is added there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Place
from optin_deploy.structure.branches import Way, own_bias, way_from
from optin_deploy.structure.linear import Linear, linear_of, without
from optin_deploy.structure.stored import GivenTensor, stored_at
from optin_deploy.structure.structure import Structure


@dataclass(frozen=True)
class Shift:
    """A vector that is added to what a product gives."""

    place: Place
    stored: GivenTensor
    value: str
    """Name of the sum, or of what it is added to where both are not apart."""
    factor: float = 1.0
    """Factor by which the vector is multiplied before."""


@dataclass(frozen=True)
class Solvable:
    """A product whose weight can be solved for anew."""

    linear: Linear
    way: Way
    shift: Shift | None


def solvable(structure: Structure, index: int, *, shared: bool = False) -> Solvable:
    """Return a node as a product with a matrix, and the vector that is added behind it.

    Args: shared: also where other places read the matrix.
    Raises: Unsupported: it is none; says why.
    """
    network = structure.network
    linear = linear_of(structure, network.nodes[index], shared=shared)
    way = way_from(structure, index)
    factors = [name for scale in way.scale for name in network.nodes[scale].inputs if name in network.fixed]
    uneven = any(math.prod(structure.shapes.shape(name) or ()) not in (1, linear.outputs) for name in factors)
    if uneven or without(linear.node) is not None:
        way = Way(own_bias(structure, network.nodes[index]), (), (), linear.gives, None, None)
    return Solvable(linear, way, _shift(structure, linear, way))


def _shift(structure: Structure, linear: Linear, way: Way) -> Shift | None:
    """The vector behind a product; None where there is none, or where its entries are not the outputs."""
    if way.bias is None or linear.node.op == "ConvTranspose":  # what is added before it adds up differently at borders
        return None
    index, place = way.bias
    node = structure.network.nodes[index]
    try:
        stored = stored_at(structure, node.inputs[place])
    except Unsupported:
        return None
    if math.prod(stored.shape) != linear.outputs:
        return None
    value = node.outputs[0] if index in (linear.node.index, *way.nodes) else way.value
    out = structure.axes[linear.gives][linear.outputs_axis]
    alike = any(tuple(axis.leaves()) == tuple(out.leaves()) for axis in structure.axes[value])
    own = not linear.seen or (index == linear.node.index)
    if not (own or alike):
        return None
    return Shift(way.bias, stored, value, node.get("beta", 1.0) if node.op in ("Gemm", "FusedGemm") else 1.0)
