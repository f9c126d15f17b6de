"""What a network makes of nothing but its weights, whenever it runs, is computed once where a cut must know it.

Weights that a BatchNorm standardises: the mean and variance of an output channel's weights are those of all its inputs,
whatever is cut later. Such networks store their convolutions so: BiT (Kolesnikov et al., ECCV 2020), NFNet (Brock et
al., ICML 2021).

Numbers that are counted, such as those of heads, from which their slopes follow (ALiBi, Press et al., ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from optin_deploy.network.graph import Node, decoded
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Result, Row, Unsupported
from optin_deploy.network.tensors import stored_in, torch_tensor

FAILURES = (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError)
"""What rows raise that cannot compute a node, `Unsupported` too."""
MOST_ENTRIES, MOST_COUNTED = 2**28, 2**16
"""Entries of a value that is computed, and of numbers that are counted: more are left to a run."""
STARTS = {"BatchNormalization": "standardised_", "Range": "counted_"}
"""Operators with whose result it begins, and what stands before the name of the weight that it was made of."""


def compute_once(model: ir.Model) -> None:
    """Put weights in place of what starts so, and of what follows from that alone and is as large, in place."""
    graph, taken = model.graph, {value.name for value in model.graph.initializers.values()}
    fixed = _fixed(graph)
    starts = [node for node in graph if node.op_type in STARTS and node.outputs[0] in fixed]
    values = _Values(graph.opset_imports or model.opset_imports)
    for start in starts:
        value, source = start.outputs[0], start.inputs[0]
        while source is not None and (maker := source.producer()) is not None:
            source = maker.inputs[0]
        try:
            tensor = values.of(value, MOST_COUNTED if start.op_type == "Range" else MOST_ENTRIES)
        except FAILURES:
            continue  # a run will say why
        while (after := _only_reader(value)) in fixed and after is not None:
            found = values.as_large(after, tensor)
            if found is None:
                break
            value, tensor = after, found
        *path, last = ((source or value).name or "").split(".")
        name = ".".join([*path, STARTS[start.op_type] + last])
        while name in taken:
            name += "_"
        taken.add(name)
        held = ir.tensor_adapters.TorchTensor(tensor.contiguous(), name)
        ir.convenience.replace_all_uses_with(value, stored_in(graph, held, name), replace_graph_outputs=False)
    if starts:
        RemoveUnusedNodesPass()(model)


def _fixed(graph: ir.Graph) -> set[ir.Value | None]:
    """Values that follow from weights alone, by operators that are known."""
    fixed: set[ir.Value | None] = {value for value in graph.initializers.values() if value.const_value is not None}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if read and fixed.issuperset(read) and not node.op_type.startswith("Random"):
            fixed.update(node.outputs if (node.domain, node.op_type) in rows() else ())
    return fixed


def _only_reader(value: ir.Value) -> ir.Value | None:
    """What the one node gives that reads a value; None: several do, or it is an output."""
    readers = {node for node, _ in value.uses()}
    return None if len(readers) != 1 or value.is_graph_output() else readers.pop().outputs[0]


class _Values:
    """Computes values that follow from weights alone."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = opsets
        self._known: dict[ir.Value, Tensor] = {}

    def of(self, value: ir.Value, most: int = MOST_ENTRIES) -> Tensor:
        """Raises: one of `FAILURES`: it has more entries, or the row of an operator cannot compute it."""
        if value not in self._known:
            node, stored = value.producer(), value.const_value
            self._known[value] = self._computed(value, node, most) if stored is None or node else torch_tensor(stored)
        return self._known[value]

    def as_large(self, value: ir.Value, other: Tensor) -> Tensor | None:
        """A value, if it has as many entries as another one and can be computed."""
        try:
            found = self.of(value, other.numel())
        except FAILURES:
            return None
        return found if found.numel() == other.numel() else None

    def _computed(self, value: ir.Value, node: ir.Node | None, most: int) -> Tensor:
        if node is None:
            raise Unsupported(f"{value.name} is no weight")
        given = [None if each is None else self.of(each) for each in node.inputs]
        plain, x = decoded(0, node, self._opsets), given[0]
        if plain.op == "BatchNormalization" and plain.get("training_mode", 0) and x is not None:
            others = [axis for axis in range(x.dim()) if axis != 1]  # so does TorchScript's exporter write it
            given[3:] = [x.mean(others), x.var(others, correction=0)]
            plain = replace(plain, attributes={**plain.attributes, "training_mode": 0})
        row, place = rows()[node.domain, node.op_type], value.index() or 0
        if _entries(row, plain, given, place) > most:
            raise Unsupported(f"{plain} gives more than {most:,} entries")
        found = _output(row.compute(plain, *given), place)
        if found is None:
            raise Unsupported(f"{plain} gives nothing there")
        return found


def _output(made: Result, place: int) -> Tensor | None:
    return made[place] if isinstance(made, tuple) else made


def _entries(row: Row, node: Node, given: Sequence[Tensor | None], place: int) -> int:
    """How many entries an output has, found without computing it."""
    if node.op == "Range":
        start, limit, step = (float(each) for each in given if each is not None)
        return math.ceil((limit - start) / step)
    without = [x if x is None or at in row.numbers else x.to("meta") for at, x in enumerate(given)]
    found = _output(row.compute(node, *without), place)
    return 0 if found is None else found.numel()
