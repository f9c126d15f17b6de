"""Weights of a few bits, packed into bytes block by block."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.quantized import BLOCK
from optin_deploy.network.operators.row import Flow, Row, Unsupported, only
from optin_deploy.network.operators.selections import gather

BYTES = "zero points of several blocks share a byte"


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Turn bytes into the numbers in them along the last axis, low bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    numbers: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)


def matmul_bits(
    node: Node,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight that is unpacked, shifted and scaled block by block."""
    only(node, weight_prepacked=0)
    if order is not None:
        raise Unsupported("MatMulNBits with g_idx")
    bits, rows, width = node.get("bits", 4), node.attributes["N"], node.attributes["K"]
    count = -(-width // node.attributes["block_size"])
    weight = unpacked(packed.reshape(rows, count, -1), bits).to(x.dtype)  # (N, blocks, block)
    if zeros is None:
        weight = weight - 2 ** (bits - 1)
    else:
        each = zeros if zeros.is_floating_point() else unpacked(zeros.reshape(rows, -1), bits)
        weight = weight - each.reshape(rows, -1)[:, :count, None].to(x.dtype)
    weight = (weight * scales.reshape(rows, count, 1).to(x.dtype)).reshape(rows, -1)[:, :width]
    product = x @ weight.T
    return product if bias is None else product + bias


def matmul_bits_axes(flow: Flow) -> None:
    """Flow of MatMulNBits: rows of the weight are free; of what is summed, only whole blocks can go.

    Where zero points are packed, a byte holds those of several blocks, which then go together.
    """
    node, x = flow.node, flow.axes(0)
    bits, size = node.get("bits", 4), node.attributes["block_size"]
    width, count = node.attributes["K"], -(-node.attributes["K"] // size)
    rows, blocks = flow.fresh(node.attributes["N"]), flow.fresh(count)
    summed = x[-1]
    if width % size:
        flow.freeze([summed, blocks], f"{width} entries are not whole blocks of {size}")
    else:
        flow.unify(summed, flow.product([blocks, flow.fresh(size, BLOCK)]))
    packed_zeros = flow.has(3) and math.prod(flow.shape(3)) == rows.size * -(-count * bits // 8)
    octets = blocks
    if packed_zeros and bits < 8:
        if count * bits % 8:
            flow.freeze([blocks], BYTES)
            octets = flow.fresh(-(-count * bits // 8), BYTES)
        else:
            octets = flow.fresh(count * bits // 8)
            flow.unify(blocks, flow.product([octets, flow.fresh(8 // bits, BYTES)]))
    weight = [rows, blocks, flow.fresh(size * bits // 8, BLOCK)]
    for place, axes in ((1, weight), (2, [rows, blocks]), (3, [rows, octets])):
        if flow.has(place):
            whole = flow.reshape(axes, flow.shape(place))
            for one, other in zip(flow.axes(place), whole, strict=True):
                flow.unify(one, other)
    if flow.has(5):
        flow.unify(flow.axes(5)[0], rows)
    flow.contract(0, len(x) - 1)
    flow.attribute("N", rows)
    flow.attribute("K", summed)
    flow.give(0, [*x[:-1], rows])
    flow.macs([*x[:-1], summed, rows])


def gather_blocks(node: Node, table: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Look up rows of a table, shift and scale them block by block."""
    axis, along = node.get("gather_axis", 0) % table.ndim, node.get("quantize_axis", 1) % table.ndim
    bits, size = node.get("bits", 4), node.get("block_size", 128)
    default = 0
    if table.dtype == torch.uint8 and -(-table.shape[-1] * (8 // bits) // size) == scales.shape[-1]:
        table, default = unpacked(table, bits), 2 ** (bits - 1)
        zeros = None if zeros is None else unpacked(zeros, bits).narrow(-1, 0, scales.shape[-1])
    pick = partial(gather, replace(node, attributes={"axis": axis}), indices=indices.long())
    found, factors, shifts = pick(table), pick(scales), None if zeros is None else pick(zeros)
    along += indices.ndim - 1 if along > axis else 0
    values = found.to(factors.dtype)
    wide = values.shape[along]
    values = values - (default if shifts is None else _spread(shifts.to(factors.dtype), size, along, wide))
    return values * _spread(factors, size, along, wide)


def _spread(x: Tensor, size: int, axis: int, wide: int) -> Tensor:
    return x.repeat_interleave(size, axis).narrow(axis, 0, wide)


def gather_blocks_axes(flow: Flow) -> None:
    """Flow of GatherBlockQuantized: the table stays as it is."""
    axis = flow.node.get("gather_axis", 0) % len(flow.shape(0))
    for place in (0, 2, 3):
        if flow.has(place):
            flow.freeze(flow.axes(place), "a table that is packed block by block")
    shape, found = flow.out_shape(), flow.axes(1)
    rest = [flow.fresh(size, "a table that is packed block by block") for size in shape]
    flow.give(0, [*rest[:axis], *found, *rest[axis + len(found) :]])


ROWS = (
    Row("MatMulNBits", matmul_bits, matmul_bits_axes, domain="com.microsoft", factors=(0, 1)),
    Row("GatherBlockQuantized", gather_blocks, gather_blocks_axes, domain="com.microsoft"),
)
