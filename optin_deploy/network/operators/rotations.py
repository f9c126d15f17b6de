"""Rotations of heads by position: pairs of entries are turned by angles."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.attention import flow_heads
from optin_deploy.network.operators.row import Flow, Row, only

ROTATION = "the width of a head whose entries are rotated in pairs"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of entries of (..., width) by angles of (..., pairs); what has no pair in them stays."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        one, two = turned[..., 0::2], turned[..., 1::2]
    else:
        one, two = turned[..., :pairs], turned[..., pairs:]
    real, imaginary = cos * one - sin * two, sin * one + cos * two
    result = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([result, rest], -1) if rest.shape[-1] else result


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool) -> Tensor:
    """Rotate (batch, heads, length, width) or (batch, length, heads x width) by angles of (batch, length, pairs)."""
    if x.ndim == 4:
        return rotate(x, cos[:, None], sin[:, None], interleaved=interleaved)
    split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return rotate(split, cos[:, :, None], sin[:, :, None], interleaved=interleaved).flatten(2)


def _rotary(node: Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    return _rotated(x, cos, sin, node.get("num_heads", 0), bool(node.get("interleaved", 0)))


def _microsoft_rotary(node: Node, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    only(node, is_packed_batching=0, scale=1.0)
    if positions.ndim == 1:  # the first position; the others follow
        length = x.shape[2] if x.ndim == 4 else x.shape[1]
        positions = (positions + torch.arange(length, device=positions.device)).expand(x.shape[0], -1)
    cos, sin = cos[positions.long()], sin[positions.long()]
    heads = node.get("num_heads", 0) or x.shape[-1] // (2 * cos.shape[-1])
    return _rotated(x, cos, sin, heads, bool(node.get("interleaved", 0)))


def _flow_rotary(flow: Flow) -> None:
    caches, positions = ((2, 3), 1) if flow.node.domain else ((1, 2), 3)
    number = flow.node.get("num_heads", 0)
    heads = number or flow.shape(0)[-1] // (2 * flow.shape(caches[0])[-1])
    batch, split, length, width = flow_heads(flow, 0, heads)
    flow.freeze([width], ROTATION)
    for place in caches:
        *tokens, pairs = flow.axes(place)
        flow.freeze([pairs], ROTATION)
        if len(tokens) == 2:
            flow.align([tokens, [batch, length]], [batch.size, length.size])
        else:
            flow.freeze(tokens, "positions, which are looked up")
    if flow.has(positions) and len(flow.shape(positions)) == 2:
        flow.align([flow.axes(positions), [batch, length]], [batch.size, length.size])
    if len(flow.shape(0)) == 3 and number:
        flow.attribute("num_heads", split)
    flow.give(0, flow.axes(0))


ROWS = (
    Row("RotaryEmbedding", _rotary, _flow_rotary),
    Row("RotaryEmbedding", _microsoft_rotary, _flow_rotary, domain="com.microsoft"),
)
