"""A network is an ONNX graph with its weights: nodes in the order of their work, weights by name, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

SIZES = ("Shape", "Size")
"""Operators that read no entry of what they are given, only how many there are."""
MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast")
"""Operators that pass the entries of their first input on; their other inputs are sizes."""


@dataclass(frozen=True)
class Node:
    """One operator call, decoded once.

    Its inputs and outputs are names of values; an empty name is an input that was left out, or an output that nobody
    reads.
    """

    index: int
    """Place in the order of work, from 0."""
    name: str
    """Name in the file; it may be empty or occur twice."""
    op: str
    """Operator, such as `MatMul`."""
    domain: str
    """Empty for ONNX's own operators."""
    opset: int
    """Version of the operator set that the file asks for in this domain."""
    attributes: Mapping[str, Any]
    """Python numbers, texts, tuples of them, `ir.TensorProtocol` or `ir.Graph`."""
    inputs: tuple[str, ...]
    """Names of values. A node with subgraphs has an input for each of theirs that comes from outside, first those that
    are handed to it, then those that the subgraphs read from around it (see `captured`)."""
    outputs: tuple[str, ...]

    def get(self, attribute: str, default: Any = None) -> Any:
        """Value of an attribute, or the default where the file leaves it out."""
        return self.attributes.get(attribute, default)

    def __str__(self) -> str:
        """Operator and name, as messages call it."""
        return f"{self.op} {self.name or ''.join(self.outputs[:1])}".strip()


@dataclass(frozen=True)
class Port:
    """An input or an output of the whole graph."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...] | None
    """Numbers are fixed, names are free; None: the file does not tell the rank."""


@dataclass(frozen=True, eq=False)
class Network:
    """A graph in its normal form, which the readers of this room make.

    Functions are inlined, constants are initializers, nodes are in the order of their work, every value has a name of
    its own, and initializers are no inputs. What is computed from it never changes it: cutting returns another one.
    """

    model: ir.Model
    source: str
    """Origin of the network, for messages and records: a path, or the class of the module."""

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node of the main graph, in the order of work."""
        opsets = self.model.graph.opset_imports or self.model.opset_imports
        return tuple(decoded(index, node, opsets) for index, node in enumerate(self.model.graph))

    @cached_property
    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """Stored tensors by name; they are read when they are asked for."""
        return {
            name: value.const_value
            for name, value in self.model.graph.initializers.items()
            if value.const_value is not None
        }

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """What a caller feeds."""
        return tuple(_port(value) for value in self.model.graph.inputs)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """What a caller gets."""
        return tuple(_port(value) for value in self.model.graph.outputs)

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that computes a value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[tuple[Node, int], ...]]:
        """The nodes that read a value, each with the place of its input; graph outputs are not among them."""
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for place, name in enumerate(node.inputs):
                if name:
                    found.setdefault(name, []).append((node, place))
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Names of weights, and of values that are computed from weights alone."""
        fixed = set(self.weights)
        for node in self.nodes:
            if all(name in fixed or not name for name in node.inputs) and not node.op.startswith("Random"):
                fixed.update(name for name in node.outputs if name)
        return frozenset(fixed)


def decoded(index: int, node: ir.Node, opsets: Mapping[str, int]) -> Node:
    """Decode a node of any graph.

    Args:
        index: its place in the order of work.
        node: as onnx_ir holds it.
        opsets: versions of the operator sets by domain.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    attributes = {name: _value(attribute) for name, attribute in node.attributes.items()}
    inputs = [value.name or "" if value is not None else "" for value in node.inputs]
    graphs = [value for value in attributes.values() if isinstance(value, ir.Graph)]
    if graphs:
        inputs += [""] * (max(len(graph.inputs) for graph in graphs) - len(inputs))
        inputs += captured(graphs)
    return Node(
        index=index,
        name=node.name or "",
        op=node.op_type,
        domain=domain,
        opset=opsets.get(domain, 1),
        attributes=attributes,
        inputs=tuple(inputs),
        outputs=tuple(value.name or "" for value in node.outputs),
    )


def captured(graphs: Iterable[ir.Graph]) -> list[str]:
    """Names of values that subgraphs read from around them, each once, in the order of their use."""
    found: dict[str, None] = {}
    for graph in graphs:
        own = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        own.update(value.name for node in graph for value in node.outputs)
        for node in graph:
            read = [value.name for value in node.inputs if value is not None]
            inner = [value.value for value in node.attributes.values() if isinstance(value.value, ir.Graph)]
            found.update({name: None for name in (*read, *captured(inner)) if name and name not in own})
        found.update({value.name: None for value in graph.outputs if value.name and value.name not in own})
    return list(found)


def _value(attribute: ir.Attr) -> Any:
    """A Python value; real numbers in float32, as files store them: so a network is the same once it is written."""
    value = attribute.value
    if attribute.type == ir.AttributeType.FLOAT:
        return float(np.float32(value))
    if attribute.type == ir.AttributeType.FLOATS:
        return tuple(float(np.float32(each)) for each in value)
    return tuple(value) if isinstance(value, list) else value


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(size if isinstance(size, int) else str(size.value or "?") for size in value.shape)
    return Port(value.name or "", value.dtype or ir.DataType.UNDEFINED, shape)
