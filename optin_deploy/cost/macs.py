"""Multiply-accumulates of one sample: counted by torch for the whole model, by formula for each unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.inputs import example_inputs
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import inference, recorded

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class MacCost:
    """What a plan costs: fixed + heads + neurons, for one sample."""

    fixed: int
    """MACs that no plan can cut: patch embedding, pooler, classifier."""
    head: tuple[int, ...]
    """MACs of one head, a layer."""
    neuron: tuple[int, ...]
    """MACs of one FFN neuron, a layer."""
    dense: int
    """MACs of the dense model."""
    tokens: int
    """Tokens of the counted sample."""

    def of(self, heads: Sequence[int], neurons: Sequence[int]) -> int:
        """MACs with these counts of kept heads and neurons a layer."""
        pairs = (*zip(self.head, heads, strict=True), *zip(self.neuron, neurons, strict=True))
        return self.fixed + sum(cost * count for cost, count in pairs)


def mac_cost(model: nn.Module, layout: ModelLayout, *, seq_len: int) -> MacCost:
    """Cost table of a dense model at `seq_len` tokens (images: the model's own size).

    One head: 4 n d h + 2 n^2 h; one neuron: 2 n d, gated 3 n d (n tokens, d hidden, h head width).
    """
    dense, tokens = count_macs(model, layout, seq_len=seq_len)
    head = tuple(4 * tokens * x.hidden * x.head_dim + 2 * tokens**2 * x.head_dim for x in layout.layers)
    neuron = tuple((len(x.ffn.inputs) + 1) * tokens * x.hidden for x in layout.layers)
    prunable = sum(h * x.heads + n * x.neurons for h, n, x in zip(head, neuron, layout.layers, strict=True))
    return MacCost(dense - prunable, head, neuron, dense, tokens)


def count_macs(model: nn.Module, layout: ModelLayout, *, seq_len: int) -> tuple[int, int]:
    """MACs of one sample as torch's FlopCounterMode counts them under eager attention, and its token count.

    Works on dense and on rewritten models (then with the dense layout).
    """
    first = layout.layers[0].path
    inputs = example_inputs(model, batch=1, seq_len=seq_len)
    with inference(model), eager_attention(model), torch.no_grad(), recorded(model, outputs=[first]) as recording:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    return counter.get_total_flops() // FLOPS_PER_MAC, recording.outputs[first].shape[1]


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products: countable (sdpa hides n^2 terms on CPU) and clean to export."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
