"""Attention in one node: heads are split, compared, weighted and merged inside of it. The form of ONNX itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Result, Row

WIDTH = "the width of a head inside a fused attention node: its product and its scale lie inside of the node"
SOFTMAX = "the keys of attention, which its softmax normalises over"


@dataclass(frozen=True)
class Scores:
    """What the product of queries and keys went through; each is (batch, heads, queries, keys)."""

    raw: Tensor
    capped: Tensor
    biased: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Weighing:
    """How attention turns products of queries and keys into weights."""

    scale: float | None = None
    """Factor of the product; None or 0: one over the root of the width of a head."""
    softcap: float = 0.0
    """Scores are squashed into (-softcap, softcap); 0: they are not."""
    bias: Tensor | None = None
    """Added to the scores, and broadcast to (batch, heads, queries, keys)."""
    allowed: Tensor | None = None
    """False where a query must not see a key; broadcast to (batch, heads, queries, keys)."""
    sink: Tensor | None = None
    """One score a head that takes weight but gives nothing."""
    precision: torch.dtype | None = None
    """The softmax is computed in at least this type."""


def attend(query: Tensor, key: Tensor, value: Tensor, how: Weighing) -> tuple[Tensor, Scores]:
    """Weigh values by the match of queries and keys.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, groups, keys, width); each group serves heads / groups heads that lie side by side.
        value: (batch, groups, keys, width of values).
        how: scale, masks and biases.

    Returns:
        (batch, heads, queries, width of values), and the scores. A query that may see no key gives zeros.
    """
    share = query.shape[1] // key.shape[1]
    if share != 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    raw = query @ key.mT * (how.scale or 1 / math.sqrt(query.shape[-1]))  # (batch, heads, queries, keys)
    capped = how.softcap * torch.tanh(raw / how.softcap) if how.softcap else raw
    biased = capped if how.bias is None else capped + how.bias
    if how.allowed is not None:
        biased = biased.masked_fill(~how.allowed, -math.inf)
    weights = _softmax(biased, how)
    return weights @ value, Scores(raw, capped, biased, weights)


def _softmax(scores: Tensor, how: Weighing) -> Tensor:
    dtype = scores.dtype
    if how.precision is not None:
        scores = scores.to(torch.promote_types(dtype, how.precision))
    blind = None
    if how.bias is not None or how.allowed is not None:
        blind = torch.isneginf(scores).all(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0)
    if how.sink is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = how.sink.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    return (weights if blind is None else weights.masked_fill(blind, 0)).to(dtype)


def window(queries: int, keys: int, offset: int | Tensor, *, left: int = -1, right: int = -1) -> Tensor:
    """Return which keys a query may see by position: a query i stands at offset + i.

    Args:
        queries: number of queries.
        keys: number of keys.
        offset: a number, or one an entry of the batch, of shape (batch,).
        left: keys before its own that a query sees; -1: all.
        right: keys after its own that a query sees; -1: all, 0: causal.

    Returns:
        True where it may; (queries, keys), or (batch, 1, queries, keys).
    """
    device = offset.device if isinstance(offset, Tensor) else None
    start = offset.reshape(-1, 1, 1, 1) if isinstance(offset, Tensor) else offset
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - start
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (ahead >= -left)
    if right >= 0:
        allowed = allowed & (ahead <= right)
    return allowed


def split_heads(value: Tensor, heads: int) -> Tensor:
    """Turn (batch, length, heads x width) into (batch, heads, length, width)."""
    return value.reshape(*value.shape[:-1], heads, value.shape[-1] // heads).transpose(1, 2)


def merge_heads(value: Tensor) -> Tensor:
    """Turn (batch, heads, length, width) into (batch, length, heads x width)."""
    return value.transpose(1, 2).flatten(2)


def extended(past: Tensor | None, new: Tensor) -> Tensor:
    """Put new keys or values behind those of the past."""
    return new if past is None else torch.cat([past.to(new.dtype), new], 2)


def flow_products(flow: Flow, scores: Sequence[Axis], width: Axis, values: Axis) -> None:
    """Count the two products, of queries with keys and of weights with values, and name their axes."""
    flow.macs([*scores, width])
    flow.macs([*scores, values])
    flow.label(width, "qk-width")
    flow.label(values, "v-width")


def flow_shared(flow: Flow, heads: int, groups: int) -> tuple[Axis, Axis, Axis]:
    """Make the axis of heads, of which as many share keys and values; returns heads, groups, heads of a group."""
    one, share = flow.fresh(groups), flow.fresh(heads // groups)
    flow.label(one, "groups" if share.size > 1 else "heads")
    flow.label(share, "queries")
    return flow.product([one, share]), one, share


def flow_bias(flow: Flow, place: int, scores: Sequence[Axis]) -> None:
    """Unify the axes of something that is added to the scores with theirs; layers may share it."""
    if flow.has(place):
        axes = flow.broadcast([place], flow.shape(place))
        if axes and flow.shape(place)[-1] not in (1, scores[-1].size):  # masks may be shorter than the keys
            flow.freeze([axes.pop()], SOFTMAX)
            axes.append(scores[-1])
        flow.align([axes, scores], [axis.size for axis in scores])


def flow_past(flow: Flow, key: Sequence[Axis], value: Sequence[Axis], past: tuple[int, int]) -> Axis:
    """Unify keys and values with the pasts that they are put behind; returns the axis of all keys."""
    keys = key[2]
    if flow.has(past[0]) and flow.has(past[1]):
        for place, now in zip(past, (key, value), strict=True):
            before = flow.axes(place)
            for position in (0, 1, 3):
                flow.unify(before[position], now[position])
            flow.freeze([before[2]], SOFTMAX)
        keys = flow.fresh(flow.shape(past[0])[2] + keys.size)
    flow.freeze([key[2], keys], SOFTMAX)
    return keys


def flow_heads(flow: Flow, place: int, heads: int) -> list[Axis]:
    """Axes of an input as (batch, heads, length, width), which it may have already."""
    axes = flow.axes(place)
    if len(axes) == 4:
        return axes
    batch, length, merged = flow.shape(place)
    one, two, three, four = flow.reshape(axes, (batch, length, heads, merged // heads))
    return [one, three, two, four]


def _attention(
    node: Node,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Result:
    flat = query.ndim == 3
    if flat:
        groups = node.get("kv_num_heads")
        query = split_heads(query, node.get("q_num_heads"))
        key, value = split_heads(key, groups), split_heads(value, groups)
    key, value = extended(past_key, key), extended(past_value, value)
    queries, keys = query.shape[2], key.shape[2]
    offset: int | Tensor = 0 if past_key is None else past_key.shape[2]
    if lengths is not None:
        offset = lengths.reshape(-1) - queries
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    if node.get("is_causal", 0):
        right = 0
    seen, bias = [], None if mask is None else _lengthened(mask, keys)
    if left >= 0 or right >= 0:
        seen.append(window(queries, keys, offset, left=left, right=right).to(query.device))
    if lengths is not None:
        seen.append(torch.arange(keys, device=lengths.device) < lengths.reshape(-1, 1, 1, 1))
    if bias is not None and bias.dtype == torch.bool:
        seen, bias = [*seen, bias], None
    allowed = reduce(torch.logical_and, seen) if seen else None
    precision = {1: torch.float32, 11: torch.float64}.get(node.get("softmax_precision", 0))
    how = Weighing(node.get("scale"), node.get("softcap", 0.0), bias, allowed, None, precision)
    out, scores = attend(query, key, value, how)
    shown = (scores.raw, scores.capped, scores.biased, scores.weights)[node.get("qk_matmul_output_mode", 0)]
    return (merge_heads(out) if flat else out, key, value, shown)[: len(node.outputs)]


def _lengthened(mask: Tensor, keys: int) -> Tensor:
    """A mask that is shorter than the keys hides the others."""
    missing = keys - mask.shape[-1]
    if mask.ndim == 0 or missing <= 0:
        return mask
    rest = torch.full((*mask.shape[:-1], missing), 0 if mask.dtype == torch.bool else -math.inf, device=mask.device)
    return torch.cat([mask, rest.to(mask.dtype)], -1)


def _flow_attention(flow: Flow) -> None:
    node, flat = flow.node, len(flow.shape(0)) == 3
    number, groups_number = (node.get("q_num_heads"), node.get("kv_num_heads")) if flat else (0, 0)
    query = flow_heads(flow, 0, number)
    key, value = (flow_heads(flow, place, groups_number) for place in (1, 2))
    heads, groups, _ = flow_shared(flow, query[1].size, key[1].size)
    for one, other in ((query[1], heads), (key[1], groups), (value[1], groups)):
        flow.unify(one, other)
    for one, other in ((key[0], query[0]), (value[0], query[0]), (value[2], key[2]), (key[3], query[3])):
        flow.unify(one, other)
    keys = flow_past(flow, key, value, (4, 5))
    if flat or not node.get("scale"):
        flow.freeze([query[3]], WIDTH)
    else:
        flow.contract(0, 3)
    scores = [query[0], heads, query[2], keys]
    flow_bias(flow, 3, scores)
    flow_products(flow, scores, query[3], value[3])
    if flat:
        flow.attribute("q_num_heads", heads)
        flow.attribute("kv_num_heads", groups)
        flow.give(0, [query[0], query[2], flow.product([heads, value[3]])])
    else:
        flow.give(0, [query[0], heads, query[2], value[3]])
    flow.give(1, [query[0], groups, keys, key[3]])
    flow.give(2, [query[0], groups, keys, value[3]])
    flow.give(3, scores)


ROWS = (Row("Attention", _attention, _flow_attention),)
