"""Reductions: the axes that they run over stay whole, but where a number of each channel is added up, and where the
largest channel of a picture is taken, none of which is negative: a channel that is masked is then none of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row
from optin_deploy.network.operators.shapes import whole

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def reducing(name: str, compute: Reduction) -> Row:
    """Make the row of a reduction over some axes, all if none are named."""

    def reduced(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        asked = node.get("axes") if axes is None else whole(axes)
        if not asked and node.get("noop_with_empty_axes", 0):
            return x
        over = [axis % x.ndim for axis in asked] if asked else list(range(x.ndim))
        return compute(x, over, bool(node.get("keepdims", 1))).to(x.dtype) if over else x

    return Row(name, reduced, flow, numbers=(1,))


def flow(flow: Flow) -> None:
    """Flow of a reduction."""
    axes = flow.axes(0)
    asked: Sequence[int] | None = flow.node.get("axes")
    if asked is None and flow.has(1):
        known = flow.known(1)
        asked = None if known is None else [int(axis) for axis in known]
    if not asked and flow.node.get("noop_with_empty_axes", 0):
        flow.give(0, axes)
        return
    over = {axis % len(axes) for axis in asked} if asked else set(range(len(axes)))
    largest = flow.node.op == "ReduceMax" and over == {1} and len(axes) > 3 and flow.never_negative(0)
    if largest or (flow.node.op == "ReduceSum" and sums_statistics(flow.shape(0), over)):
        for position in over:
            flow.contract(0, position)
    else:
        flow.freeze([axes[position] for position in sorted(over)])
    kept = [flow.fresh(1) if position in over else axis for position, axis in enumerate(axes)]
    flow.give(0, kept if flow.node.get("keepdims", 1) else [axis for i, axis in enumerate(kept) if i not in over])


def sums_statistics(shape: Sequence[object], over: Collection[int]) -> bool:
    """Whether one number of each channel of a picture is added up, as where each is compared with the mean of all.

    Sums over what lies in one place of a picture, or of a text, normalise the stream, whose channels stay whole.
    """
    others = [size for position, size in enumerate(shape) if position and position not in over]
    return len(shape) > 3 and 0 not in over and len(over) == 1 and all(size == 1 for size in others)


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Multiply all entries."""
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def accumulate(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """Add up along an axis, from either end, with or without the entry itself."""
    along = whole(axis)[0]
    x = x.flip(along) if node.get("reverse", 0) else x
    total: Tensor = x.cumsum(along).to(x.dtype)
    total = total - x if node.get("exclusive", 0) else total
    return total.flip(along) if node.get("reverse", 0) else total


def accumulated(flow: Flow) -> None:
    """Flow of CumSum: its axis stays whole."""
    axes, along = flow.axes(0), flow.known(1)
    flow.freeze(axes if along is None else [axes[int(along.reshape(-1)[0])]])
    flow.give(0, axes)


def determined(flow: Flow) -> None:
    """Flow of Det: matrices stay whole."""
    axes = flow.axes(0)
    flow.freeze(axes[-2:])
    flow.give(0, axes[:-2])


def arg(name: str, compute: Callable[..., Tensor]) -> Row:
    """Make the row of a search for the place of an extreme."""

    def found(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        last = node.get("select_last_index", 0)
        place: Tensor = compute(x.flip(axis) if last else x, axis, keepdim=keep)
        result: Tensor = x.shape[axis] - 1 - place if last else place
        return result

    def placed(flow: Flow) -> None:
        axes = flow.axes(0)
        along = flow.node.get("axis", 0) % len(axes)
        flow.freeze([axes[along]])
        kept = [flow.fresh(1)] if flow.node.get("keepdims", 1) else []
        flow.give(0, [*axes[:along], *kept, *axes[along + 1 :]])

    return Row(name, found, placed)


ROWS = (
    reducing("ReduceMean", lambda x, axes, keep: x.mean(axes, keep)),
    reducing("ReduceSum", lambda x, axes, keep: x.sum(axes, keep)),
    reducing("ReduceMax", lambda x, axes, keep: x.amax(axes, keep)),
    reducing("ReduceMin", lambda x, axes, keep: x.amin(axes, keep)),
    reducing("ReduceProd", product),
    reducing("ReduceL1", lambda x, axes, keep: x.abs().sum(axes, keep)),
    reducing("ReduceL2", lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    reducing("ReduceSumSquare", lambda x, axes, keep: x.square().sum(axes, keep)),
    reducing("ReduceLogSum", lambda x, axes, keep: x.sum(axes, keep).log()),
    reducing("ReduceLogSumExp", lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    Row("CumSum", accumulate, accumulated, numbers=(1,)),
    Row("Det", lambda _, x: torch.linalg.det(x), determined),
    arg("ArgMax", torch.argmax),
    arg("ArgMin", torch.argmin),
)
