"""Operators that put entries into a copy: axes beside those that are written to are those of what is put there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row


def scatter_elements(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Put entries into a copy."""
    axis = node.get("axis", 0)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(node.get("reduction", "none"))
    if how is None:
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, how)


def scattered_alike(flow: Flow) -> None:
    """Flow of ScatterElements: its axis stays whole, with that of what is put there; entries of the others are put
    into their own places, where all are."""
    axes, indices, updates = (flow.axes(place) for place in range(3))
    along = flow.node.get("axis", 0) % len(axes)
    for position, three in enumerate(zip(axes, indices, updates, strict=True)):
        if position == along or len({axis.size for axis in three}) > 1:
            flow.freeze(three)
        else:
            flow.unify(three[0], three[1])
            flow.unify(three[0], three[2])
    flow.give(0, axes)


def scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Put slices into a copy: slices are rows of a matrix, written by their numbers."""
    depth = indices.shape[-1]
    inner = math.prod(x.shape[depth:])
    rows = torch.zeros_like(indices[..., 0])
    for size, index in zip(x.shape[:depth], indices.unbind(-1), strict=True):
        rows = rows * size + torch.where(index < 0, index + size, index)
    alike = replace(node, attributes={**node.attributes, "axis": 0})
    wide = rows.reshape(-1, 1).expand(rows.numel(), inner)
    flat = x.reshape(math.prod(x.shape[:depth]), inner)
    return scatter_elements(alike, flat, wide, updates.reshape(rows.numel(), inner)).reshape(x.shape)


def scattered_nd(flow: Flow) -> None:
    """Flow of ScatterND: axes behind those that are written to are those of the updates."""
    axes, updates = flow.axes(0), flow.axes(2)
    depth = flow.shape(1)[-1]
    flow.freeze(axes[:depth])
    for axis, other in zip(axes[depth:], updates[len(updates) - len(axes) + depth :], strict=True):
        flow.unify(axis, other)
    flow.give(0, axes)


ROWS = (
    Row("ScatterElements", scatter_elements, scattered_alike),
    Row("ScatterND", scatter_nd, scattered_nd),
)
