"""Which graph inputs are indices: they lead to a stored table, whose rows they must not exceed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from optin_deploy.network.graph import Network, Node

PASSING = frozenset(
    ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice", "Split", "Tile")
) | {"Concat", "Where", "Clip", "Max", "Min", "ScatterND", "Pad"}
"""Operators behind which indices are indices still."""
TABLES: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("", "Gather"): ((1, 0),),
    ("com.microsoft", "EmbedLayerNormalization"): ((0, 2), (1, 4), (8, 3)),
}
"""Operators that read a table: places of the indices and of the table."""


def table_rows(network: Network) -> dict[str, int]:
    """Rows of the smallest table that an input indexes, for the inputs that index any."""
    found = {}
    for port in network.inputs:
        rows = [count for count in _rows(network, port.name) if count]
        if rows and port.dtype.is_integer():
            found[port.name] = min(rows)
    return found


def _rows(network: Network, name: str) -> Iterator[int]:
    waiting, seen = [name], {name}
    while waiting:
        for node, place in network.consumers.get(waiting.pop(), ()):
            for indices, table in TABLES.get((node.domain, node.op), ()):
                if place == indices and table < len(node.inputs) and node.inputs[table] in network.fixed:
                    yield _size(network, node.inputs[table], node.get("axis", 0))
            if node.op in PASSING and _passes(node, place):
                waiting += [output for output in node.outputs if output and output not in seen]
                seen.update(node.outputs)


def _passes(node: Node, place: int) -> bool:
    """Do the values at this place come out again? A condition, a size and a bound do not."""
    return place > 0 if node.op == "Where" else node.op in ("Concat", "Max", "Min") or place == 0


def _size(network: Network, name: str, axis: object) -> int:
    """Size of an axis of a stored table, also of one that is stored with fewer bits; 0: not known."""
    while name not in network.weights:
        sources = network.producer[name].inputs if name in network.producer else ()
        if not sources:
            return 0
        name = sources[0]
    sizes = network.weights[name].shape.numpy()
    return sizes[axis] if isinstance(axis, int) and -len(sizes) <= axis < len(sizes) else 0
