"""Which weights of a network were learned, by the operators that read them: matrices, kernels, biases and gains."""

from __future__ import annotations

from collections.abc import Mapping

from optin_deploy.network.graph import MOVING, Network, Node

MATRICES: Mapping[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "BatchNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
}
"""Operator -> inputs that are learned."""
VECTORS = ("Add", "Mul")
"""Operators that add a bias or multiply by a gain: a weight with one axis of more than one entry."""


def learned(network: Network) -> frozenset[str]:
    """Return the names of the learned weights.

    What is read elsewhere too is none of them, such as embeddings that are looked up and multiplied by.
    """
    found, others = set[str](), set[str]()
    for node in network.nodes:
        for place, value in enumerate(node.inputs):
            name = _stored(network, value)
            if name is not None and node.op not in MOVING:
                (found if _learns(network, node, place, name) else others).add(name)
    return frozenset(found - others)


def _learns(network: Network, node: Node, place: int, name: str) -> bool:
    weight = network.weights[name]
    if not weight.dtype.is_floating_point():
        return False
    if node.op in VECTORS:
        return sum(size > 1 for size in weight.shape.numpy()) == 1
    return place in MATRICES.get(node.op, ())


def _stored(network: Network, value: str) -> str | None:
    """The weight that a value holds the entries of."""
    while value not in network.weights:
        node = network.producer.get(value)
        if node is None or node.op not in MOVING:
            return None
        value = node.inputs[0]
    return value
