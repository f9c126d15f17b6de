"""Pooling: channels flow, places in the picture are frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row, Unsupported
from optin_deploy.network.operators.spatial import PLACES, padded, slid, window


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Take the largest entry of each window.

    Raises: Unsupported: somebody reads where it was.
    """
    if any(node.outputs[1:]):
        raise Unsupported("MaxPool that also tells the places")
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
    ceil = bool(node.get("ceil_mode", 0))
    if any(step != 1 for step in dilations):
        if ceil:
            raise Unsupported("AveragePool with dilations and ceil_mode")
        ones = torch.ones_like(x[:1, :1]) if not node.get("count_include_pad", 0) else None
        count = math.prod(kernel) if ones is None else window_sums(padded(ones, pads), kernel, strides, dilations)
        return window_sums(padded(x, pads), kernel, strides, dilations) / count
    pool: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]
    if not any(pads):
        return pool(x, kernel, strides, 0, ceil, False)  # type: ignore[no-any-return]
    mean: Tensor = pool(padded(x, pads), kernel, strides, 0, ceil, True)
    if node.get("count_include_pad", 0):
        return mean
    counted: Tensor = pool(padded(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil, True)
    return mean / counted


def window_sums(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Add up the entries of each window."""
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[x.ndim - 3]
    each = x.reshape(x.shape[0] * x.shape[1], 1, *x.shape[2:])
    sums: Tensor = convolve(
        each, torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device), None, strides, 0, dilations
    )
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def lp_pool(node: Node, x: Tensor) -> Tensor:
    """Take the norm of each window.

    Raises: Unsupported: the last window may reach over the end.
    """
    if node.get("ceil_mode", 0):
        raise Unsupported("LpPool with ceil_mode")
    kernel, power = list(node.attributes["kernel_shape"]), node.get("p", 2)
    strides, dilations, pads = window(node, x, kernel)
    sums: Tensor = window_sums(padded(x.abs() ** power, pads), kernel, strides, dilations) ** (1 / power)
    return sums


def global_lp_pool(node: Node, x: Tensor) -> Tensor:
    """Take the norm over all places."""
    power = node.get("p", 2)
    result: Tensor = (x.abs() ** power).sum(list(range(2, x.ndim)), keepdim=True) ** (1 / power)
    return result


def pooled(flow: Flow) -> None:
    """Flow of pooling: channels stay what they are."""
    axes = flow.axes(0)
    flow.give(0, [*axes[:2], *slid(flow, axes[2:], flow.out_shape()[2:])])


def pooled_wholly(flow: Flow) -> None:
    """Flow of a pool over all places: one is left, however large the picture is."""
    axes = flow.axes(0)
    flow.freeze(axes[2:], PLACES)
    flow.give(0, [*axes[:2], *(flow.fresh(1) for _ in axes[2:])])


def global_pool(name: str, compute: Any) -> Row:
    """Make the row of a pool over all places."""
    return Row(name, lambda _, x: compute(x, list(range(2, x.ndim)), True), pooled_wholly)


ROWS = (
    Row("MaxPool", max_pool, pooled),
    Row("AveragePool", average_pool, pooled),
    Row("LpPool", lp_pool, pooled),
    global_pool("GlobalAveragePool", torch.mean),
    global_pool("GlobalMaxPool", torch.amax),
    Row("GlobalLpPool", global_lp_pool, pooled_wholly),
)
