"""The copy of a graph while it is cut: constants, nodes put in, values that stand for others, sliced weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from optin_deploy.network.axes import Axis, kept, touched
from optin_deploy.network.tensors import stored_in
from optin_deploy.structure.structure import Structure


@dataclass
class Editor:
    """One graph that is being changed, and what is kept of it."""

    structure: Structure
    """What was found in the graph as it was."""
    model: ir.Model
    """The copy that is changed."""
    keep: Mapping[Axis, np.ndarray]
    """Kept units by leaf."""
    _made: dict[object, ir.Value] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """Nodes of the copy, in the order of the network's."""
        return list(self.model.graph)

    @cached_property
    def sizes(self) -> dict[Axis, int]:
        """How many units each leaf keeps."""
        return {leaf: len(units) for leaf, units in self.keep.items()}

    def value(self, name: str) -> ir.Value:
        """Return the value in the copy that a node of the network gives by this name."""
        copy = self.nodes[self.structure.network.producer[name].index]
        return next(value for value in copy.outputs if value.name == name)

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        """Put a small array into the graph, once for all that need it."""
        key = (hint, array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = stored_in(self.model.graph, ir.tensor(array), self.named(hint))
        return self._made[key]

    def before(
        self, copy: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """Insert a node before another; returns its output."""
        node = ir.node(op, inputs, attributes or {})
        node.outputs[0].name = self.named(f"{op.lower()}")
        self.model.graph.insert_before(copy, node)
        return node.outputs[0]

    def split(self, copy: ir.Node, axis: int, sizes: Sequence[int], *, by_input: bool) -> list[ir.Value]:
        """Split the first input of a node before it; sizes are an input, or an attribute as before opset 13."""
        listed = [self.constant(np.array(sizes, dtype=np.int64), "sizes")] if by_input else []
        attributes: dict[str, int | list[int]] = {"axis": axis} if by_input else {"axis": axis, "split": list(sizes)}
        node = ir.node("Split", [copy.inputs[0], *listed], attributes, num_outputs=len(sizes))
        for value in node.outputs:
            value.name = self.named("part")
        self.model.graph.insert_before(copy, node)
        return list(node.outputs)

    def renamed(self, copy: ir.Node, value: ir.Value, place: int = 0) -> None:
        """Let a value stand for an output of a node."""
        old = copy.outputs[place]
        if old.is_graph_output():
            name = old.name
            old.name = self.named("before")
            copy_of = ir.node("Identity", [value])
            copy_of.outputs[0].name = name
            copy_of.outputs[0].type, copy_of.outputs[0].shape = old.type, old.shape
            self.model.graph.insert_before(copy, copy_of)
            value = copy_of.outputs[0]
        old.replace_all_uses_with(value, replace_graph_outputs=True)

    def sliced(self, weight: str, axes: Sequence[Axis]) -> ir.Value:
        """Put a weight into the graph with what is kept along its axes; once for all that need the same."""
        indices = [kept(axis, self.keep) if touched(axis, self.keep) else None for axis in axes]
        key = (weight, *(None if index is None else index.tobytes() for index in indices))
        if key not in self._made:
            tensor = _sliced(self.structure.network.weights[weight], indices)
            self._made[key] = stored_in(self.model.graph, tensor, self.named(weight))
        return self._made[key]

    @cached_property
    def _taken(self) -> set[str]:
        network = self.structure.network
        names = {port.name for port in (*network.inputs, *network.outputs)} | set(network.weights)
        return names | {name for node in network.nodes for name in node.outputs}

    def named(self, hint: str) -> str:
        """Return a name that no value has."""
        number = 1
        while (name := f"{hint}.cut{number}" if number > 1 else f"{hint}.cut") in self._taken:
            number += 1
        self._taken.add(name)
        return name


def _sliced(tensor: ir.TensorProtocol, indices: Sequence[np.ndarray | None]) -> ir.TensorProtocol:
    """Return the entries of a stored tensor at some indices of each axis; they are read when they are asked for."""
    shape = [n if index is None else len(index) for n, index in zip(tensor.shape.numpy(), indices, strict=True)]

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, index in enumerate(indices):
            if index is not None and array.shape[axis] > 1:
                array = np.take(array, index, axis=axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(shape), name=tensor.name)
