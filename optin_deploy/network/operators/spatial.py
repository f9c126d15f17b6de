"""Convolutions, pooling and resizing: channels flow, places in the picture are frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row
from optin_deploy.network.operators.shapes import whole

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


def convolved(flow: Flow, *, at: int = 1, bias: Sequence[int] = (2,)) -> None:
    """Flow of Conv.

    Args: at: place of the weight.
        bias: places of vectors with an entry for each output channel.
    """
    x, weight, shape = flow.axes(0), flow.axes(at), flow.out_shape()
    groups, into, out = channels(flow, weight, bias=bias)
    places = [flow.fresh(size, PLACES) for size in shape[2:]]
    flow.freeze([*x[2:], *weight[2:]], PLACES)
    flow.give(0, [x[0], flow.product([groups, out]), *places])
    flow.macs([x[0], groups, into, out, *places, *weight[2:]])


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve the other way round.

    Raises: NotImplementedError: padding that follows from the size asked for.
    """
    if node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
        raise NotImplementedError("ConvTranspose with auto_pad or output_shape")
    strides, dilations, pads = window(node, x, weight.shape[2:])
    rank = x.ndim - 2
    extra = list(node.get("output_padding", [0] * rank))
    convolve: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    whole_: Tensor = convolve(x, weight, bias, strides, 0, 0, node.get("group", 1), dilations)
    more = [max(0, add - pads[i + rank]) for i, add in enumerate(extra)]
    if any(more):  # the padding asked for behind reaches over the end: these places see only the bias
        whole_ = padded(whole_, [0] * rank + more)
        if bias is not None:
            raise NotImplementedError("ConvTranspose with output_padding beyond its pads")
    index: list[slice] = [slice(None), slice(None)]
    for i in range(rank):
        index.append(slice(pads[i], whole_.shape[2 + i] - max(0, pads[i + rank] - extra[i])))
    return whole_[tuple(index)]


