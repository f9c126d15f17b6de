"""Attention of ONNX Runtime's own domain: with its projections, and with separate ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.attention import (
    SOFTMAX,
    WIDTH,
    Weighing,
    attend,
    extended,
    flow_bias,
    flow_heads,
    flow_past,
    flow_products,
    merge_heads,
    split_heads,
    window,
)
from optin_deploy.network.operators.row import Flow, Result, Row, Unsupported, only, optional


def self_attention(
    node: Node, projected: Tensor, mask: Tensor | None, past: Tensor | None, bias: Tensor | None
) -> Result:
    """Attend with queries, keys and values that lie side by side in (batch, length, three widths)."""
    only(node, do_rotary=0, past_present_share_buffer=0)
    heads = node.get("num_heads")
    sizes = node.get("qkv_hidden_sizes") or [projected.shape[-1] // 3] * 3
    query, key, value = (split_heads(part, heads) for part in torch.split(projected, list(sizes), -1))
    key, value = extended(None if past is None else past[0], key), extended(None if past is None else past[1], value)
    how = _padded(node, query, key, mask, bias)
    present = torch.stack([key, value]) if len(node.outputs) > 1 else None
    return merge_heads(attend(query, key, value, how)[0]), present


def _padded(node: Node, query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None) -> Weighing:
    """Masks as the operators of com.microsoft have them: padding gets a very negative number, the future gets none."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None:
        seen = _seen(mask, query.shape[0], queries, keys)
        padding = query.new_zeros(()).masked_fill(~seen, float(node.get("mask_filter_value", -10000.0)))
        bias = padding if bias is None else bias + padding
    allowed = None
    if node.get("unidirectional", 0):
        allowed = window(queries, keys, keys - queries, right=0).to(query.device)
    return Weighing(scale=node.get("scale"), bias=bias, allowed=allowed)


