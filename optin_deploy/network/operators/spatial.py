"""Convolutions: channels flow, places in the picture are frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row

PLACES = "places in the picture"


def window(node: Node, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and paddings (those before all axes, then those behind) of a sliding window."""
    rank = x.ndim - 2
    strides = list(node.get("strides", [1] * rank))
    dilations = list(node.get("dilations", [1] * rank))
    pads = list(node.get("pads", [0] * 2 * rank))
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = [0] * 2 * rank
    elif mode.startswith("SAME"):
        for i, size in enumerate(x.shape[2:]):
            reach = dilations[i] * (kernel[i] - 1) + 1
            missing = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
            small, large = missing // 2, missing - missing // 2
            pads[i], pads[i + rank] = (small, large) if mode == "SAME_UPPER" else (large, small)
    return strides, dilations, pads


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the places: `pads` lists what comes before each axis, then what comes behind."""
    rank = len(pads) // 2
    return functional.pad(x, [pads[i + side * rank] for i in reversed(range(rank)) for side in (0, 1)], value=value)


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve over one, two or three axes."""
    strides, dilations, pads = window(node, x, weight.shape[2:])
    rank = x.ndim - 2
    if pads[:rank] != pads[rank:]:
        x, pads = padded(x, pads), [0] * rank
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    result: Tensor = convolve(x, weight, bias, strides, pads[:rank], dilations, node.get("group", 1))
    return result


def channels(
    flow: Flow, weight: list[Axis], *, bias: Sequence[int] = (2,), transposed: bool = False
) -> tuple[Axis, Axis, Axis]:
    """Unify the channels of a convolution; returns groups, input channels of a group, output channels of a group.

    Channels are groups times channels of a group: one group, a depthwise convolution and what lies between are alike.
    """
    count = flow.node.get("group", 1)
    inner, outer = (1, 0) if not transposed else (0, 1)
    x = flow.axes(0)
    groups, into, out = flow.fresh(count), flow.fresh(x[1].size // count), None
    if transposed:
        out = weight[1]
        flow.unify(weight[inner], flow.product([groups, into]))
    else:
        out = flow.fresh(weight[outer].size // count)
        flow.unify(weight[inner], into)
        flow.unify(weight[outer], flow.product([groups, out]))
    flow.unify(x[1], flow.product([groups, into]))
    if into.size > 1:
        flow.contract(0, 1)
    if count > 1:
        flow.attribute("group", groups)
    for place in bias:
        if flow.has(place) and flow.shape(place) == (groups.size * out.size,):
            flow.unify(flow.axes(place)[0], flow.product([groups, out]))
    return groups, into, out


def slid(flow: Flow, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Places behind a window: those before it, where it goes step by step and the size is the same for all pictures."""
    flow.freeze(axes, PLACES)
    strides = flow.node.get("strides", [1] * len(axes))
    return [
        axis if step == 1 and axis.size == size else flow.fresh(size, PLACES)
        for axis, size, step in zip(axes, shape, strides, strict=True)
    ]


def convolved(flow: Flow, *, at: int = 1, bias: Sequence[int] = (2,)) -> list[Axis]:
    """Flow of Conv; returns the axes of the output.

    Args: at: place of the weight.
        bias: places of vectors with an entry for each output channel.
    """
    x, weight, shape = flow.axes(0), flow.axes(at), flow.out_shape()
    groups, into, out = channels(flow, weight, bias=bias)
    places = slid(flow, x[2:], shape[2:])
    flow.freeze(weight[2:], PLACES)
    result = [x[0], flow.product([groups, out]), *places]
    flow.give(0, result)
    flow.macs([x[0], groups, into, out, *places, *weight[2:]])
    return result


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve the other way round: compute all places, then cut off what is padding, or add what is missing."""
    strides, dilations, pads = window(node, x, weight.shape[2:])
    rank = x.ndim - 2
    extra = list(node.get("output_padding", [0] * rank))
    convolve: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    result: Tensor = convolve(x, weight, None, strides, 0, 0, node.get("group", 1), dilations)
    mode = node.get("auto_pad", "NOTSET")
    sizes = node.get("output_shape", [size * step for size, step in zip(x.shape[2:], strides, strict=True)])
    if "output_shape" in node.attributes or mode.startswith("SAME"):
        for i, size in enumerate(sizes[-rank:]):
            spare = max(0, result.shape[2 + i] + extra[i] - size)
            extra[i] += max(0, size - result.shape[2 + i] - extra[i])
            small, large = spare // 2, spare - spare // 2
            pads[i], pads[i + rank] = (small, large) if mode == "SAME_UPPER" else (large, small)
    result = padded(result, [-cut for cut in pads[:rank]] + [extra[i] - pads[i + rank] for i in range(rank)])
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def conv_transposed(flow: Flow) -> None:
    """Flow of ConvTranspose: the weight has its input channels first."""
    x, weight, shape = flow.axes(0), flow.axes(1), flow.out_shape()
    groups, into, out = channels(flow, weight, transposed=True)
    flow.freeze(weight[2:], PLACES)
    flow.give(0, [x[0], flow.product([groups, out]), *slid(flow, x[2:], shape[2:])])
    flow.macs([x[0], groups, into, out, *x[2:], *weight[2:]])


ROWS = (
    Row("Conv", conv, convolved, factors=(0, 1)),
    Row("ConvTranspose", conv_transpose, conv_transposed, factors=(0, 1)),
)
