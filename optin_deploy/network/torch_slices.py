"""How assignments to a slice of a tensor, `x[:, 1:] = y`, are written: as what lies before, what is new, and what lies
behind, in which parts stay parts of an axis; torch's exporter writes them as entries at places that a run computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

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


def _part(x: Any, first: int, last: int, dim: int) -> Any:
    bounds: list[Any] = [op.Constant(value_ints=[number]) for number in (first, last, dim)]
    return op.Slice(x, *bounds)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.slice_scatter.default: slice_scatter}
"""For `torch.onnx.export`."""
