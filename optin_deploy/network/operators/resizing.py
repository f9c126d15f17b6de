"""Padding, resizing and sampling: channels flow, places in the picture are frozen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row, Unsupported, refuse
from optin_deploy.network.operators.shapes import whole
from optin_deploy.network.operators.spatial import PLACES

COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")


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


def padded_where(flow: Flow) -> None:
    """Flow of Pad: axes that get entries, or lose some, stay whole."""
    amounts, along = flow.known(1), flow.known(3) if flow.has(3) else None
    if amounts is None or (flow.has(3) and along is None):
        raise Unsupported("Pad by amounts that follow from real numbers")
    axes, shape, out = flow.axes(0), flow.out_shape(), flow.axes(0)
    for entry, (before, behind) in enumerate(amounts.reshape(2, -1).T):
        at = entry if along is None else int(along[entry]) % len(axes)
        if before or behind:
            flow.freeze([axes[at]])
            out[at] = flow.fresh(shape[at], "Pad")
    flow.give(0, out)


def sized(flow: Flow) -> None:
    """Flow of what changes some sizes: axes that keep theirs stay what they are, the others are frozen."""
    axes, shape, why = flow.axes(0), flow.out_shape(), f"{flow.node.op} changes its size"
    changed = [position for position, size in enumerate(shape) if axes[position].size != size or position >= 2]
    flow.freeze([axes[position] for position in changed], why)
    sizes = zip(axes, shape, strict=True)
    flow.give(0, [axis if axis.size == size else flow.fresh(size, why) for axis, size in sizes])


def resized(flow: Flow) -> None:
    """Flow of Resize, which may list the sizes of all axes."""
    sized(flow)
    if flow.has(3) and "axes" not in flow.node.attributes:
        for entry, axis in enumerate(flow.axes(0)):
            flow.number(3, entry, axis)


def resize(
    node: Node, x: Tensor, region: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Resize along each axis by sampling one axis after the other."""
    axes = [axis % x.ndim for axis in node.get("axes", range(x.ndim))]
    asked = dict(zip(axes, whole(sizes), strict=True)) if sizes is not None and sizes.numel() else {}
    given = {} if asked or scales is None else dict(zip(axes, scales.tolist(), strict=True))
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if asked and policy != "stretch":
        factor = (min if policy == "not_larger" else max)(size / x.shape[axis] for axis, size in asked.items())
        asked = {axis: math.floor(factor * x.shape[axis] + 0.5) for axis in asked}
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
    how = node.get("coordinate_transformation_mode", "half_pixel")
    if how not in COORDINATES:
        raise Unsupported(f"Resize with coordinates by {how}")
    if x.is_meta:
        return x.new_empty([*x.shape[:axis], new, *x.shape[axis + 1 :]])
    at = torch.arange(new, dtype=torch.float64, device=x.device)
    if how == "align_corners":
        at = at * (size - 1) / (new - 1) if new > 1 else at * 0
    elif how == "asymmetric":
        at = at / scale
    elif how in ("half_pixel", "pytorch_half_pixel"):
        at = at * 0 if how == "pytorch_half_pixel" and new == 1 else (at + 0.5) / scale - 0.5
    else:
        at = size / 2 * (1 - new / (scale * size)) + (at + 0.5) / scale - 0.5
    if mode == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor")
        nearest = {
            "round_prefer_floor": torch.ceil(at - 0.5),
            "round_prefer_ceil": torch.floor(at + 0.5),
            "floor": torch.floor(at),
            "ceil": torch.ceil(at),
        }[rounding]
        return x.index_select(axis, nearest.long().clamp(0, size - 1))
    reach = 1 / scale if node.get("antialias", 0) and scale < 1 else 1.0  # then each entry is a mean over all it covers
    span = math.ceil((2 if mode == "cubic" else 1) * reach)
    floor = torch.floor(at)
    places = floor.long().unsqueeze(-1) + torch.arange(1 - span, span + 1, device=x.device)  # (new, taps)
    weight = _weight(node, (at.unsqueeze(-1) - places).abs() / reach)
    if node.get("exclude_outside", 0):
        weight = torch.where((places < 0) | (places >= size), torch.zeros_like(weight), weight)
    weight = weight / weight.sum(-1, keepdim=True)
    matrix = torch.zeros(new, size, dtype=torch.float64, device=x.device)
    matrix = matrix.scatter_add(1, places.clamp(0, size - 1), weight).to(x.dtype)
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


def _weight(node: Node, distance: Tensor) -> Tensor:
    """How much an entry counts at a distance from it."""
    if node.get("mode") != "cubic":
        return (1 - distance).clamp(min=0)
    a = node.get("cubic_coeff_a", -0.75)
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """Sample a picture at places that a second input tells."""
    if x.is_meta:
        return x.new_empty([*x.shape[:2], *grid.shape[1:-1]])
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


def affine_grid(node: Node, theta: Tensor, size: Tensor) -> Tensor:
    """Make the places where a GridSample reads an affinely moved picture."""
    return functional.affine_grid(theta, whole(size), align_corners=bool(node.get("align_corners", 0)))


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
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return resize(replace(node, attributes={**node.attributes, **old}), x, None, scales)


def fold(node: Node, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Put blocks back into a picture; where they overlap they are added up.

    Raises: Unsupported: the picture has not two axes, or other paddings on both sides.
    """
    sizes = whole(image)
    pads = list(node.get("pads", [0] * 2 * len(sizes)))
    if len(sizes) != 2 or pads[:2] != pads[2:]:
        raise Unsupported("Col2Im of other than two axes, or with uneven pads")
    dilations, strides = node.get("dilations", (1, 1)), node.get("strides", (1, 1))
    return functional.fold(x, tuple(sizes), tuple(whole(block)), tuple(dilations), tuple(pads[:2]), tuple(strides))


def folded(flow: Flow) -> None:
    """Flow of Col2Im: channels come before the entries of a block."""
    axes, shape = flow.axes(0), flow.out_shape()
    inner = flow.fresh(shape[1])
    flow.unify(axes[1], flow.product([inner, flow.fresh(axes[1].size // shape[1], "Col2Im")]))
    flow.freeze(axes[2:])
    flow.give(0, [axes[0], inner, *(flow.fresh(size, PLACES) for size in shape[2:])])


ROWS = (
    Row("Pad", pad, padded_where, numbers=(1, 3)),
    Row("Resize", resize, resized, numbers=(1, 2, 3)),
    Row("Upsample", upsample, sized, numbers=(1,)),
    Row("GridSample", grid_sample, sampled),
    Row("AffineGrid", affine_grid, refuse("AffineGrid makes places in a picture"), numbers=(1,)),
    Row("Col2Im", fold, folded, numbers=(1, 2)),
    Row("DepthToSpace", depth_to_space, blocks),
    Row("SpaceToDepth", space_to_depth, blocks),
)
