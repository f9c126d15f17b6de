"""Stored tensors, and how each comes to what reads it: by views, through which changes are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.network.graph import MOVING, SIZES, Network, Node
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import REAL_TYPES, Place
from optin_deploy.network.tensors import torch_dtype
from optin_deploy.structure.structure import Structure


@dataclass(frozen=True)
class GivenTensor:
    """A tensor of the file, and how it comes to a node that reads it."""

    name: str
    shape: tuple[int, ...]
    steps: tuple[Callable[[Tensor], Tensor], ...]
    """Views, from the stored tensor on."""
    places: frozenset[Place] = frozenset()
    """All places that read its entries, one or several."""

    def used(self, tensor: Tensor) -> Tensor:
        """View a tensor that is stored so as it is used."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor


def stored_at(structure: Structure, name: str) -> GivenTensor:
    """Return the stored tensor that a value is.

    Raises: Unsupported: it is computed, or is not stored as real numbers of 16 bits or more.
    """
    network, nodes = structure.network, []
    while name not in network.weights:
        node = network.producer[name]
        if node.op not in MOVING:
            few = " is stored in fewer than 16 bits and" if node.op == "DequantizeLinear" else ""
            raise Unsupported(f"its weight{few} comes out of {node.op}")
        nodes.append(node)
        name = node.inputs[0]
    tensor = network.weights[name]
    if int(tensor.dtype) not in REAL_TYPES:
        raise Unsupported(f"its weight is stored as {tensor.dtype.name}")
    views = tuple(_view(structure, node) for node in reversed(nodes))
    found = GivenTensor(name, tuple(tensor.shape.numpy()), views, frozenset(_places(network, name)))
    try:
        found.used(torch.empty(found.shape, dtype=torch_dtype(tensor.dtype), device="meta"))
    except RuntimeError as err:  # a Reshape behind a Transpose
        raise Unsupported("its weight is rearranged on the way") from err
    return found


def _places(network: Network, name: str) -> Iterator[Place]:
    """Places at which the entries of a stored tensor are finally read."""
    for node, place in network.consumers.get(name, ()):
        if node.op in MOVING and place == 0:
            yield from _places(network, node.outputs[0])
        elif node.op not in SIZES:
            yield node.index, place


def _view(structure: Structure, node: Node) -> Callable[[Tensor], Tensor]:
    if node.op == "Transpose":
        order = node.get("perm")
        return lambda tensor: tensor.permute(order or tuple(reversed(range(tensor.dim()))))
    shape = structure.shapes.shape(node.outputs[0])
    return lambda tensor: tensor if shape is None or tensor.shape == shape else tensor.view(shape)
