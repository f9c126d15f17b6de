"""Operators that join, split and pick entries: sums of axes where the parts stay in order, frozen axes where not."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.elementwise import whole_at
from optin_deploy.network.operators.row import Flow, Row, Unsupported, refuse
from optin_deploy.network.operators.shapes import numbers_only, whole


def joined(flow: Flow, places: slice = slice(None)) -> None:
    """Flow of Concat: along its axis the inputs are a sum.

    Args: places: of what is joined.
    """
    shape = flow.out_shape()
    along = flow.node.attributes["axis"] % len(shape)
    tensors = [flow.axes(place) for place in range(len(flow.node.inputs))[places]]
    rest = [[flow.fresh(1) if i == along else axis for i, axis in enumerate(axes)] for axes in tensors]
    out = flow.align(rest, shape)
    out[along] = flow.total([axes[along] for axes in tensors])
    flow.give(0, out)


def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split by sizes, or into equal parts of which the last may be smaller."""
    axis = node.get("axis", 0)
    given = list(node.get("split", ())) if sizes is None else whole(sizes)
    if not given:
        size, count = x.shape[axis], node.get("num_outputs", len(node.outputs))
        step = -(-size // count)
        given = [max(0, min(step, size - step * part)) for part in range(count)]
    return torch.split_with_sizes(x, given, axis)


def parted(flow: Flow) -> None:
    """Flow of Split: the axis is the sum of its parts."""
    axes = flow.axes(0)
    along = flow.node.get("axis", 0) % len(axes)
    parts = [flow.fresh(flow.out_shape(place)[along]) for place in range(len(flow.node.outputs))]
    flow.unify(axes[along], flow.total(parts))
    for place, part in enumerate(parts):
        flow.give(place, [part if position == along else axis for position, axis in enumerate(axes)])
    if "split" in flow.node.attributes:
        flow.attribute("split", parts)
    else:
        for entry, part in enumerate(parts):
            flow.number(1, entry, part, exact=False)


def slice_(
    _: Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """Take a range of each axis that is named; steps may go backwards."""
    along = whole(axes) if axes is not None else range(len(starts))
    strides = whole(steps) if steps is not None else [1] * len(starts)
    for start, end, axis, step in zip(whole(starts), whole(ends), along, strides, strict=True):
        size = x.shape[axis]
        if step > 0:
            first, last = bounds(start, size), bounds(end, size)
            index: list[slice] = [slice(None)] * x.ndim
            index[axis] = slice(first, max(first, last), step)
            x = x[tuple(index)]
        else:
            first, last = (min(max(at + size if at < 0 else at, -1), size - 1) for at in (start, end))
            x = x.index_select(axis, torch.arange(first, last, step, device=x.device))
    return x


def bounds(at: int, size: int) -> int:
    """Count a bound from the start, and keep it inside."""
    return min(max(at + size if at < 0 else at, 0), size)


def sliced(flow: Flow) -> None:
    """Flow of Slice: the axis is what lies before, what is taken, and what lies behind; every second entry of it is one
    of each of its pairs."""
    axes = flow.axes(0)
    starts, ends = flow.known(1), flow.known(2)
    if starts is None or ends is None:
        raise Unsupported("Slice by bounds that follow from real numbers")
    along = flow.known(3) if flow.has(3) else range(len(starts))
    steps = flow.known(4) if flow.has(4) else [1] * len(starts)
    if along is None or steps is None:
        raise Unsupported("Slice by axes or steps that follow from real numbers")
    shape, out = flow.out_shape(), list(axes)
    for entry, axis in enumerate(along):
        at = int(axis) % len(axes)
        step = int(steps[entry])
        first, last = bounds(int(starts[entry]), axes[at].size), bounds(int(ends[entry]), axes[at].size)
        if step == 1 and last - first == axes[at].size:
            continue
        if step > 1 and first < step and shape[at] * step == axes[at].size and not frozen(out[at]):
            rest, out[at] = out[at], flow.fresh(shape[at])
            flow.unify(rest, flow.product([out[at], flow.fresh(step, "Slice with a step")]))
            flow.number(1, entry, flow.fresh(first), exact=False, because=axes[at])
            continue
        if step != 1 or last < first:
            flow.freeze([out[at]], "Slice with a step")
            out[at] = flow.fresh(shape[at], "Slice with a step")
            continue
        before, middle, behind = (flow.fresh(size) for size in (first, last - first, axes[at].size - last))
        flow.unify(out[at], flow.total([before, middle, behind]))
        out[at] = middle
        flow.number(1, entry, before, exact=False, because=axes[at])
        if behind.size:
            flow.number(2, entry, flow.total([before, middle]), exact=False, because=axes[at])
    flow.give(0, out)


def frozen(axis: Axis) -> bool:
    """Whether an axis stays whole already."""
    return all(leaf.frozen for leaf in axis.leaves())


def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Pick entries of one axis."""
    axis = node.get("axis", 0) % x.ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def gathered(flow: Flow) -> None:
    """Flow of Gather: the axis that is picked from stays whole, the axes of the indices take its place.

    By a list of one known place it is a Slice of one entry.
    """
    axes = flow.axes(0)
    along = flow.node.get("axis", 0) % len(axes)
    if flow.shape(1) == (1,) and (entry := one_entry(flow, axes[along])) is not None:
        flow.give(0, [*axes[:along], entry, *axes[along + 1 :]])
        return
    flow.freeze([axes[along], *flow.axes(1)])
    flow.give(0, [*axes[:along], *flow.axes(1), *axes[along + 1 :]])


def one_entry(flow: Flow, axis: Axis) -> Axis | None:
    """The part of an axis that an index picks, the only one of input 1; None: a run tells which."""
    known = flow.known(1)
    if known is None or axis.size < 2:
        return None
    at = int(known.reshape(-1)[0]) % axis.size
    before, entry, behind = (flow.fresh(size) for size in (at, 1, axis.size - at - 1))
    flow.unify(axis, flow.total([before, entry, behind]))
    flow.number(1, 0, before, exact=False, because=axis)
    return entry


def picked_alike(flow: Flow) -> None:
    """Flow of GatherElements: indices for each entry of the other axes."""
    axes, indices = flow.axes(0), flow.broadcast([1], flow.shape(1))
    along = flow.node.get("axis", 0) % len(axes)
    flow.freeze([axes[along], indices[along]])
    out: list[Axis] = []
    for position, (axis, index) in enumerate(zip(axes, indices, strict=True)):
        if position != along and axis.size == index.size:
            flow.unify(axis, index)
        elif position != along:
            flow.freeze([axis])
        out.append(index)
    flow.give(0, out)


def gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Pick slices by tuples of indices."""
    batch = node.get("batch_dims", 0)
    lead = x.shape[:batch]
    flat, where = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    rows = torch.arange(flat.shape[0], device=x.device).reshape(-1, *[1] * (where.ndim - 2))
    depth = indices.shape[-1]
    found = flat[(rows.expand(where.shape[:-1]), *where.unbind(-1))]
    return found.reshape((*lead, *indices.shape[batch:-1], *x.shape[batch + depth :]))


def gathered_nd(flow: Flow) -> None:
    """Flow of GatherND: axes behind those that are picked from stay what they are.

    By one known place it is a Slice of one entry.
    """
    axes, indices = flow.axes(0), flow.axes(1)
    batch = flow.node.get("batch_dims", 0)
    if not batch and flow.shape(1) == (1, 1) and (entry := one_entry(flow, axes[0])) is not None:
        flow.give(0, [entry, *axes[1:]])
        return
    depth = flow.shape(1)[-1]
    for axis, index in zip(axes[:batch], indices[:batch], strict=True):
        flow.unify(axis, index)
    flow.freeze([*axes[batch : batch + depth], indices[-1]])
    flow.give(0, [*indices[:-1], *axes[batch + depth :]])


def top(node: Node, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Take the largest or smallest entries of an axis, and where they are."""
    axis, largest = node.get("axis", -1), bool(node.get("largest", 1))
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)  # of equal entries the first comes first
    size = whole(count)[0]
    return values.narrow(axis, 0, size), places.narrow(axis, 0, size)


def topped(flow: Flow) -> None:
    """Flow of TopK: its axis stays whole."""
    axes = flow.axes(0)
    along = flow.node.get("axis", -1) % len(axes)
    flow.freeze([axes[along]])
    for place, name in enumerate(flow.node.outputs):
        if name:
            picked = flow.fresh(flow.out_shape(place)[along], "TopK")
            flow.give(place, [picked if position == along else axis for position, axis in enumerate(axes)])


def one_hot(node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """Make a vector with one entry set for each index."""
    size = whole(depth)[0]
    axis = node.get("axis", -1) % (indices.ndim + 1)
    places = torch.arange(size, device=indices.device)
    hot = torch.where(indices < 0, indices + size, indices).unsqueeze(-1) == places
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


def trilu(node: Node, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    """Keep a triangle."""
    at = 0 if diagonal is None else whole(diagonal)[0]
    if x.dtype is torch.bool:
        return trilu(node, x.to(torch.uint8), diagonal).to(torch.bool)
    return torch.triu(x, at) if node.get("upper", 1) else torch.tril(x, at)


def nonzero(_: Node, x: Tensor) -> Tensor:
    """Places of what is not zero, an axis a row."""
    return torch.stack(torch.nonzero(x, as_tuple=True))


def reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    """Turn the first entries of each sequence round."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    at = torch.arange(x.shape[time], device=x.device).unsqueeze(-1)
    places = torch.where(at < lengths, lengths - 1 - at, at)  # (time, batch)
    places = places if time < batch else places.T
    shape = [size if axis in (time, batch) else 1 for axis, size in enumerate(x.shape)]
    return torch.gather(x, time, places.reshape(shape).expand(x.shape))


def compress(node: Node, x: Tensor, condition: Tensor) -> Tensor:
    """Take the entries where a condition holds."""
    axis = node.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


ROWS = (
    Row("Concat", lambda node, *inputs: torch.cat(inputs, node.attributes["axis"]), joined),
    Row("Split", split, parted, numbers=(1,)),
    Row("Slice", slice_, sliced, numbers=(1, 2, 3, 4)),
    Row("Gather", gather, gathered),
    Row(
        "GatherElements",
        lambda node, x, i: torch.gather(
            x, node.get("axis", 0), torch.where(i < 0, i + x.shape[node.get("axis", 0)], i)
        ),
        picked_alike,
    ),
    Row("GatherND", gather_nd, gathered_nd),
    Row("TopK", top, topped, numbers=(1,)),
    Row("OneHot", one_hot, numbers_only, numbers=(1,)),
    Row("Trilu", trilu, whole_at(lambda *_: (-2, -1)), numbers=(1,)),
    Row("NonZero", nonzero, numbers_only),
    Row(
        "ReverseSequence",
        reverse_sequence,
        whole_at(lambda node, _: (node.get("time_axis", 0), node.get("batch_axis", 1))),
    ),
    Row("Compress", compress, refuse("Compress takes entries that only a run tells"), numbers=(1,)),
)
