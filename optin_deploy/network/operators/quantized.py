"""Whole numbers for real ones, with scales and zero points: to and fro.

In a run, whole numbers stay in tensors of real numbers: products of them are exact, and gradients pass straight
through the rounding (Bengio, Léonard & Courville 2013, https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row
from optin_deploy.network.tensors import torch_dtype

BLOCK = "entries of one block, which share a scale"
DEFAULT_RANGE = torch.uint8


def rounded(x: Tensor) -> Tensor:
    """Round to the nearest whole number, halves to even ones; the gradient is that of the number itself."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def quantize(x: Tensor, scale: Tensor | float, zero: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Divide, round, shift and bound.

    Args:
        x: real numbers.
        scale: broadcasts to x.
        zero: broadcasts to x, in the type that is quantised to; None: 0.
        dtype: the type that is quantised to, where there is no zero to tell.
    """
    kind = dtype or (DEFAULT_RANGE if zero is None or zero.is_floating_point() else zero.dtype)
    limits = torch.iinfo(kind)
    whole = rounded(x / scale)
    return (whole if zero is None else whole + zero.to(whole.dtype)).clamp(limits.min, limits.max)


def centred(x: Tensor, zero: Tensor | None) -> Tensor:
    """Whole numbers less their zero, as real numbers."""
    real = x if x.is_floating_point() else x.to(torch.float32)
    return real if zero is None else real - zero.to(real.dtype)


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Shift and multiply."""
    return centred(x, zero).to(scale.dtype) * scale


def dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise by the range of all entries, which holds 0; returns whole numbers, scale and zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = rounded((-low / scale).clamp(0, 255))
    return quantize(x, scale, zero), scale, zero


def spread(node: Node, x: Tensor, parameter: Tensor) -> Tensor:
    """Let a scale or a zero broadcast to a tensor: one for all, one an entry of an axis, or one a block of entries."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    axis = node.get("axis", 1) % x.ndim
    if parameter.ndim == 1:
        return parameter.reshape([-1 if position == axis else 1 for position in range(x.ndim)])
    size = node.get("block_size", 0) or -(-x.shape[axis] // parameter.shape[axis])
    return parameter.repeat_interleave(size, axis).narrow(axis, 0, x.shape[axis])


def quantize_linear(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Quantise by given scales."""
    asked, shift = node.get("output_dtype", 0), None if zero is None else spread(node, x, zero)
    return quantize(x, spread(node, x, scale).to(x.dtype), shift, torch_dtype(asked) if asked else None)


def dequantize_linear(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Turn whole numbers into real ones, in the type of the scale or a wider one that the node asks for."""
    scales, asked = spread(node, x, scale), node.get("output_dtype", 0)
    if asked and scale.dtype != torch.float64:
        scales = scales.to(torch_dtype(asked))
    return dequantize(x, scales, None if zero is None else spread(node, x, zero))


def scaled(flow: Flow) -> None:
    """Flow of scales and zeros: one along an axis follows it; of a block, all entries stay together."""
    axes = flow.axes(0)
    for place in (1, 2):
        if not flow.has(place) or max(flow.shape(place), default=1) == 1:
            continue
        along = flow.node.get("axis", 1) % len(axes)
        if len(flow.shape(place)) == 1:
            flow.unify(flow.axes(place)[0], axes[along])
            continue
        for position, (axis, other) in enumerate(zip(axes, flow.axes(place), strict=True)):
            if position == along:
                blocks(flow, axis, other)
            else:
                flow.unify(axis, other)
    flow.give(0, axes)


def blocks(flow: Flow, axis: Axis, count: Axis) -> None:
    """Say that an axis is so many blocks of entries that stay together; a last block that is smaller freezes all."""
    if axis.size % count.size:
        flow.freeze([axis, count], f"{axis.size} entries are not whole blocks")
    else:
        flow.unify(axis, flow.product([count, flow.fresh(axis.size // count.size, BLOCK)]))


def ranged(flow: Flow) -> None:
    """Flow of DynamicQuantizeLinear, whose scale and zero follow from the range of all entries."""
    flow.ranged(0)
    for place in range(len(flow.node.outputs)):
        flow.give(place, [] if place else flow.axes(0))


ROWS = (
    *(Row("QuantizeLinear", quantize_linear, scaled, domain=domain) for domain in ("", "com.microsoft")),
    *(Row("DequantizeLinear", dequantize_linear, scaled, domain=domain) for domain in ("", "com.microsoft")),
    Row("DynamicQuantizeLinear", lambda _, x: dynamic(x), ranged),
)
