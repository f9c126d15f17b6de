"""Multiply-accumulates of one sample: counted by torch for the whole model, by formula for each unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.cost.units import UnitCost, prunable
from optin_deploy.inputs import example_inputs
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import inference, recorded
from optin_deploy.plan import PruningPlan

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class MacCost(UnitCost):
    """MACs of one sample: patch embedding, pooler and classifier are fixed."""

    tokens: int
    """Tokens of the counted sample."""


def mac_cost(model: nn.Module, layout: ModelLayout, *, seq_len: int) -> MacCost:
    """Cost table of a dense model at `seq_len` tokens (images: the model's own size)."""
    dense, tokens = count_macs(model, layout, seq_len=seq_len)
    head, neuron = unit_macs(layout, tokens)
    return MacCost(dense - prunable(layout, head, neuron), head, neuron, dense, tokens)


def unit_macs(layout: ModelLayout, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """MACs of one head and of one neuron, a layer.

    Head: 4 n d h + 2 n^2 h; neuron: 2 n d, gated 3 n d (n tokens, d hidden, h head width).
    """
    head = tuple(4 * tokens * x.hidden * x.head_dim + 2 * tokens**2 * x.head_dim for x in layout.layers)
    neuron = tuple((len(x.ffn.inputs) + 1) * tokens * x.hidden for x in layout.layers)
    return head, neuron


def ideal_speedup(pruned: nn.Module, layout: ModelLayout, plan: PruningPlan, *, seq_len: int) -> float:
    """Dense MACs / pruned MACs at this length: the speed-up if time were MACs."""
    smaller, tokens = count_macs(pruned, layout, seq_len=seq_len)
    head, neuron = unit_macs(layout, tokens)
    cut = sum(
        h * (layer.heads - len(heads)) + n * (layer.neurons - len(neurons))
        for h, n, layer, heads, neurons in zip(head, neuron, layout.layers, plan.heads, plan.neurons, strict=True)
    )
    return (smaller + cut) / smaller


def count_macs(model: nn.Module, layout: ModelLayout, *, seq_len: int) -> tuple[int, int]:
    """MACs of one sample as torch's FlopCounterMode counts them under eager attention, and its token count.

    Works on dense and on rewritten models (then with the dense layout).
    """
    first = layout.layers[0].path
    like = next(model.parameters())
    example = example_inputs(model, batch=1, seq_len=seq_len)
    inputs = {k: v.to(like if v.is_floating_point() else like.device) for k, v in example.items()}
    counter = FlopCounterMode(display=False)
    with (
        inference(model),
        eager_attention(model),
        torch.no_grad(),
        recorded(model, outputs=[first]) as recording,
        counter,
    ):
        model(**inputs)
    return counter.get_total_flops() // FLOPS_PER_MAC, recording.outputs[first].shape[1]


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products: countable (sdpa hides n^2 terms on CPU) and clean to export."""
    transformer: Any = model
    before = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)