def conv_transposed(flow: Flow) -> None:
    """Flow of ConvTranspose: the weight has its input channels first."""
    x, weight, shape = flow.axes(0), flow.axes(1), flow.out_shape()
    groups, into, out = channels(flow, weight, transposed=True)
    flow.freeze([*x[2:], *weight[2:]], PLACES)
    flow.give(0, [x[0], flow.product([groups, out]), *(flow.fresh(size, PLACES) for size in shape[2:])])
    flow.macs([x[0], groups, into, out, *x[2:], *weight[2:]])


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Take the largest entry of each window."""
    kernel = list(node.attributes["kernel_shape"])
    strides, dilations, pads = window(node, x, kernel)
    pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.ndim - 3]
    lowest = torch.finfo(x.dtype).min if x.is_floating_point() else torch.iinfo(x.dtype).min
    ceil = bool(node.get("ceil_mode", 0))
    result: Tensor = pool(padded(x, pads, lowest) if any(pads) else x, kernel, strides, 0, dilations, ceil_mode=ceil)
    return result


def average_pool(node: Node, x: Tensor) -> Tensor:
    """Take the mean of each window; padding counts only where the node says so."""
    kernel = list(node.attributes["kernel_shape"])
    strides, dilations, pads = window(node, x, kernel)
    if any(step != 1 for step in dilations):
        raise NotImplementedError("AveragePool with dilations")
    pool: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]
    ceil = bool(node.get("ceil_mode", 0))
    if not any(pads):
        return pool(x, kernel, strides, 0, ceil, False)  # type: ignore[no-any-return]
    mean: Tensor = pool(padded(x, pads), kernel, strides, 0, ceil, True)
    if node.get("count_include_pad", 0):
        return mean
    counted: Tensor = pool(padded(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil, True)
    return mean / counted


def pooled(flow: Flow) -> None:
    """Flow of pooling: channels stay what they are."""
    axes, shape = flow.axes(0), flow.out_shape()
    flow.freeze(axes[2:], PLACES)
    for place, name in enumerate(flow.node.outputs):
        if name:
            flow.give(place, [*axes[:2], *(flow.fresh(size, PLACES) for size in shape[2:])])


def global_pool(name: str, compute: Any) -> Row:
    """Make the row of a pool over all places."""
    return Row(name, lambda _, x: compute(x, list(range(2, x.ndim)), True), pooled)


def pad(node: Node, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """Pad by a constant, the edge, its mirror or the other end; negative amounts cut."""
    amounts = whole(pads)
    rank = len(amounts) // 2
    where = [axis % x.ndim for axis in whole(axes)] if axes is not None else list(range(rank))
    before, behind = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(where):
        before[axis], behind[axis] = amounts[i], amounts[i + rank]
    mode = node.get("mode", "constant")
    if mode == "constant":
        fill = 0.0 if value is None else value.item() if value.device.type != "meta" else 0.0
        flat = [amount for axis in reversed(range(x.ndim)) for amount in (before[axis], behind[axis])]
        return functional.pad(x, flat, value=fill)
    for axis in range(x.ndim):  # by index: torch pads edges and mirrors of the last axes only
        size = x.shape[axis]
        at = torch.arange(-before[axis], size + behind[axis], device=x.device)
        if mode == "reflect":
            at = (size - 1) - (at.remainder(2 * (size - 1)) - (size - 1)).abs() if size > 1 else at * 0
        at = at.remainder(size) if mode == "wrap" else at.clamp(0, size - 1)
        x = x.index_select(axis, at)
    return x


def sized(flow: Flow) -> None:
    """Flow of what changes some sizes: axes that keep theirs stay what they are, the others are frozen."""
    axes, shape = flow.axes(0), flow.out_shape()
    changed = [position for position, size in enumerate(shape) if axes[position].size != size or position >= 2]
    flow.freeze([axes[position] for position in changed], f"{flow.node.op} changes its size")
    flow.give(
        0,
        [
            axis if axis.size == size else flow.fresh(size, f"{flow.node.op} changes its size")
            for axis, size in zip(axes, shape, strict=True)
        ],
    )


def resized(flow: Flow) -> None:
    """Flow of Resize, which may list the sizes of all axes."""
    sized(flow)
    if flow.has(3) and "axes" not in flow.node.attributes:
        for entry, axis in enumerate(flow.axes(0)):
            flow.number(3, entry, axis)


def resize(
    node: Node, x: Tensor, region: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Resize along each axis by sampling one axis after the other.

    Raises: NotImplementedError: a form that no exporter of networks writes.
    """
    axes = [axis % x.ndim for axis in node.get("axes", range(x.ndim))]
    asked = dict(zip(axes, whole(sizes), strict=True)) if sizes is not None and sizes.numel() else {}
    given = {} if asked or scales is None else dict(zip(axes, scales.tolist(), strict=True))
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch" or node.get("antialias", 0):
        raise NotImplementedError("Resize that keeps the aspect ratio, or with antialias")
    for axis in axes:
        size = x.shape[axis]
        new = asked.get(axis) if asked else math.floor(size * given[axis])
        if new == size and (asked or given[axis] == 1):
            continue
        assert new is not None
        x = _resampled(node, x, axis, new, new / size if asked else given[axis])
    return x


