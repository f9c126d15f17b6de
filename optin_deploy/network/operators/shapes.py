"""Operators that change the shape and keep every entry, and those that make tensors of a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row
from optin_deploy.network.tensors import torch_dtype, torch_tensor


def whole(numbers: Tensor | None) -> list[int]:
    """Entries of an input of numbers."""
    return [] if numbers is None else [int(entry) for entry in numbers.reshape(-1).tolist()]


def reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """Give a tensor another shape: 0 keeps a size, -1 is what remains."""
    wanted = whole(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[position] if size == 0 else size for position, size in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Make a matrix of a tensor."""
    axis = node.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Leave axes of one entry away."""
    asked = node.get("axes") if axes is None else whole(axes)
    return x.squeeze() if asked is None else x.squeeze([axis % x.ndim for axis in asked])


def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Put in axes of one entry."""
    asked = node.attributes["axes"] if axes is None else whole(axes)
    rank = x.ndim + len(asked)
    for axis in sorted(axis % rank for axis in asked):
        x = x.unsqueeze(axis)
    return x


def reshaped(flow: Flow) -> None:
    """Flow of all that split and merge axes."""
    flow.give(0, flow.reshape(flow.axes(0), flow.out_shape()))


def reshaped_by_numbers(flow: Flow) -> None:
    """Flow of Reshape, whose second input lists the sizes."""
    axes = flow.reshape(flow.axes(0), flow.out_shape())
    flow.give(0, axes)
    for entry, axis in enumerate(axes):
        flow.number(1, entry, axis)


def transpose(node: Node, x: Tensor) -> Tensor:
    """Permute the axes."""
    return x.permute(tuple(order(node, x.ndim)))


def order(node: Node, rank: int) -> Sequence[int]:
    """Which axis of the input comes at each place."""
    found: Sequence[int] = node.get("perm") or range(rank - 1, -1, -1)
    return found


def transposed(flow: Flow) -> None:
    """Flow of Transpose."""
    axes = flow.axes(0)
    flow.give(0, [axes[position] for position in order(flow.node, len(axes))])


def expand(_: Node, x: Tensor, shape: Tensor) -> Tensor:
    """Repeat axes of one entry."""
    wanted = whole(shape)
    sizes = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (len(sizes) - len(wanted)) + wanted
    return x.expand([old if new == 1 else new for old, new in zip(sizes, wanted, strict=True)])


def expanded(flow: Flow) -> None:
    """Flow of Expand: an axis of one entry becomes a new one, the others stay."""
    axes, shape = flow.axes(0), flow.out_shape()
    missing = len(shape) - len(axes)
    asked = flow.known(1)
    skipped = len(shape) - (0 if asked is None else len(asked))
    out = []
    for position, size in enumerate(shape):
        old = axes[position - missing] if position >= missing else None
        out.append(old if old is not None and old.size == size else flow.fresh(size))
        if position >= skipped:
            flow.number(1, position - skipped, out[-1])
    flow.give(0, out)


def tiled(flow: Flow) -> None:
    """Flow of Tile: the repetitions are a factor before the axis."""
    out = []
    for position, (axis, size) in enumerate(zip(flow.axes(0), flow.out_shape(), strict=True)):
        times = flow.fresh(size // axis.size if axis.size else 1)
        flow.number(1, position, times)
        out.append(flow.product([times, axis]))
    flow.give(0, out)


def shape_of(node: Node, x: Tensor) -> Tensor:
    """Sizes as numbers."""
    return torch.tensor(tuple(x.shape)[node.get("start", 0) : node.get("end")], dtype=torch.int64)


def numbers_only(flow: Flow) -> None:
    """Results are numbers, not units; the input is only looked at."""
    for place, name in enumerate(flow.node.outputs):
        if name:
            flow.give(place, [flow.fresh(size, "numbers") for size in flow.out_shape(place)])


def constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    """Fill a shape with one value, 0 if none is given."""
    stored = node.get("value")
    if stored is None:
        return torch.zeros(whole(shape))
    value = torch_tensor(stored)
    return torch.full(whole(shape), value.item(), dtype=value.dtype)


def filled(flow: Flow) -> None:
    """Flow of a tensor that is made from sizes alone."""
    axes = [flow.fresh(size) for size in flow.out_shape()]
    for entry, axis in enumerate(axes):
        flow.number(0, entry, axis)
    flow.give(0, axes)


def count(_: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Count from one number to another."""
    size = max(0, math.ceil((limit.item() - start.item()) / step.item()))
    result: Tensor = start + step * torch.arange(size, dtype=start.dtype)
    return result


def eye_like(node: Node, x: Tensor) -> Tensor:
    """Make a matrix with ones on a diagonal."""
    dtype = torch_dtype(node.attributes["dtype"]) if "dtype" in node.attributes else x.dtype
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    on: Tensor = columns - rows.unsqueeze(-1) == node.get("k", 0)
    return on.to(dtype)


ROWS = (
    Row("Reshape", reshape, reshaped_by_numbers, numbers=(1,)),
    Row("Flatten", flatten, reshaped),
    Row("Squeeze", squeeze, reshaped, numbers=(1,)),
    Row("Unsqueeze", unsqueeze, reshaped, numbers=(1,)),
    Row("Transpose", transpose, transposed),
    Row("Expand", expand, expanded, numbers=(1,)),
    Row("Tile", lambda _, x, times: x.repeat(whole(times)), tiled, numbers=(1,)),
    Row("Shape", shape_of, numbers_only),
    Row("Size", lambda _, x: torch.tensor(x.numel()), numbers_only),
    Row("ConstantOfShape", constant_of_shape, filled, numbers=(0,)),
    Row("Range", count, numbers_only, numbers=(0, 1, 2)),
    Row("EyeLike", eye_like, numbers_only),
)