def _seen(mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Read any form of a mask as True where a key is real; broadcasts to (batch, heads, queries, keys)."""
    if mask.ndim == 4:  # (batch, 1, longest, longest)
        return mask[:, :, keys - queries : keys, :keys] > 0
    if mask.ndim == 3:  # (batch, queries, keys)
        return mask[:, None] > 0
    if mask.ndim == 2:  # (batch, keys)
        return mask[:, None, None] > 0
    places = torch.arange(keys, device=mask.device)
    if mask.shape[0] == batch:  # ends
        return places < mask.reshape(-1, 1, 1, 1)
    if mask.shape[0] == 2 * batch:  # ends, then starts
        ends, starts = mask.reshape(2, -1, 1, 1, 1).unbind()
        return (places < ends) & (places >= starts)
    raise Unsupported(f"a mask of {tuple(mask.shape)} entries for a batch of {batch}")


def _attention(
    node: Node,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
    *_: Tensor | None,
) -> Result:
    projected = x @ weight
    return self_attention(node, projected if bias is None else projected + bias, mask, past, added)


def flow_self_attention(flow: Flow, *, weight: int, columns: Sequence[int], mask: int, past: int, added: int) -> None:
    """Flow through a node that projects into queries, keys and values by one matrix, and attends.

    Args:
        flow: the walk; the input is at place 0.
        weight: place of the matrix.
        columns: places of vectors with one entry a column of the matrix, or one for all.
        mask: place of the mask.
        past: place of past keys and values.
        added: place of the bias of the scores; -1: there is none.
    """
    node, (batch, length, inner) = flow.node, flow.axes(0)
    number = node.get("num_heads")
    sizes = node.get("qkv_hidden_sizes") or [flow.shape(weight)[1] // 3] * 3
    heads, width = flow.fresh(number), flow.fresh(sizes[0] // number, WIDTH)
    flow.label(heads, "heads")
    values = width
    if node.get("qkv_hidden_sizes"):  # without it, queries, keys and values are equally wide
        values = flow.fresh(sizes[2] // number, WIDTH if flow.has(past) else "")
    parts = [flow.product([heads, width]), flow.product([heads, width]), flow.product([heads, values])]
    flow.unify(flow.axes(weight)[0], inner)
    flow.unify(flow.axes(weight)[1], flow.total(parts))
    for place in columns:
        if flow.has(place) and math.prod(flow.shape(place)) > 1:
            flow.unify(flow.axes(place)[0], flow.total(parts))
    keys = length
    if flow.has(past):
        _, stored, *kept = flow.axes(past)
        keys = flow.fresh(flow.shape(past)[3] + flow.shape(0)[1])
        for one, other in ((stored, batch), (kept[0], heads), (kept[2], width), (kept[2], values)):
            flow.unify(one, other)
        flow.freeze([kept[1]], SOFTMAX)
    flow.freeze([keys], SOFTMAX)
    _mask_axes(flow, mask, [batch, heads, length, keys])
    if added >= 0:
        flow_bias(flow, added, [batch, heads, length, keys])
    flow.contract(0, 2)
    flow.macs([batch, length, inner, flow.total(parts)])
    flow_products(flow, [batch, heads, length, keys], width, values)
    flow.attribute("num_heads", heads)
    if node.get("qkv_hidden_sizes"):
        flow.attribute("qkv_hidden_sizes", parts)
    flow.give(0, [batch, length, parts[2]])
    flow.give(1, [flow.fresh(2, "keys and values"), batch, heads, keys, width])


def _flow_attention(flow: Flow) -> None:
    flow_self_attention(flow, weight=1, columns=(2,), mask=3, past=4, added=5)


def _mask_axes(flow: Flow, place: int, scores: Sequence[Axis]) -> None:
    """Unify the axes of a mask that has no axis of heads."""
    if flow.has(place):
        axes, (batch, _, queries, keys) = flow.axes(place), scores
        meant = {1: [batch], 2: [batch, keys], 3: [batch, queries, keys]}.get(len(axes), [])
        for one, other in zip(axes, meant, strict=False):
            if one.size == other.size:
                flow.unify(one, other)
        flow.freeze(
            [axis for axis in axes if axis.size > 1 and axis.size not in [other.size for other in meant]], SOFTMAX
        )


def _multi_head(
    node: Node,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    *rest: Tensor | None,
) -> Result:
    past_key, past_value, *shared = optional(rest, 2)
    if any(extra is not None for extra in shared):
        raise Unsupported("MultiHeadAttention with caches that are shared between calls")
    heads = node.get("num_heads")
    parts = _unpacked(query, key, value, heads)
    if bias is not None:
        widths = [part.shape[1] * part.shape[3] for part in parts]
        parts = [part + row.reshape(heads, 1, -1) for part, row in zip(parts, torch.split(bias, widths), strict=True)]
    query, key, value = parts[0], extended(past_key, parts[1]), extended(past_value, parts[2])
    out, scores = attend(query, key, value, _padded(node, query, key, mask, added))
    return (merge_heads(out), key, value, scores.biased)[: len(node.outputs)]


def _unpacked(query: Tensor, key: Tensor | None, value: Tensor | None, heads: int) -> list[Tensor]:
    """Queries, keys and values as (batch, heads, length, width)."""
    if query.ndim == 5:  # (batch, length, heads, 3, width)
        return [part.transpose(1, 2) for part in query.unbind(3)]
    if key is None:
        raise Unsupported("MultiHeadAttention without keys")
    if key.ndim == 5:  # (batch, length, heads, 2, width)
        return [split_heads(query, heads), *(part.transpose(1, 2) for part in key.unbind(3))]
    if value is None:
        raise Unsupported("MultiHeadAttention without values")
    rest = (part if part.ndim == 4 else split_heads(part, heads) for part in (key, value))
    return [split_heads(query, heads), *rest]


def _flow_multi_head(flow: Flow) -> None:
    number = flow.node.get("num_heads")
    if len(flow.shape(0)) == 5:
        batch, length, heads, three, width = flow.axes(0)
        flow.freeze([three], "queries, keys and values")
        query = key = value = [batch, heads, length, width]
    else:
        query = flow_heads(flow, 0, number)
        if len(flow.shape(1)) == 5:
            batch, length, heads, two, width = flow.axes(1)
            flow.freeze([two], "keys and values")
            key = value = [batch, heads, length, width]
        else:
            key, value = flow_heads(flow, 1, number), flow_heads(flow, 2, number)
    flow.freeze([query[3]], WIDTH)
    heads = query[1]
    flow.label(heads, "heads")
    for one in (key, value):  # the heads of all are alike
        for position in (0, 1):
            flow.unify(one[position], query[position])
    flow.unify(key[3], query[3])
    flow.unify(value[2], key[2])
    keys = flow_past(flow, key, value, (6, 7))
    flow_products(flow, [query[0], heads, query[2], keys], query[3], value[3])
    if flow.has(3):
        parts = [flow.product([heads, part[3]]) for part in (query, key, value)]
        flow.unify(flow.axes(3)[0], flow.total(parts))
    scores = [query[0], heads, query[2], keys]
    _mask_axes(flow, 4, scores)
    flow_bias(flow, 5, scores)
    flow.attribute("num_heads", heads)
    flow.give(0, [query[0], query[2], flow.product([heads, value[3]])])
    flow.give(1, [query[0], heads, keys, key[3]])
    flow.give(2, [query[0], heads, keys, value[3]])
    flow.give(3, scores)


ROWS = (
    Row("Attention", _attention, _flow_attention, domain="com.microsoft", factors=(0, 1)),
    Row("MultiHeadAttention", _multi_head, _flow_multi_head, domain="com.microsoft"),
)
