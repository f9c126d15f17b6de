"""Tell sizes after a cut, in the graph itself: numbers where they are the same for all inputs, else at what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from optin_deploy.cutting.editing import Editor
from optin_deploy.network.axes import Axis, size, touched
from optin_deploy.network.graph import Node

Size = ir.Value | int
"""A number, or a value of one entry that a run computes."""
SIZES = {"Reshape": 1, "Expand": 1, "Split": 1, "ConstantOfShape": 0}
"""Operators that list sizes of their results, with the input that does."""
WINDOWS = ("Conv", "ConvInteger", "MaxPool", "AveragePool", "LpPool", "Pad")


class Dimensions:
    """Sizes of axes; nothing is guessed from the sizes of the probe."""

    def __init__(
        self, cut: Editor, value_of: Callable[[str, int], ir.Value | None], is_read: Callable[[str], bool]
    ) -> None:
        """Look at a cut.

        Args:
            value_of: a value that is left in the graph, by the name that it has in the network; None: it is not
                there, or has one entry where it had many along the axis at this position.
            is_read: whether a value that a node gives is computed anyway, by its name.
        """
        self._cut, self._value_of, self._is_read = cut, value_of, is_read
        self._known: dict[tuple[Axis, bool], Size] = {}
        """Sizes that were found; of an axis that is cut both of them."""
        self._asked: set[tuple[Axis, bool]] = set()
        """What is being looked for, so that it is not asked for on the way."""

    def size_of(self, axis: Axis, copy: ir.Node, before: int, *, dense: bool = False) -> Size | None:
        """Return the size of an axis, None if nothing tells it.

        Args:
            copy: nodes that find it are put before this one.
            before: index of that node; values that it can read are those of nodes before.
            dense: the size before the cut.
        """
        key = axis.root, dense and touched(axis, self._cut.keep)
        if key not in self._known and key not in self._asked:
            self._asked.add(key)
            found = self._find(axis.root, copy, before, dense)
            self._asked.remove(key)
            if found is not None:
                self._known[key] = found
        return self._known.get(key)

    def shape(self, copy: ir.Node, sizes: Iterable[Size]) -> ir.Value:
        """Put sizes into one value, before a node."""
        listed = list(sizes)
        numbers = [one for one in listed if isinstance(one, int)]
        if len(numbers) == len(listed):
            return self._cut.constant(np.array(numbers, dtype=np.int64), "sizes")
        parts = [one if isinstance(one, ir.Value) else self._number(one) for one in listed]
        return self._cut.before(copy, "Concat", parts, {"axis": 0})

    def _find(self, axis: Axis, copy: ir.Node, before: int, dense: bool) -> Size | None:
        changed = touched(axis, self._cut.keep)
        if self._fixed(axis) or (axis.size == 1 and not axis.frozen):  # a place of a picture may be more than one
            return size(axis, {} if dense else self._cut.sizes)
        if not changed:
            for name, position, index in self._places.get(axis, ()):
                value = self._value_of(name, position) if index < before else None
                if value is not None:
                    return self._read(copy, value, position)
        if axis.kind != "leaf":
            parts = [self.size_of(part, copy, before, dense=dense) for part in axis.parts]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                return self._joined(copy, "Mul" if axis.kind == "product" else "Add", known)
        if changed and not dense:
            return None
        return self._behind_window(axis, copy, before)

    def _read(self, copy: ir.Node, value: ir.Value, position: int) -> ir.Value:
        shape = self._cut.before(copy, "Shape", [value])
        return self._cut.before(copy, "Gather", [shape, self._number(position)], {"axis": 0})

    def _number(self, number: int) -> ir.Value:
        return self._cut.constant(np.array([number], dtype=np.int64), "size")

    def _joined(self, copy: ir.Node, op: str, sizes: Sequence[Size]) -> Size:
        numbers = [one for one in sizes if isinstance(one, int)]
        number = math.prod(numbers) if op == "Mul" else sum(numbers)
        values = [one for one in sizes if isinstance(one, ir.Value)]
        if not values:
            return number
        if number != (1 if op == "Mul" else 0):
            values.append(self._number(number))
        found = values[0]
        for other in values[1:]:
            found = self._cut.before(copy, op, [found, other])
        return found

    def _behind_window(self, axis: Axis, copy: ir.Node, before: int) -> Size | None:
        """Size of what a window that goes over an axis, or a Pad, leaves of it."""
        node, position = self._windows.get(axis, (None, 0))
        if node is None:
            return None
        source = self._cut.structure.axes[node.inputs[0]][position]
        spare, step = self._padding(node, position) if node.op == "Pad" else self._window(node, position - 2)
        if step == 0 or (source.size + spare) // step + 1 != axis.size:
            return None
        size = self.size_of(source, copy, before)
        if size is None or isinstance(size, int):
            return None if size is None else (size + spare) // step + 1
        found = self._joined(copy, "Add", [size, spare])
        if step > 1:
            assert isinstance(found, ir.Value)
            found = self._cut.before(copy, "Div", [found, self._number(step)])
        return self._joined(copy, "Add", [found, 1])

    def _window(self, node: Node, place: int) -> tuple[int, int]:
        """What a window adds to a size before it goes over it, less its reach, and its step; 0: it is not known."""
        mode = node.get("auto_pad", "NOTSET")
        if mode not in ("NOTSET", "VALID") or node.get("ceil_mode", 0):
            return 0, 0
        kernel = node.get("kernel_shape") or (self._cut.structure.shapes.shape(node.inputs[1]) or ())[2:]
        rank = len(kernel)
        pads = node.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        reach = node.get("dilations", [1] * rank)[place] * (kernel[place] - 1) + 1
        return pads[place] + pads[place + rank] - reach, node.get("strides", [1] * rank)[place]

    def _padding(self, node: Node, position: int) -> tuple[int, int]:
        """The same for a Pad, as a window of one entry."""
        network, known = self._cut.structure.network, self._cut.structure.shapes.known
        amounts, along = known(node.inputs[1]), known(node.inputs[3]) if len(node.inputs) > 3 else None
        if amounts is None or node.inputs[1] not in network.fixed or (along is None and len(node.inputs) > 3):
            return 0, 0
        both = amounts.reshape(2, -1).sum(0)
        rank = len(self._cut.structure.axes[node.outputs[0]])
        where = [entry if along is None else int(along[entry]) % rank for entry in range(len(both))]
        return int(both[where.index(position)]) - 1, 1

    def _fixed(self, axis: Axis) -> bool:
        """Whether an axis has the same size for all inputs."""
        axis = axis.root
        if axis.kind == "leaf" or axis in self._roots:
            return axis in self._roots
        return all(self._fixed(part) for part in axis.parts)

    @cached_property
    def _roots(self) -> frozenset[Axis]:
        """Axes of weights and their factors, units, and what the file itself writes as a number."""
        structure, network = self._cut.structure, self._cut.structure.network
        found: set[Axis] = set(self._cut.keep)
        free: set[Axis] = set()

        def add(axis: Axis) -> None:
            found.add(axis.root)
            for part in axis.parts if axis.kind == "product" else ():
                add(part)

        for use in structure.uses:
            for axis in use.axes:
                add(axis)
                found.update(leaf for leaf in axis.leaves() if not leaf.frozen)
        for number in structure.numbers:
            node = network.nodes[number.node]
            place = number.where
            if isinstance(place, str) or (
                place == SIZES.get(node.op)
                and place < len(node.inputs)
                and self._stored(node.inputs[place], number.entry or 0)
            ):
                add(number.axis)
        for port in network.inputs:
            for known, axis in zip(port.shape or (), structure.axes.get(port.name, ()), strict=False):
                if isinstance(known, int):
                    add(axis)
                else:
                    free.update(axis.leaves())
        return frozenset(axis for axis in found if not free.intersection(axis.leaves()))

    def _stored(self, name: str, entry: int) -> bool:
        """Whether an entry of a list of sizes follows from the file alone."""
        network = self._cut.structure.network
        node = network.producer.get(name)
        if name in network.fixed or node is None or node.op != "Concat":
            return name in network.fixed
        single = all(self._cut.structure.shapes.shape(each) == (1,) for each in node.inputs)
        return single and node.inputs[entry] in network.fixed

    @cached_property
    def _places(self) -> dict[Axis, list[tuple[str, int, int]]]:
        """Places of each axis: a value, the position of the axis, and the index of the node that computes the value.

        First come inputs and what is computed anyway, in the order of work.
        """
        found: dict[Axis, list[tuple[str, int, int]]] = {}
        network = self._cut.structure.network
        for name, axes in self._cut.structure.axes.items():
            if name in network.weights:
                continue
            index = network.producer[name].index if name in network.producer else -1
            for position, axis in enumerate(axes):
                found.setdefault(axis.root, []).append((name, position, index))
        for places in found.values():
            places.sort(key=lambda place: place[2] >= 0 and not self._is_read(place[0]))
        return found

    @cached_property
    def _windows(self) -> dict[Axis, tuple[Node, int]]:
        """Nodes whose windows leave an axis, each with the position of it."""
        found: dict[Axis, tuple[Node, int]] = {}
        axes = self._cut.structure.axes
        for node in self._cut.structure.network.nodes:
            if node.op in WINDOWS and node.inputs[0] in axes and node.outputs[0] in axes:
                first = 0 if node.op == "Pad" else 2
                for position, axis in list(enumerate(axes[node.outputs[0]]))[first:]:
                    if axis.root is not axes[node.inputs[0]][position].root:
                        found.setdefault(axis.root, (node, position))
        return found
