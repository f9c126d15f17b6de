"""Normalisations: the axes that they run over stay whole; scales and shifts lie along the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.elementwise import together, whole_at
from optin_deploy.network.operators.row import Flow, Row, Unsupported


def layer_norm(
    node: Node, x: Tensor, scale: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalise over the last axes; mean and deviation are given where somebody reads them."""
    axis = node.get("axis", -1) % x.ndim
    over, epsilon = list(range(axis, x.ndim)), node.get("epsilon", 1e-5)
    size = tuple(x.shape[axis:])
    y: Tensor
    if x.is_meta:  # torch finds this shape in Python, a hundred times as slowly
        y = x.new_empty(np.broadcast_shapes(x.shape, *(each.shape for each in (scale, shift) if each is not None)))
    elif tuple(scale.shape) == size and (shift is None or tuple(shift.shape) == size):
        y = functional.layer_norm(x, size, scale, shift, epsilon)
    else:
        y = functional.layer_norm(x, size, None, None, epsilon) * scale
        y = y if shift is None else y + shift
    if not any(node.outputs[1:]):
        return y, None, None
    mean = x.mean(over, keepdim=True)
    return y, mean, (x.var(over, correction=0, keepdim=True) + epsilon).rsqrt()


def rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """Divide by the root mean square over the last axes."""
    over = list(range(node.get("axis", -1) % x.ndim, x.ndim))
    epsilon: float = node.get("epsilon", 1e-5)
    return x * (x.square().mean(over, keepdim=True) + epsilon).rsqrt() * scale


def over_last(flow: Flow) -> None:
    """Flow of normalisations from an axis to the last."""
    start, axes = flow.node.get("axis", -1) % len(flow.shape(0)), together(flow)
    flow.freeze(axes[start:])
    flow.give(0, axes)
    for place in range(1, len(flow.node.outputs)):
        flow.give(place, [*axes[:start], *(flow.fresh(1) for _ in axes[start:])])


def batch_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Scale and shift each channel, as in inference.

    Raises: Unsupported: the node is in training mode.
    """
    if node.get("training_mode", 0):
        raise Unsupported("BatchNormalization in training mode")
    if x.is_meta:  # torch's own asks for more than shapes there
        return torch.empty_like(x)
    result: Tensor = functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, node.get("epsilon", 1e-5))
    return result


def per_channel(flow: Flow) -> None:
    """Flow of scales and shifts that lie along the channels."""
    axes = flow.axes(0)
    for place in range(1, len(flow.node.inputs)):
        if flow.has(place):
            flow.unify(flow.axes(place)[0], axes[1])
    flow.give(0, axes)


def instance_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise each channel of each sample."""
    if x.is_meta:
        return torch.empty_like(x)
    return functional.instance_norm(x, None, None, scale, shift, True, 0.0, node.get("epsilon", 1e-5))


def within_channels(flow: Flow) -> None:
    """Flow of InstanceNormalization: all axes behind the channels stay whole."""
    flow.freeze(flow.axes(0)[2:])
    per_channel(flow)


def group_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise over groups of channels; before opset 21 a scale belongs to a group."""
    groups = node.attributes["num_groups"]
    repeats = x.shape[1] // scale.shape[0]
    scale, shift = (each.repeat_interleave(repeats) for each in (scale, shift))
    return functional.group_norm(x, groups, scale, shift, node.get("epsilon", 1e-5))


def grouped(flow: Flow) -> None:
    """Flow of GroupNormalization: whole groups are units, what they hold stays whole."""
    axes = flow.axes(0)
    count = flow.node.attributes["num_groups"]
    groups, inner = flow.fresh(count), flow.fresh(axes[1].size // count, "GroupNormalization")
    flow.unify(axes[1], flow.product([groups, inner]))
    flow.freeze(axes[2:])
    for place in (1, 2):
        flow.unify(flow.axes(place)[0], axes[1] if flow.shape(place)[0] == axes[1].size else groups)
    flow.attribute("num_groups", groups)
    flow.give(0, axes)


def softmax_like(name: str, compute: Callable[[Tensor, int], Tensor]) -> Row:
    """Make the row of a softmax; before opset 13 it runs over all axes from the one that is named."""

    def computed(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return compute(x, node.get("axis", -1))
        axis = node.get("axis", 1) % x.ndim
        return compute(x.flatten(axis), axis).reshape(x.shape)

    def over(node: Node, rank: int) -> range:
        old = node.opset < 13
        axis = node.get("axis", 1 if old else -1) % rank
        return range(axis, rank if old else axis + 1)

    return Row(name, computed, whole_at(over))


def lp_norm(node: Node, x: Tensor) -> Tensor:
    """Divide by a norm."""
    axis = node.get("axis", -1)
    norm = x.norm(node.get("p", 2), axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def local_response(node: Node, x: Tensor) -> Tensor:
    """Divide by the energy of neighbouring channels."""
    size = node.attributes["size"]
    squares = functional.pad(x.square().movedim(1, -1), [(size - 1) // 2, size // 2]).unfold(-1, size, 1).sum(-1)
    energy = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * squares.movedim(-1, 1)
    result: Tensor = x / energy ** node.get("beta", 0.75)
    return result


def mean_variance(node: Node, x: Tensor) -> Tensor:
    """Normalise over some axes."""
    over = list(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True).sqrt() + 1e-9)


ROWS = (
    Row("LayerNormalization", layer_norm, over_last),
    Row("RMSNormalization", rms_norm, over_last),
    Row("BatchNormalization", batch_norm, per_channel),
    Row("InstanceNormalization", instance_norm, within_channels),
    Row("GroupNormalization", group_norm, grouped),
    softmax_like("Softmax", torch.softmax),
    softmax_like("LogSoftmax", torch.log_softmax),
    softmax_like("Hardmax", lambda x, axis: torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)),
    Row("LpNormalization", lp_norm, whole_at(lambda node, _: (node.get("axis", -1),))),
    Row("LRN", local_response, whole_at(lambda *_: (1,))),
    Row("MeanVarianceNormalization", mean_variance, whole_at(lambda node, _: node.get("axes", (0, 2, 3)))),
)
