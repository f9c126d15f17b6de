"""Which nodes need float32: where positions are counted, and where squares are summed.

A network that was trained in 16 bits does the same, by casts that leave no trace in a float32 graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from optin_deploy.network.graph import SIZES, Network, Node

ANGLES = ("Sin", "Cos")
SUMS = ("ReduceMean", "ReduceSum")
SQUARED_SUMS = ("ReduceSumSquare", "ReduceL2")
ON_THE_WAY = ("Add", "Max", "Clip", "Sqrt", "Reciprocal", "Pow", "Mul", "Div", "Cast", "Identity", "Unsqueeze")
"""Operators between a sum of squares and the division by its root: one input, and numbers."""


def exact_nodes(network: Network, real: Mapping[str, bool], wanted: Collection[str]) -> frozenset[int]:
    """Indices of the nodes that lose their meaning in 16 bits.

    Args:
        real: values by name that are known, and whether they are real numbers.
        wanted: values that some operator takes in no 16-bit type.
    """
    return frozenset(_counted(network, real, wanted) | _squares(network))


def _counted(network: Network, real: Mapping[str, bool], wanted: Collection[str]) -> set[int]:
    """Real numbers that follow from whole ones, and become angles, scales or whole numbers again.

    16 bits count to 2048 or to 256, and an angle of 1000 is wrong by a quarter.
    """
    counted: set[str] = set()
    for node in network.nodes:
        given = [name for name in node.inputs if real.get(name)]
        follows = counted.issuperset(name for name in given if name not in network.fixed)
        starts = not given or not counted.isdisjoint(given) or not network.fixed.isdisjoint(node.outputs)
        if follows and starts:
            counted.update(name for name in node.outputs if real.get(name))
    waiting = [name for name in wanted if name in counted]
    for node in network.nodes:
        if node.op in ANGLES:
            waiting.extend(name for name in node.outputs if name in counted)
        elif node.op not in SIZES and any(real.get(name) is False for name in node.outputs):
            waiting.extend(name for name in node.inputs if name in counted)
    found: set[int] = set()
    while waiting:
        node = network.producer[waiting.pop()]
        if node.index not in found:
            found.add(node.index)
            waiting.extend(name for name in node.inputs if name in counted)
    return found


def _squares(network: Network) -> set[int]:
    """Nodes from a square that is summed to the division by the root: in float16 256 squared is infinite."""
    found: set[int] = set()
    for node in network.nodes:
        square = network.producer.get(node.inputs[0]) if node.op in SUMS else None
        if node.op in SQUARED_SUMS or (square is not None and _is_square(network, square)):
            found.add(node.index)
            if square is not None:
                found.add(square.index)
            found |= _way(network, node)
    return found


def _is_square(network: Network, node: Node) -> bool:
    if node.op == "Mul":
        return node.inputs[0] == node.inputs[1]
    power = network.weights.get(node.inputs[1]) if node.op == "Pow" else None
    return power is not None and power.size == 1 and bool(np.all(power.numpy() == 2))


def _way(network: Network, start: Node) -> set[int]:
    """Nodes behind a sum that read nothing else but numbers, and the one that then divides or multiplies by it."""
    found: set[int] = set()
    waiting = [*start.outputs]
    while waiting:
        for node, _ in network.consumers.get(waiting.pop(), ()):
            if node.op not in ON_THE_WAY or node.index in found:
                continue
            found.add(node.index)
            others = [name for name in node.inputs[1:] if name and name not in network.fixed]
            alone = not others or (node.inputs[0] in network.fixed and len(others) == 1)
            if alone:
                waiting.extend(node.outputs)
    return found
