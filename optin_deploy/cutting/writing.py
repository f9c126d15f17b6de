"""Small operators that are put into a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optin_deploy.cutting.editing import Editor


class Writer:
    """Puts operators before a node of the copy of a graph; each method takes that node first."""

    def __init__(self, cut: Editor) -> None:
        self._cut = cut

    def _put(self, before: ir.Node, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._cut.before(before, op, inputs, attributes)

    def _whole(self, numbers: Any) -> ir.Value:
        """A constant of whole numbers."""
        return self._cut.constant(np.array(numbers, dtype=np.int64), "sizes")

    def _slice(self, before: ir.Node, value: ir.Value, start: int, end: int, axis: int, step: int = 1) -> ir.Value:
        return self._put(before, "Slice", value, *(self._whole([each]) for each in (start, end, axis, step)))

    def _size(self, before: ir.Node, value: ir.Value | None, axis: int) -> ir.Value:
        """Size of an axis, (1,)."""
        return self._slice(before, self._put(before, "Shape", value), axis, axis + 1, 0)

    def _sorted(self, before: ir.Node, places: ir.Value, count: int | ir.Value) -> ir.Value:
        """Places in rising order, (samples, count)."""
        values, _ = self._top(before, self._put(before, "Cast", places, to=int(ir.DataType.INT32)), count, largest=0)
        return self._put(before, "Cast", values, to=int(ir.DataType.INT64))

    def _top(
        self, before: ir.Node, value: ir.Value, count: int | ir.Value, *, axis: int = 1, largest: int = 1
    ) -> tuple[ir.Value, ir.Value]:
        """The largest or smallest entries of an axis, and their places; a count that is a value has one entry."""
        how = {"axis": axis, "largest": largest, "sorted": 1}
        count = self._whole([count]) if isinstance(count, int) else count
        node = ir.node("TopK", [value, count], how, num_outputs=2)
        for output in node.outputs:
            output.name = self._cut.named("top")
        self._cut.model.graph.insert_before(before, node)
        return node.outputs[0], node.outputs[1]
