"""Products of whole numbers: exact, with a scale and a zero for each factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.attention_runtime import flow_self_attention, self_attention
from optin_deploy.network.operators.products import gemm_axes, matmul_axes
from optin_deploy.network.operators.quantized import centred, dynamic, quantize
from optin_deploy.network.operators.row import Flow, Result, Row, Unsupported, channels_first, optional
from optin_deploy.network.operators.spatial import conv, convolved

EXACT = 2**24
"""Whole numbers up to here are exact in single precision."""


def precise(terms: int, *tensors: Tensor) -> list[Tensor]:
    """Give factors a type in which a sum of so many products of 8-bit numbers is exact."""
    wide = terms * 2**16 > EXACT or any(tensor.dtype == torch.float64 for tensor in tensors)
    return [tensor.to(torch.float64 if wide else torch.float32) for tensor in tensors]


def result_type(*tensors: Tensor) -> torch.dtype:
    """Type of a product of whole numbers: single precision, or double where a factor has it."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def whole_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices of whole numbers."""
    one, other = precise(a.shape[-1], a, b)
    return (one @ other).to(result_type(a, b))


def whole_conv(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve whole numbers."""
    one, other = precise(math.prod(weight.shape[1:]), x, weight)
    return conv(node, one, other).to(result_type(x, weight))


def again(sums: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Quantise sums of whole numbers; ONNX Runtime multiplies by one factor, so that halves are the same."""
    return quantize(sums * scale.to(sums.dtype), 1.0, zero)


def along_rows(parameter: Tensor | None) -> Tensor | None:
    """A scale or zero of the left factor, which has one for all or one a row."""
    return parameter if parameter is None or parameter.ndim != 1 else parameter[:, None]


def along_channels(parameter: Tensor | None, rank: int) -> Tensor | None:
    """A scale or zero of a convolution's weight, which has one for all or one an output channel."""
    if parameter is None or parameter.numel() == 1:
        return None if parameter is None else parameter.reshape(())
    return parameter.reshape(-1, *[1] * (rank - 1))


def matmul_integer(_: Node, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Multiply what differs from the zeros."""
    return whole_product(centred(a, along_rows(single(a_zero))), centred(b, single(b_zero)))


def single(parameter: Tensor | None) -> Tensor | None:
    """One parameter for all as a number."""
    return parameter.reshape(()) if parameter is not None and parameter.numel() == 1 else parameter


def conv_integer(
    node: Node, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    """Convolve what differs from the zeros."""
    return whole_conv(node, centred(x, single(x_zero)), centred(weight, along_channels(weight_zero, weight.ndim)))


def qlinear_matmul(
    _: Node,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    *result: Tensor,
) -> Tensor:
    """Multiply, and quantise the product."""
    y_scale, y_zero = result
    product = whole_product(centred(a, along_rows(single(a_zero))), centred(b, single(b_zero)))
    left = along_rows(single(a_scale))
    assert left is not None
    return again(product, left * b_scale / y_scale, y_zero)


def qlinear_conv(
    node: Node,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    """Convolve, add a bias, and quantise the sum."""
    y_scale, y_zero, bias = optional(rest, 3)
    channels_first(node)
    sums = whole_conv(node, centred(x, single(x_zero)), centred(weight, along_channels(weight_zero, weight.ndim)))
    if bias is not None:
        sums = sums + bias.to(sums.dtype).reshape(-1, *[1] * (x.ndim - 2))
    scale = along_channels(x_scale * weight_scale, x.ndim - 1)
    assert scale is not None
    return again(sums, scale / y_scale, y_zero)


def qgemm(
    node: Node,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    """Multiply two matrices, add a third; quantise the sum if a scale is given."""
    b_zero, c, y_scale, y_zero = optional(rest, 4)
    one, other = centred(a, single(a_zero)), b.T if node.get("transB", 0) else b
    sums = whole_product(one.T if node.get("transA", 0) else one, centred(other, single(b_zero)))
    sums = sums if c is None else sums + c.to(sums.dtype)
    scale = a_scale * b_scale * node.get("alpha", 1.0)
    return sums * scale.to(sums.dtype) if y_scale is None else again(sums, scale / y_scale, y_zero)


def matmul_integer_to_float(
    _: Node,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply whole numbers, and scale the product."""
    product = whole_product(centred(a, single(a_zero)), centred(b, single(b_zero)))
    real = product.to(a_scale.dtype) * (a_scale * b_scale)
    return real if bias is None else real + bias


def dynamic_matmul(
    _: Node, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Quantise by the range of all entries, multiply, and add a bias."""
    product = dynamic_product(a, b, b_scale, b_zero)
    return product if bias is None else product + bias


def dynamic_product(a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None) -> Tensor:
    """Quantise by the range of all entries, and multiply by whole numbers."""
    whole, scale, zero = dynamic(a)
    return whole_product(centred(whole, zero), centred(b, single(b_zero))).to(a.dtype) * (scale * b_scale)


def qattention(
    node: Node,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *rest: Tensor | None,
) -> Result:
    """Attend with queries, keys and values that are projected from whole numbers."""
    mask, x_zero, weight_zero, past = optional(rest, 4)
    product = whole_product(centred(x, single(x_zero)), centred(weight, single(weight_zero)))
    projected = product.to(bias.dtype) * (x_scale * weight_scale) + bias
    return self_attention(node, projected, mask, past, None)


def numbers(flow: Flow, places: Sequence[int]) -> None:
    """Refuse scales and zeros of an activation that are not one number each: a mask could not put such a zero."""
    for place in places:
        if flow.has(place) and math.prod(flow.shape(place)) > 1:
            raise Unsupported(f"{flow.node.op} with a scale or zero point for each row")


def per_column(flow: Flow, places: Sequence[int], out: Axis) -> None:
    """Unify what has one entry for each column, or one for all."""
    for place in places:
        if flow.has(place) and math.prod(flow.shape(place)) > 1:
            flow.unify(flow.axes(place)[-1], out)


def matmul(
    name: str,
    compute: Callable[..., Tensor],
    *,
    factors: tuple[int, int] = (0, 1),
    zeros: tuple[int, int] | None = None,
    singles: Sequence[int] = (),
    columns: Sequence[int],
    domain: str = "",
) -> Row:
    """Make the row of a product of matrices.

    Args:
        name: the operator.
        compute: as in `Row`.
        factors: places of the two.
        zeros: places of their zeros; None: the first is quantised inside, by the range of all its entries.
        singles: places of what must be one number.
        columns: places of what has one entry a column.
        domain: as in `Row`.
    """

    def flow_of(flow: Flow) -> None:
        numbers(flow, singles)
        if not flow.stored(factors[1]):
            numbers(flow, columns)
        if zeros is None:
            flow.ranged(0)
        per_column(flow, columns, matmul_axes(flow, places=factors)[-1])

    return Row(
        name, compute, flow_of, domain=domain, factors=factors, zeros=dict(zip(factors, zeros or (), strict=False))
    )


def numbered(places: Sequence[int], product: Callable[[Flow], object]) -> Callable[[Flow], None]:
    """Make the flow of a product whose inputs at some places must be one number each, and whose channels come first."""

    def flow(flow: Flow) -> None:
        channels_first(flow.node)
        numbers(flow, places)
        product(flow)

    return flow


def qgemm_axes(flow: Flow) -> None:
    """Flow of the product in QGemm."""
    per_column(flow, (4, 5), gemm_axes(flow, places=(0, 3, 6))[-1])


self_attended = partial(flow_self_attention, weight=1, columns=(2, 4, 7), mask=5, past=8, added=-1)
conv_axes = partial(convolved, at=3, bias=(4, 5, 8))
RUNTIME = "com.microsoft"
ROWS = (
    matmul("MatMulInteger", matmul_integer, zeros=(2, 3), singles=(2,), columns=(3,)),
    matmul("QLinearMatMul", qlinear_matmul, factors=(0, 3), zeros=(2, 5), singles=(1, 2), columns=(4, 5)),
    matmul(
        "MatMulIntegerToFloat",
        matmul_integer_to_float,
        zeros=(4, 5),
        singles=(2, 4),
        columns=(3, 5, 6),
        domain=RUNTIME,
    ),
    matmul("DynamicQuantizeMatMul", dynamic_matmul, columns=(2, 3, 4), domain=RUNTIME),
    Row("QGemm", qgemm, numbered((1, 2), qgemm_axes), domain=RUNTIME, factors=(0, 3), zeros={0: 2, 3: 5}),
    Row("ConvInteger", conv_integer, numbered((2,), partial(convolved, bias=(3,))), factors=(0, 1), zeros={0: 2}),
    *(
        Row("QLinearConv", qlinear_conv, numbered((1, 2), conv_axes), domain=domain, factors=(0, 3), zeros={0: 2})
        for domain in ("", RUNTIME)
    ),
    Row("QAttention", qattention, numbered((3, 6), self_attended), domain=RUNTIME, factors=(0, 1), zeros={0: 6}),
)
