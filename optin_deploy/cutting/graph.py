"""Cut a network: every weight keeps the entries of the units that stay, every number beside the weights follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.emptied import Emptied
from optin_deploy.network.axes import Axis, kept, product, size, touched
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network, Node
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.keep import checked
from optin_deploy.structure.structure import Number


@uncollected()
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
    GraphCut(layout.structure, model, leaves).make()
    return Network(RemoveUnusedNodesPass()(model).model, network.source)


class GraphCut(Editor):
    """One cut, while it is made on a copy of the graph."""

    def make(self) -> None:
        """Change the copy."""
        network = self.structure.network
        emptied = Emptied(self)
        numbers: dict[int, dict[int | str, list[Number]]] = {}
        for number in self.structure.numbers:
            numbers.setdefault(number.node, {}).setdefault(number.where, []).append(number)
        for use in self.structure.uses:
            if any(touched(axis, self.keep) for axis in use.axes):
                self.nodes[use.node].replace_input_with(use.place, self.sliced(use.weight, use.axes))
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
        value = copy.inputs[0]
        if not changed or (value is not None and value.name in self.structure.network.weights):
            return  # a weight that stays whole beside its parts that are used tells the sizes before as it is
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
