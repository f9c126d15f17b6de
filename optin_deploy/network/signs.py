"""Which values are never negative, as far as the operators before them tell."""

from __future__ import annotations

from optin_deploy.network.graph import MOVING, Network

ALWAYS = frozenset(
    ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs", "Sqrt", "ReduceL1", "ReduceL2")
)
"""Operators that give nothing negative."""
IF_FIRST = frozenset((*MOVING, "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMax"))
"""Operators that give nothing negative if their first input holds nothing negative."""
IF_ALL = frozenset(("Mul", "Add", "Max", "Concat"))
"""Operators that give nothing negative if none of their inputs holds something negative."""


def never_negative(network: Network, name: str) -> bool:
    """Whether a value holds nothing negative, whatever the inputs; False: that is not known."""
    waiting, seen = [name], {name}
    while waiting:
        node = network.producer.get(waiting.pop())
        if node is None or node.domain:
            return False
        if node.op in ALWAYS:
            continue
        if node.op not in IF_FIRST | IF_ALL:
            return False
        read = node.inputs[:1] if node.op in IF_FIRST else node.inputs
        waiting += [each for each in read if each not in seen]
        seen.update(read)
    return True
