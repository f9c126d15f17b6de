"""Nodes that run subgraphs: choices, loops and scans. They are run, but not followed: what they read stays whole."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from optin_deploy.network.graph import Node, captured, decoded
from optin_deploy.network.operators.row import Row, Unsupported, refuse, refused

ROUNDS = 100_000
"""A loop that takes more rounds is taken for one without an end."""
META = torch.device("meta")

NOT_FOLLOWED = "a subgraph is run as it is: what it reads and gives stays whole"
SEQUENCES = (
    "sequences of tensors cannot be run; export the model with tensors alone, "
    "such as one output for each entry, or a padded tensor"
)


class Body:
    """A subgraph made ready to run with the values around it."""

    def __init__(self, node: Node, graph: ir.Graph, around: Sequence[Tensor | None]) -> None:
        """Args: around: what all subgraphs of the node read from around them, in the order of `captured`."""
        from optin_deploy.network.operators import rows
        from optin_deploy.network.tensors import torch_tensor

        names = captured(graphs(node))
        self._around = {name: value for name, value in zip(names, around, strict=True) if value is not None}
        self._graph = graph
        # In a run where all real numbers are of double precision, those of the subgraph are too.
        self._double = any(value.dtype == torch.float64 for value in self._around.values())
        self._stored = {
            name: torch_tensor(value.const_value)
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        opsets = {"": node.opset}
        self._steps = []
        for index, inner in enumerate(graph):
            step = decoded(index, inner, opsets)
            if (step.domain, step.op) not in rows():
                raise Unsupported(f"the operator {step.domain or 'onnx'}.{step.op} inside of it is not known")
            self._steps.append((step, rows()[step.domain, step.op]))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Compute the outputs."""
        from optin_deploy.network.run import together

        double = self._double or any(value.dtype == torch.float64 for value in inputs)
        values = {**self._around, **{name: _typed(value, double) for name, value in self._stored.items()}}
        values.update({port.name or "": value for port, value in zip(self._graph.inputs, inputs, strict=True)})
        for step, row in self._steps:
            given = [values[name] if name else None for name in step.inputs]
            result = row.compute(step, *together(given, row.numbers))
            for name, value in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False):
                if name and value is not None:
                    values[name] = _typed(value, double)
        return [values[port.name or ""] for port in self._graph.outputs]


def _typed(value: Tensor, double: bool) -> Tensor:
    return value.double() if double and value.is_floating_point() else value


def graphs(node: Node) -> list[ir.Graph]:
    """Subgraphs of a node."""
    return [value for value in node.attributes.values() if isinstance(value, ir.Graph)]


def choose(node: Node, condition: Tensor, *around: Tensor | None) -> tuple[Tensor, ...]:
    """Run one of two subgraphs."""
    graph = node.attributes["then_branch" if bool(condition.reshape(())) else "else_branch"]
    return tuple(Body(node, graph, around)())


def loop(node: Node, most: Tensor | None, going: Tensor | None, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """Run a subgraph again and again, each time on what the last one gave.

    Raises: Unsupported: it does not end, or when it ends follows from real numbers in a run without them.
    """
    graph = node.attributes["body"]
    count = len(graph.inputs) - 2
    values = [_there(value) for value in rest[:count]]
    body = Body(node, graph, rest[count:])
    rounds = ROUNDS + 1 if most is None else min(int(most.reshape(())), ROUNDS + 1)
    going = torch.ones((), dtype=torch.bool) if going is None else going.reshape(())
    listed: list[list[Tensor]] = [[] for _ in graph.outputs[1 + count :]]
    for number in range(rounds):
        if going.device == META:
            raise Unsupported("when the loop ends follows from real numbers")
        if not going:
            break
        if number == ROUNDS:
            raise Unsupported(f"the loop takes more than {ROUNDS} rounds")
        going, *found = body(torch.tensor(number), going, *values)
        going = going.reshape(())
        values, shown = found[:count], found[count:]
        for entries, entry in zip(listed, shown, strict=True):
            entries.append(entry)
    return (
        *values,
        *(_stacked(entries, port) for entries, port in zip(listed, graph.outputs[1 + count :], strict=True)),
    )


def _there(value: Tensor | None) -> Tensor:
    if value is None:
        raise Unsupported("a loop on a value that is left out")
    return value


def _stacked(entries: Sequence[Tensor], port: ir.Value) -> Tensor:
    if entries:
        return torch.stack(list(entries))
    from optin_deploy.network.tensors import torch_dtype

    if port.shape is None or port.dtype is None or any(not isinstance(size, int) for size in port.shape):
        raise Unsupported("a loop of no rounds whose outputs have sizes that are not told")
    return torch.zeros((0, *port.shape.numpy()), dtype=torch_dtype(port.dtype))


def scan(node: Node, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Run a subgraph on slice after slice of some inputs, with a state that it hands on."""
    if node.opset < 9:
        raise Unsupported("Scan before opset 9")
    graph, slices = node.attributes["body"], node.attributes["num_scan_inputs"]
    states = len(graph.inputs) - slices
    outputs = len(graph.outputs) - states
    along, ways = _listed(node, "scan_input", slices)
    axes, orders = _listed(node, "scan_output", outputs)
    values = [_there(value) for value in inputs[:states]]
    sources = [_there(value) for value in inputs[states : len(graph.inputs)]]
    body = Body(node, graph, inputs[len(graph.inputs) :])
    listed: list[list[Tensor]] = [[] for _ in range(outputs)]
    length = sources[0].shape[along[0]]
    for number in range(length):
        cuts = [
            source.select(axis, length - 1 - number if way else number)
            for source, axis, way in zip(sources, along, ways, strict=True)
        ]
        found = body(*values, *cuts)
        values = found[:states]
        for entries, entry in zip(listed, found[states:], strict=True):
            entries.append(entry)
    if not length and outputs:
        raise Unsupported("Scan over nothing")
    shown = [
        torch.stack(entries[::-1] if order else entries, axis)
        for entries, axis, order in zip(listed, axes, orders, strict=True)
    ]
    return (*values, *shown)


def _listed(node: Node, kind: str, count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Axes and directions of what is scanned."""
    none = [0] * count
    return node.get(f"{kind}_axes", none), node.get(f"{kind}_directions", none)


ROWS = (
    Row("If", choose, refuse(NOT_FOLLOWED), numbers=(0,)),
    Row("Loop", loop, refuse(NOT_FOLLOWED), numbers=(0, 1)),
    Row("Scan", scan, refuse(NOT_FOLLOWED)),
    *(
        refused(name, "", SEQUENCES)
        for name in (
            "SequenceAt",
            "SequenceConstruct",
            "SequenceEmpty",
            "SequenceErase",
            "SequenceInsert",
            "SequenceLength",
            "SequenceMap",
            "SplitToSequence",
            "ConcatFromSequence",
        )
    ),
)
