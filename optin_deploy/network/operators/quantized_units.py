"""Operators of ONNX Runtime that turn whole numbers into real ones, do what their plain namesakes do, and turn back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.elementwise import same, whole_at
from optin_deploy.network.operators.pools import average_pool, pooled
from optin_deploy.network.operators.quantized import dequantize, quantize
from optin_deploy.network.operators.row import Flow, Row, channels_first, optional
from optin_deploy.network.operators.selections import joined

RUNTIME = "com.microsoft"


def kind(x: Tensor) -> torch.dtype | None:
    """Type of whole numbers as they are stored; None where they come from a computation."""
    return None if x.is_floating_point() else x.dtype


def unary(name: str, compute: Callable[[Node, Tensor], Tensor], flow: Callable[[Flow], object] = same) -> Row:
    """Make the row of a function of one tensor, which has a scale and a zero before and after it."""

    def whole(
        node: Node,
        x: Tensor,
        x_scale: Tensor,
        x_zero: Tensor | None,
        y_scale: Tensor,
        y_zero: Tensor | None = None,
    ) -> Tensor:
        y = compute(node, dequantize(x, x_scale, x_zero))
        return quantize(y, y_scale, y_zero, kind(x) if y_zero is None else None)

    return Row(name, whole, flow, domain=RUNTIME)


def binary(name: str, compute: Callable[[Tensor, Tensor], Tensor]) -> Row:
    """Make the row of a function of two tensors."""

    def whole(
        _: Node,
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor | None,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor | None,
        *result: Tensor | None,
    ) -> Tensor:
        y_scale, y_zero = optional(result, 2)
        y = compute(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero))
        return quantize(y, y_scale, y_zero, kind(a) if y_zero is None else None)

    return Row(name, whole, lambda flow: flow.give(0, flow.broadcast((0, 3), flow.out_shape())), domain=RUNTIME)


def softmax(node: Node, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor) -> Tensor:
    """Normalise along an axis; before opset 13, along it and all behind it.

    ONNX Runtime counts in whole steps: of the inverse of the scale, it takes the whole part.
    """
    real, axis = dequantize(x, x_scale, x_zero), node.get("axis", -1)
    if node.get("opset", 13) >= 13:
        y = torch.softmax(real, axis)
    else:
        y = torch.softmax(real.flatten(axis % x.ndim), -1).reshape(x.shape)
    return quantize(y, 1 / torch.floor(1 / y_scale.float()).clamp(min=1).to(y.dtype), y_zero)


def softmax_axes(node: Node, rank: int) -> range:
    """Positions that QLinearSoftmax normalises over."""
    axis = node.get("axis", -1) % rank
    return range(axis, axis + 1 if node.get("opset", 13) >= 13 else rank)


def average(node: Node, x: Tensor) -> Tensor:
    """Take the mean of windows."""
    channels_first(node)
    return average_pool(node, x)


def global_average(node: Node, x: Tensor) -> Tensor:
    """Take the mean of all places."""
    channels_first(node)
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def pooled_axes(flow: Flow) -> None:
    """Flow of pools."""
    channels_first(flow.node)
    pooled(flow)


def where(
    _: Node,
    condition: Tensor,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    *result: Tensor,
) -> Tensor:
    """Choose between two tensors."""
    y_scale, y_zero = result
    return quantize(
        torch.where(condition, dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)), y_scale, y_zero
    )


def concat(node: Node, y_scale: Tensor, y_zero: Tensor, *inputs: Tensor) -> Tensor:
    """Join tensors, each with its scale and zero."""
    parts = [dequantize(*inputs[place : place + 3]) for place in range(0, len(inputs), 3)]
    return quantize(torch.cat(parts, node.attributes["axis"]), y_scale, y_zero)


ROWS = (
    unary("QLinearSigmoid", lambda _, x: torch.sigmoid(x)),
    unary("QLinearLeakyRelu", lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01))),
    Row("QLinearSoftmax", softmax, whole_at(softmax_axes), domain=RUNTIME),
    unary("QLinearAveragePool", average, pooled_axes),
    unary("QLinearGlobalAveragePool", global_average, pooled_axes),
    binary("QLinearAdd", torch.add),
    binary("QLinearMul", torch.mul),
    Row("QLinearWhere", where, lambda flow: flow.give(0, flow.broadcast((0, 1, 4), flow.out_shape())), domain=RUNTIME),
    Row("QLinearConcat", concat, lambda flow: joined(flow, slice(2, None, 3)), domain=RUNTIME),
)
