"""Values that follow from weights and positions alone, and that several layers read: biases by distance, rotations.

If their axes were unified at every reader, all layers would have to keep the same heads. Each takes its own part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optin_deploy.network.graph import SIZES, Network, Node
from optin_deploy.network.operators import factors_of
from optin_deploy.network.shapes import Shapes

PICKS = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "GatherBlockQuantized": 1, "EmbedLayerNormalization": 0}
"""Operators that look something up, and where they read what to look up."""
REAL = (torch.int8, torch.uint8)
"""Types of whole numbers that stand for real ones."""


@dataclass(frozen=True)
class Positions:
    """Such values by name, weights aside."""

    all: frozenset[str]
    several: frozenset[str]
    """Those that more than one place reads: what lies along their axes is shared."""


def positions(network: Network, shapes: Shapes) -> Positions:
    """Find values that follow from weights and positions alone."""
    content, asked = _content(network, shapes)
    reads: dict[str, int] = {}
    for node in reversed(network.nodes):
        through = sum(reads.get(name, 0) for name in node.outputs)
        for name in node.inputs:
            if name in asked:
                reads[name] = reads.get(name, 0) + (1 if content.intersection(node.outputs) else through)
    return Positions(frozenset(asked), frozenset(name for name, count in reads.items() if count > 1))


def _content(network: Network, shapes: Shapes) -> tuple[set[str], set[str]]:
    """Names of values that follow from what is in the inputs, and of the others that nodes compute.

    Masks are inputs too, but only numbers: what matters is real inputs, and tables that are looked up by inputs.
    """

    def is_real(name: str) -> bool:
        tensor = shapes.tensors.get(name)
        return tensor is not None and (tensor.is_floating_point() or tensor.dtype in REAL)

    def projects(node: Node) -> bool:
        """Whether a layer's own weights make its values; a product over one entry only spreads them."""
        if not factors_of(node):
            return False
        return node.op != "MatMul" or not node.inputs or (shapes.shape(node.inputs[0]) or ())[-1:] != (1,)

    content = {port.name for port in network.inputs if is_real(port.name)}
    given = {port.name for port in network.inputs}
    others: set[str] = set()
    for node in network.nodes:
        if node.op in SIZES:
            continue
        picked = node.inputs[PICKS[node.op] :][:1] if node.op in PICKS else ()
        looked_up = bool(given.intersection(picked)) and any(map(is_real, node.inputs))
        if looked_up or projects(node) or content.intersection(node.inputs):
            content.update(node.outputs)
        else:
            others.update(node.outputs)
        if given.intersection(node.inputs):
            given.update(node.outputs)
    content.discard("")
    others.discard("")
    return content, others
