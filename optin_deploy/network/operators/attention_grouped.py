"""Attention of ONNX Runtime's own domain whose heads share keys and values in groups, with a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.attention import (
    SOFTMAX,
    WIDTH,
    Weighing,
    attend,
    flow_bias,
    flow_products,
    flow_shared,
    merge_heads,
    split_heads,
    window,
)
from optin_deploy.network.operators.rotations import ROTATION, rotate
from optin_deploy.network.operators.row import Flow, Result, Row, Unsupported, only, optional


def _group_query(
    node: Node,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    last: Tensor,
    total: Tensor,
    *rest: Tensor | None,
) -> Result:
    cos, sin, positions, added, sink, *more = optional(rest, 5)
    _refuse_group_query(node, any(extra is not None for extra in more))
    heads, groups = node.get("num_heads"), node.get("kv_num_heads")
    if key is None or value is None:
        width = query.shape[-1] // (heads + 2 * groups)
        query, key, value = torch.split(query, [heads * width, groups * width, groups * width], -1)
    query, key, value = split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)
    length = query.shape[2]
    whole = int(total.reshape(()))
    before = (last.reshape(-1) + 1 - length).clamp(min=0)  # (batch,): how much of the past is real
    if node.get("do_rotary", 0):
        if cos is None or sin is None:
            raise Unsupported("GroupQueryAttention that rotates without the angles")
        if positions is None:
            positions = before[:, None] + torch.arange(length, device=before.device)
        angles = [cache[positions.long()][:, None] for cache in (cos, sin)]  # (batch, 1, length, pairs)
        paired = bool(node.get("rotary_interleaved", 0))
        query, key = (rotate(part, angles[0], angles[1], interleaved=paired) for part in (query, key))
    size = max(whole, length if past_key is None else past_key.shape[2])
    key, value = _placed(past_key, key, before, size), _placed(past_value, value, before, size)
    left = node.get("local_window_size", -1)
    allowed = window(
        length, whole, before, left=left - 1 if left > 0 else left, right=0 if node.get("causal", 1) else -1
    )
    allowed = allowed & (torch.arange(whole, device=last.device) <= last.reshape(-1, 1, 1, 1))
    if sink is None and node.get("smooth_softmax", 0) > 0:
        sink = query.new_zeros(heads)
    how = Weighing(node.get("scale"), node.get("softcap", 0.0), added, allowed, sink)
    out, scores = attend(query, key[:, :, :whole], value[:, :, :whole], how)
    return (merge_heads(out), key, value, scores.weights if node.get("qk_output", 0) == 2 else scores.biased)[
        : len(node.outputs)
    ]


def _refuse_group_query(node: Node, more: bool) -> None:
    only(node, sliding_window_cache=0, k_quant_type="NONE", v_quant_type="NONE")
    if more:
        raise Unsupported("GroupQueryAttention with quantized caches, norms of queries, or lengths of queries")


def _placed(past: Tensor | None, new: Tensor, before: Tensor, size: int) -> Tensor:
    """Put new keys or values behind the real ones of the past, in a cache of so many places."""
    if past is None and new.shape[2] == size:
        return new
    cache = new.new_zeros(*new.shape[:2], size, new.shape[3])
    if past is not None:
        cache = torch.cat([past.to(new.dtype), cache[:, :, past.shape[2] :]], 2)
    places = before[:, None] + torch.arange(new.shape[2], device=before.device)  # (batch, length)
    index = places[:, None, :, None].expand_as(new)
    return cache.scatter(2, index.long(), new)


def _flow_group_query(flow: Flow) -> None:
    node = flow.node
    _refuse_group_query(node, any(flow.has(place) for place in range(12, 17)))
    number, groups_number = node.get("num_heads"), node.get("kv_num_heads")
    batch, length, merged = flow.axes(0)
    packed = not flow.has(1)
    width_size = flow.shape(0)[2] // (number + 2 * groups_number if packed else number)
    heads, groups, share = flow_shared(flow, number, groups_number)
    width = flow.fresh(width_size, WIDTH)
    columns, kept = flow.product([groups, share, width]), flow.product([groups, width])
    key = [batch, groups, length, width]
    if packed:
        flow.unify(merged, flow.total([columns, kept, kept]))
    else:
        flow.unify(merged, columns)
        for place in (1, 2):
            for one, other in zip(flow.axes(place), [batch, length, kept], strict=True):
                flow.unify(one, other)
    flow.freeze([length], SOFTMAX)
    for place in (3, 4):
        if flow.has(place):
            before = flow.axes(place)
            for position in (0, 1, 3):
                flow.unify(before[position], key[position])
            flow.freeze([before[2]], SOFTMAX)
    for place in (7, 8):
        if flow.has(place):
            flow.freeze(flow.axes(place), ROTATION)
    known = flow.known(6)
    whole = flow.fresh(flow.shape(0)[1] if known is None else int(known.reshape(())), SOFTMAX)
    flow_bias(flow, 10, [batch, heads, length, whole])
    if flow.has(11):
        flow.unify(flow.axes(11)[0], heads)
    flow_products(flow, [batch, heads, length, whole], width, width)
    flow.attribute("num_heads", heads)
    flow.attribute("kv_num_heads", groups)
    flow.give(0, [batch, length, columns])
    for place in (1, 2):
        if len(node.outputs) > place and node.outputs[place]:
            flow.give(place, [batch, groups, flow.fresh(flow.out_shape(place)[2], SOFTMAX), width])
    flow.give(3, [batch, heads, length, whole])


ROWS = (Row("GroupQueryAttention", _group_query, _flow_group_query, numbers=(6,), domain="com.microsoft"),)
