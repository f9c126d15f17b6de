"""What becomes of a network where a group lost all of its units: no tensor without entries stays in the graph.

A contraction over nothing is zero, so what is left of it is its bias: one entry along every axis where it is constant.
Such a thin value passes through element-wise operators, which mostly add it to one that is full; every other reader
gets it repeated to its whole shape. What is joined with nothing stays as it is, and what only nothing reads goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from optin_deploy.cutting.dimensions import Dimensions, Size
from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.remainders import CONTRACTIONS, bias_of, remainder
from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, size, touched
from optin_deploy.network.graph import Node
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.elementwise import aligned, same
from optin_deploy.network.operators.normalizations import per_channel
from optin_deploy.structure.structure import Structure

ONE_WAY = ("PRelu",)
"""Element-wise operators whose first input must have the shape of the result."""


def empty_values(structure: Structure, sizes: Mapping[Axis, int]) -> frozenset[str]:
    """Return the names of values that have no entries when leaves have these sizes."""
    if all(sizes.values()):
        return frozenset()
    return frozenset(
        name
        for name, axes in structure.axes.items()
        if any(touched(axis, sizes) and size(axis, sizes) == 0 for axis in axes)
    )


class Emptied:
    """What a cut does at nodes that read or give values without entries, and at those behind them."""

    def __init__(self, cut: Editor) -> None:
        self._cut, self._structure, self._network = cut, cut.structure, cut.structure.network
        self._empty = empty_values(cut.structure, cut.sizes)
        self._dimensions = Dimensions(cut, self._left, lambda name: self._network.producer[name].index in self._alive)
        self._thin: dict[str, frozenset[int]] = {}
        """Values that have one entry where they had many, with the positions of these axes."""
        self._full: dict[str, ir.Value] = {}
        """Such values, repeated to their whole shapes."""
        self._lost: set[str] = set()
        """Values that cannot be computed any more, and that nothing reads which is left."""
        self._now: dict[str, ir.Value] = {}
        """What stands for values of nodes that are not there any more."""

    def settled(self, node: Node, copy: ir.Node) -> bool:
        """Do all there is to do at a node; False: it stays, and its numbers may still change.

        Nodes must come in the order of their work.
        Raises: BadInput: what it computes from nothing is not known, or a size cannot be told.
        """
        if not self._empty:
            return False
        outputs = {name for name in node.outputs if name}
        if outputs <= self._empty:
            return True
        try:
            if self._lost.isdisjoint(node.inputs):
                return self._settle(node, copy)
        except BadInput:
            if node.index in self._alive:
                raise
        self._lost |= outputs
        return True

    def _settle(self, node: Node, copy: ir.Node) -> bool:
        names = list(node.inputs)
        if self._empty.intersection(names):
            if node.op in CONTRACTIONS:
                self._leave_rest(node, copy)
                return True
            if node.op == "DynamicQuantizeLinear":
                self._stand(node, copy, self._cut.constant(np.ones((), np.float32), "scale"), frozenset(), 1)
                self._stand(node, copy, self._cut.constant(np.zeros((), np.uint8), "point"), frozenset(), 2)
                return True
            if node.op == "Concat":
                names = [name for name in names if name not in self._empty]
                _set_inputs(
                    copy, [value for name, value in zip(node.inputs, copy.inputs, strict=True) if name in names]
                )
            elif node.op == "CastLike" and names[0] not in self._empty:
                copy.op_type = "Cast"
                to = from_torch_dtype(self._structure.shapes.tensors[names[1]].dtype)
                copy.attributes["to"] = ir.AttrInt64("to", to.value)
                names = names[:1]
                _set_inputs(copy, copy.inputs[:1])
            elif node.op != "Shape":
                raise _unknown(node)
        if node.op == "Shape" and (names[0] in self._empty or names[0] in self._thin):
            self._tell_shape(node, copy)
            return True
        if not self._passes(node, names):
            for place, name in enumerate(names):
                if name in self._thin:
                    copy.replace_input_with(place, self._repeated(node, copy, name, copy.inputs[place]))
        if self._empty.intersection(node.outputs):
            if node.op != "Split":
                raise _unknown(node)
            self._leave_parts(node, copy)
            return True
        return False

    @cached_property
    def _alive(self) -> frozenset[int]:
        """Nodes that something reads which is left; the others may stay where only they tell a size."""
        needed = {port.name for port in self._network.outputs}
        found = set()
        for node in reversed(self._network.nodes):
            if needed.intersection(node.outputs):
                found.add(node.index)
                read = set(node.inputs) - {""}
                if node.op in CONTRACTIONS and read & self._empty:
                    place = bias_of(node)
                    read = set() if place is None else {node.inputs[place]}
                needed |= read - self._empty
        return frozenset(found)

    @cached_property
    def _never_thin(self) -> frozenset[str]:
        """Outputs of the graph, and what subgraphs read from around them."""
        inner = {
            name
            for node in self._network.nodes
            if any(isinstance(value, ir.Graph) for value in node.attributes.values())
            for name in node.inputs
        }
        return frozenset(inner | {port.name for port in self._network.outputs}) - {""}

    def _left(self, name: str, position: int) -> ir.Value | None:
        """The value that stands for one of the network, if it is there and has all entries along an axis."""
        if name in self._empty or name in self._lost or position in self._thin.get(name, ()):
            return None
        producer = self._network.producer.get(name)
        if name in self._now or producer is None:
            return self._now.get(name) or self._ports[name]
        return self._cut.nodes[producer.index].outputs[producer.outputs.index(name)]

    @cached_property
    def _ports(self) -> dict[str, ir.Value]:
        return {value.name or "": value for value in self._cut.model.graph.inputs}

    def _passes(self, node: Node, names: Sequence[str]) -> bool:
        """Whether thin values may go through a node; what comes out is noted."""
        if not self._thin.keys() & set(names):
            return True
        row = rows().get((node.domain, node.op))
        flow = row.flow if row else None
        if flow is same or (flow is per_channel and not self._thin.keys() & {*names[1:]}):
            thin = self._thin.get(names[0], frozenset())
        elif flow is aligned and not node.domain and node.op not in ONE_WAY:
            thin = self._thin_of(node.outputs[0], [(name, self._sizes(name)) for name in names if name])
        else:
            return False
        if flow is per_channel and 1 in thin:
            return False
        if thin and self._never_thin.intersection(node.outputs):
            return False
        if any(tap.node == node.index for tap in self._structure.taps):
            return False
        self._thin.update({name: thin for name in node.outputs if name and thin})
        return True

    def _thin_of(self, output: str, inputs: Sequence[tuple[str, Sequence[int]]]) -> frozenset[int]:
        """Positions where a result of broadcasting has one entry, as each of the inputs has, by name and sizes."""
        found = set()
        for position in range(rank := len(self._sizes(output))):
            held = []
            for name, sizes in inputs:
                at = position - rank + len(sizes)
                held.append(at >= 0 and sizes[at] > 1 and at not in self._thin.get(name, ()))
            if (self._sizes(output)[position] > 1 or self._may_grow(output, position)) and not any(held):
                found.add(position)
        return frozenset(found)

    def _may_grow(self, name: str, position: int) -> bool:
        """Whether an axis has one entry in the probe, and may have more for other inputs: a place of a picture."""
        axes = self._structure.axes.get(name, ())
        return bool(axes) and axes[position].size == 1 and bool(axes[position].frozen)

    def _sizes(self, name: str) -> tuple[int, ...]:
        """Sizes before the cut, in the probe."""
        return self._structure.shapes.shape(name) or ()

    def _repeated(self, node: Node, copy: ir.Node, name: str, value: ir.Value | None) -> ir.Value:
        """Repeat a thin value to its whole shape, once for all that need it."""
        if name not in self._full:
            sizes: list[Size] = []
            for position, axis in enumerate(self._structure.axes[name]):
                size = self._dimensions.size_of(axis, copy, node.index) if position in self._thin[name] else 1
                if size is None:
                    raise _unknown_size(node, name, position)
                sizes.append(size)
            self._full[name] = self._cut.before(copy, "Expand", [value, self._dimensions.shape(copy, sizes)])
        return self._full[name]

    def _tell_shape(self, node: Node, copy: ir.Node) -> None:
        """Put the sizes that a value had before the cut in place of its Shape, as the cut lets every Shape tell."""
        name = node.inputs[0]
        sizes: list[Size] = []
        axes = self._structure.axes[name]
        for position in range(*slice(node.get("start", 0), node.get("end")).indices(len(axes))):
            size = self._dimensions.size_of(axes[position], copy, node.index, dense=True)
            if size is None:
                raise _unknown_size(node, name, position)
            sizes.append(size)
        self._stand(node, copy, self._dimensions.shape(copy, sizes), frozenset())

    def _leave_rest(self, node: Node, copy: ir.Node) -> None:
        """Put what a contraction over nothing gives in its place."""
        place = bias_of(node)
        if place is not None and node.inputs[place] in self._thin:
            whole = self._repeated(node, copy, node.inputs[place], copy.inputs[place])
            copy.replace_input_with(place, whole)
        value, held = remainder(self._cut, node, copy)
        self._stand(node, copy, value, self._thin_of(node.outputs[0], [("", held)]))

    def _stand(self, node: Node, copy: ir.Node, value: ir.Value, thin: frozenset[int], place: int = 0) -> None:
        """Let a value stand for an output of a node; full where it must be."""
        name = node.outputs[place]
        if thin:
            self._thin[name] = thin
            if name in self._never_thin:
                value = self._repeated(node, copy, name, value)
                del self._thin[name]
        self._now[name] = value
        self._cut.renamed(copy, value, place)

    def _leave_parts(self, node: Node, copy: ir.Node) -> None:
        """Let a Split give only the parts that have entries."""
        left = [place for place, name in enumerate(node.outputs) if name not in self._empty]
        values: Sequence[ir.Value | None] = [copy.inputs[0]]
        if len(left) > 1:
            along = node.get("axis", 0) % len(self._structure.axes[node.outputs[left[0]]])
            parts = [self._structure.axes[node.outputs[place]][along] for place in left]
            sizes = [self._dimensions.size_of(part, copy, node.index) for part in parts]
            known = [one for one in sizes if isinstance(one, int)]
            if len(known) < len(sizes):
                raise _unknown_size(node, node.outputs[left[0]], along)
            values = self._cut.split(copy, along, known, by_input="split" not in node.attributes)
        for place, value in zip(left, values, strict=True):
            assert value is not None
            self._stand(node, copy, value, frozenset(), place)


def _set_inputs(copy: ir.Node, values: Sequence[ir.Value | None]) -> None:
    for place, value in enumerate(values := list(values)):
        copy.replace_input_with(place, value)
    copy.resize_inputs(len(values))


def _unknown(node: Node) -> BadInput:
    return BadInput(
        f"{node} reads units of which the plan keeps none; what it makes of nothing is not known. Keep one unit."
    )


def _unknown_size(node: Node, name: str, position: int) -> BadInput:
    return BadInput(
        f"{node} reads {name}, which is constant as the plan keeps none of some units; how large axis {position} of it "
        "is then cannot be told from what is left. Keep one unit."
    )
