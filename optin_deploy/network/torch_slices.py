"""How tensors are indexed and assigned to by slices, so that parts stay parts of an axis.

What is assigned, `x[:, 1:] = y`, is what lies before, what is new, and what lies behind; what one list picks, as in
`x[:, [3]]`, is a Gather. torch's exporter writes both as entries at places that a run computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_index, aten_slice_scatter

from optin_deploy.network.operators.selections import bounds

END = 2**63 - 1
"""Bound of a slice that reaches to the end."""


def slice_scatter(
    x: Any, new: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Translation of aten::slice_scatter: by Concat, where its bounds are numbers that lie inside."""
    size = x.shape[dim]
    first, last = (0 if start is None else start), (END if end is None else end)
    if isinstance(size, int) and isinstance(first, int) and isinstance(last, int):
        first, last = bounds(first, size), bounds(last, size)
        last = END if last == size else last
    if not (isinstance(first, int) and isinstance(last, int) and step == 1 and 0 <= first <= last):
        return aten_slice_scatter(x, new, dim, start, end, step)
    parts = [new]
    if first > 0:
        parts.insert(0, _part(x, 0, first, dim))
    if last < END:
        parts.append(_part(x, last, END, dim))
    return op.Concat(*parts, axis=dim) if len(parts) > 1 else op.Identity(new)


def index(x: Any, indices: Sequence[Any]) -> Any:
    """Translation of aten::index: by Gather, where one axis is indexed, by numbers."""
    given = [(axis, each) for axis, each in enumerate(indices) if each is not None]
    if len(given) != 1 or given[0][1].dtype == ir.DataType.BOOL:
        return aten_index(x, indices)
    ((axis, places),) = given
    return op.Gather(x, places, axis=axis)


def _part(x: Any, first: int, last: int, dim: int) -> Any:
    bounds: list[Any] = [op.Constant(value_ints=[number]) for number in (first, last, dim)]
    return op.Slice(x, *bounds)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.slice_scatter.default: slice_scatter,
    torch.ops.aten.index.Tensor: index,
}
"""For `torch.onnx.export`."""
