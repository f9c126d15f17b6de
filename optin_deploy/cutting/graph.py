"""Cut a network: every weight keeps the entries of the units that stay, every number beside the weights follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.cutting.emptied import Emptied
from optin_deploy.network.axes import Axis, kept, product, size, touched
from optin_deploy.network.graph import Network, Node
from optin_deploy.structure.flow import Number, Structure
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.keep import checked


def cut(layout: Layout, keep: Mapping[str, Sequence[int]]) -> Network:
    """Return a smaller network; the given one is untouched, and weights that stay whole are shared with it.

    Args: keep: kept units by name of group; a group that is not named stays whole.
    Raises: BadInput: a group or unit is unknown, or a group cannot lose all of its units.
    """
    leaves = layout.leaves(checked(layout, keep))
    network = layout.structure.network
    if not leaves:
        return network
    model = network.model.clone()
    Cut(layout.structure, model, leaves).make()
    return Network(RemoveUnusedNodesPass()(model).model, network.source)


@dataclass
class Cut:
    """One cut, while it is made on a copy of the graph."""

    structure: Structure
    model: ir.Model
    keep: Mapping[Axis, np.ndarray]
    _made: dict[object, ir.Value] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """Nodes of the copy, in the order of the network's."""
        return list(self.model.graph)

    @cached_property
    def sizes(self) -> dict[Axis, int]:
        """How many units each leaf keeps."""
        return {leaf: len(units) for leaf, units in self.keep.items()}

    def make(self) -> None:
        """Change the copy."""
        network = self.structure.network
        emptied = Emptied(self)
        numbers: dict[int, dict[int | str, list[Number]]] = {}
        for number in self.structure.numbers:
            numbers.setdefault(number.node, {}).setdefault(number.where, []).append(number)
        for use in self.structure.uses:
            if any(touched(axis, self.keep) for axis in use.axes):
                self.nodes[use.node].replace_input_with(use.place, self._sliced(use.weight, use.axes))
        for node, copy in zip(network.nodes, self.nodes, strict=True):
            if emptied.settled(node, copy):
                continue
            for where, listed in numbers.get(node.index, {}).items():
                if any(touched(number.because, self.keep) for number in listed):
                    self._renumber(node, copy, where, listed)
            if node.op == "Shape":
                self._pin(node, copy)
        for tap in self.structure.taps:
            if touched(tap.axis, self.keep):
                self._pick(self.nodes[tap.node], tap.place, tap.position, tap.axis)
        for copy in self.model.graph:
            for value in copy.outputs:
                if not value.is_graph_output():
                    value.shape = None

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        """Put a small array into the graph, once for all that need it."""
        key = (hint, array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self._initializer(ir.tensor(array), hint)
        return self._made[key]

    def before(
        self, copy: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int] | None = None
    ) -> ir.Value:
        """Insert a node before another; returns its output."""
        node = ir.node(op, inputs, attributes or {})
        node.outputs[0].name = self._name(f"{op.lower()}")
        self.model.graph.insert_before(copy, node)
        return node.outputs[0]

    def split(self, copy: ir.Node, axis: int, sizes: Sequence[int], *, by_input: bool) -> list[ir.Value]:
        """Split the first input of a node before it; sizes are an input, or an attribute as before opset 13."""
        listed = [self.constant(np.array(sizes, dtype=np.int64), "sizes")] if by_input else []
        attributes: dict[str, int | list[int]] = {"axis": axis} if by_input else {"axis": axis, "split": list(sizes)}
        node = ir.node("Split", [copy.inputs[0], *listed], attributes, num_outputs=len(sizes))
        for value in node.outputs:
            value.name = self._name("part")
        self.model.graph.insert_before(copy, node)
        return list(node.outputs)

    def renamed(self, copy: ir.Node, value: ir.Value, place: int = 0) -> None:
        """Let a value stand for an output of a node."""
        old = copy.outputs[place]
        if old.is_graph_output():
            name = old.name
            old.name = self._name("before")
            copy_of = ir.node("Identity", [value])
            copy_of.outputs[0].name = name
            copy_of.outputs[0].type, copy_of.outputs[0].shape = old.type, old.shape
            self.model.graph.insert_before(copy, copy_of)
            value = copy_of.outputs[0]
        old.replace_all_uses_with(value, replace_graph_outputs=True)

    def _renumber(self, node: Node, copy: ir.Node, where: int | str, listed: Sequence[Number]) -> None:
        new = [size(number.axis, self.sizes) for number in listed]
        if isinstance(where, str):
            single = listed[0].entry is None
            copy.attributes[where] = ir.AttrInt64(where, new[0]) if single else ir.AttrInt64s(where, new)
            return
        name = node.inputs[where] if where < len(node.inputs) else ""
        if not name:
            copy.resize_inputs(max(where + 1, len(node.inputs)))
            copy.attributes.pop("num_outputs", None)
            copy.replace_input_with(where, self.constant(np.array(new, dtype=np.int64), "sizes"))
            return
        known = self.structure.shapes.known(name)
        assert known is not None, f"{node}: sizes that are not known were taken for numbers"
        touched_ = {
            number.entry: (number.axis, value)
            for number, value in zip(listed, new, strict=True)
            if number.entry is not None and touched(number.because, self.keep)
        }
        if name in self.structure.network.weights:
            flat = known.reshape(-1).copy()
            for entry, (_, value) in touched_.items():
                flat[entry] = value
            copy.replace_input_with(where, self.constant(flat.reshape(known.shape), "sizes"))
            return
        value_now = copy.inputs[where]
        assert value_now is not None
        copy.replace_input_with(where, self._corrected(copy, value_now, known.shape, touched_, (0, 1)))

    def _pin(self, node: Node, copy: ir.Node) -> None:
        """Let a Shape tell the sizes before the cut: numbers that are sizes were replaced, what is left are factors."""
        axes = self.structure.axes.get(node.inputs[0], [])
        span = slice(node.get("start", 0), node.get("end"))
        changed = {entry: (axis, axis.size) for entry, axis in enumerate(axes[span]) if touched(axis, self.keep)}
        if not changed:
            return
        users = tuple(copy.outputs[0].uses())
        behind = list(self.model.graph)[list(self.model.graph).index(copy) + 1]
        pinned = self._corrected(behind, copy.outputs[0], (len(axes[span]),), changed, (1, 0))
        for user, place in users:
            user.replace_input_with(place, pinned)

    def _corrected(
        self,
        copy: ir.Node,
        value: ir.Value,
        shape: tuple[int, ...],
        changed: Mapping[int, tuple[Axis, int]],
        order: tuple[int, int],
    ) -> ir.Value:
        """Change entries of computed sizes, before a node.

        Args:
            changed: entry -> its axis, and the size to put in; where only a part of the axis is cut, the rest may be
                a free size such as the batch, so that the entry is multiplied by the part after and divided by the
                part before.
            order: (0, 1), or (1, 0) for sizes after the cut that are to be those before.
        """
        sizes, flags = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        factors = np.ones((2, *shape), dtype=np.int64)
        for entry, (axis, new) in changed.items():
            parts = [part for part in axis.parts if touched(part, self.keep)] if axis.kind == "product" else []
            if parts and len(parts) < len(axis.parts):
                both = math.prod(part.size for part in parts), math.prod(size(part, self.sizes) for part in parts)
                factors.reshape(2, -1)[:, entry] = [both[place] for place in order]
            else:
                sizes.reshape(-1)[entry], flags.reshape(-1)[entry] = new, True
        if flags.any():
            changed_, new_sizes = self.constant(flags, "changed"), self.constant(sizes, "sizes")
            value = self.before(copy, "Where", [changed_, new_sizes, value])
        if (factors[0] != factors[1]).any():
            value = self.before(copy, "Mul", [value, self.constant(factors[1], "sizes")])
            value = self.before(copy, "Div", [value, self.constant(factors[0], "sizes")])
        return value

    def _sliced(self, weight: str, axes: Sequence[Axis]) -> ir.Value:
        indices = [kept(axis, self.keep) if touched(axis, self.keep) else None for axis in axes]
        key = (weight, *(None if index is None else index.tobytes() for index in indices))
        if key not in self._made:
            self._made[key] = self._initializer(sliced(self.structure.network.weights[weight], indices), weight)
        return self._made[key]

    def _pick(self, copy: ir.Node, place: int, position: int, axis: Axis) -> None:
        """Let a node read the kept entries alone of an axis of a value that others read too."""
        value = copy.inputs[place]
        whole = [not touched(part, self.keep) for part in axis.parts] if axis.kind == "product" else []
        first = whole.index(False) if True in whole[:1] else 0
        inner = product(axis.parts[first:]) if first else axis
        index = self.constant(kept(inner, self.keep), "kept")
        if first:  # the factors before may be free, such as the batch: each of their entries has the same kept ones
            step = self.constant(np.array(inner.size), "step")
            length = self.before(copy, "Gather", [self.before(copy, "Shape", [value]), self._at(position)], {"axis": 0})
            starts = self.before(copy, "Range", [self._at(0), length, step])
            column = self.before(copy, "Unsqueeze", [starts, self.constant(np.array([1]), "axes")])
            both = self.before(copy, "Add", [column, index])
            index = self.before(copy, "Reshape", [both, self.constant(np.array([-1]), "flat")])
        copy.replace_input_with(place, self.before(copy, "Gather", [value, index], {"axis": position}))

    def _at(self, number: int) -> ir.Value:
        return self.constant(np.array(number), "at")

    def _initializer(self, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        value = ir.Value(name=self._name(hint), type=ir.TensorType(tensor.dtype), const_value=tensor)
        value.shape = ir.Shape(tensor.shape.numpy())
        self.model.graph.register_initializer(value)
        return value

    @cached_property
    def _taken(self) -> set[str]:
        network = self.structure.network
        names = {port.name for port in (*network.inputs, *network.outputs)} | set(network.weights)
        return names | {name for node in network.nodes for name in node.outputs}

    def _name(self, hint: str) -> str:
        """Return a name that no value has."""
        number = 1
        while (name := f"{hint}.cut{number}" if number > 1 else f"{hint}.cut") in self._taken:
            number += 1
        self._taken.add(name)
        return name


def sliced(tensor: ir.TensorProtocol, indices: Sequence[np.ndarray | None]) -> ir.TensorProtocol:
    """Return the entries of a stored tensor at some indices of each axis; they are read when they are asked for."""
    shape = [n if index is None else len(index) for n, index in zip(tensor.shape.numpy(), indices, strict=True)]

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, index in enumerate(indices):
            if index is not None and array.shape[axis] > 1:
                array = np.take(array, index, axis=axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(shape), name=tensor.name)