def _resampled(node: Node, x: Tensor, axis: int, new: int, scale: float) -> Tensor:
    size, mode = x.shape[axis], node.get("mode", "nearest")
    at = torch.arange(new, dtype=torch.float64, device=x.device)
    how = node.get("coordinate_transformation_mode", "half_pixel")
    if how == "align_corners":
        at = at * (size - 1) / (new - 1) if new > 1 else at * 0
    elif how == "asymmetric":
        at = at / scale
    elif how in ("half_pixel", "pytorch_half_pixel"):
        at = at * 0 if how == "pytorch_half_pixel" and new == 1 else (at + 0.5) / scale - 0.5
    elif how == "half_pixel_symmetric":
        at = size / 2 * (1 - new / (scale * size)) + (at + 0.5) / scale - 0.5
    else:
        raise NotImplementedError(f"Resize with coordinates by {how}")
    if mode == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor")
        nearest = {
            "round_prefer_floor": torch.ceil(at - 0.5),
            "round_prefer_ceil": torch.floor(at + 0.5),
            "floor": torch.floor(at),
            "ceil": torch.ceil(at),
        }[rounding]
        return x.index_select(axis, nearest.long().clamp(0, size - 1))
    taps = torch.arange(-1, 3, device=x.device) if mode == "cubic" else torch.arange(0, 2, device=x.device)
    floor = torch.floor(at)
    places = floor.long().unsqueeze(-1) + taps  # (new, taps)
    distance = (at.unsqueeze(-1) - places).abs()
    weight = _cubic(distance, node.get("cubic_coeff_a", -0.75)) if mode == "cubic" else (1 - distance).clamp(min=0)
    if node.get("exclude_outside", 0):
        weight = torch.where((places < 0) | (places >= size), torch.zeros_like(weight), weight)
        weight = weight / weight.sum(-1, keepdim=True)
    matrix = torch.zeros(new, size, dtype=torch.float64, device=x.device)
    matrix = matrix.scatter_add(1, places.clamp(0, size - 1), weight).to(x.dtype)
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


def _cubic(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """Sample a picture at places that a second input tells."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "linear"), node.get("mode", "linear"))
    return functional.grid_sample(
        x, grid, mode, node.get("padding_mode", "zeros"), align_corners=bool(node.get("align_corners", 0))
    )


def sampled(flow: Flow) -> None:
    """Flow of GridSample: channels of the picture, places of the grid."""
    x, grid = flow.axes(0), flow.axes(1)
    flow.unify(x[0], grid[0])
    flow.freeze([*x[2:], *grid[1:]], PLACES)
    flow.give(0, [*x[:2], *grid[1:-1]])


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Spread channels over places."""
    block = node.attributes["blocksize"]
    n, c, h, w = x.shape
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Gather places into channels."""
    block = node.attributes["blocksize"]
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def blocks(flow: Flow) -> None:
    """Flow of DepthToSpace and SpaceToDepth: one side's channels are blocks times the other's."""
    axes, shape = flow.axes(0), flow.out_shape()
    block = flow.fresh(flow.node.attributes["blocksize"] ** 2, flow.node.op)
    flow.freeze(axes[2:], PLACES)
    places = [flow.fresh(size, PLACES) for size in shape[2:]]
    if flow.node.op == "SpaceToDepth":
        flow.give(0, [axes[0], flow.product([block, axes[1]]), *places])
        return
    inner = flow.fresh(shape[1])
    first = flow.node.get("mode", "DCR") == "DCR"
    flow.unify(axes[1], flow.product([block, inner] if first else [inner, block]))
    flow.give(0, [axes[0], inner, *places])


def upsample(node: Node, x: Tensor, scales: Tensor) -> Tensor:
    """Resize as before opset 10."""
    old = Node(
        **{
            **vars(node),
            "attributes": {**node.attributes, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        }
    )
    return resize(old, x, None, scales)


ROWS = (
    Row("Conv", conv, convolved),
    Row("ConvTranspose", conv_transpose, conv_transposed),
    Row("MaxPool", max_pool, pooled),
    Row("AveragePool", average_pool, pooled),
    global_pool("GlobalAveragePool", torch.mean),
    global_pool("GlobalMaxPool", torch.amax),
    Row("Pad", pad, sized, numbers=(1, 3)),
    Row("Resize", resize, resized, numbers=(1, 2, 3)),
    Row("Upsample", upsample, sized, numbers=(1,)),
    Row("GridSample", grid_sample, sampled),
    Row("DepthToSpace", depth_to_space, blocks),
    Row("SpaceToDepth", space_to_depth, blocks),
)
