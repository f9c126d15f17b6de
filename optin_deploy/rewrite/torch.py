"""Cut a transformers model physically: smaller Linear layers, emptied branches become their bias."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, LayerSpec, ModelLayout
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.slices import projection_at, rows_in_parts, unit_columns

Model = TypeVar("Model", bound=nn.Module)

REWRITTEN = "optin_rewritten"
"""Attribute of a rewritten model; its config still tells the dense sizes, so `resolve` could misread it."""


class Bias(nn.Module):
    """What an output projection makes of no units: its bias, broadcast over (batch, tokens)."""

    def __init__(self, bias: nn.Parameter | nn.Buffer) -> None:
        super().__init__()
        self.bias = bias  # (hidden,)

    def forward(self, ignored: Tensor) -> Tensor:
        """Shape (1, 1, hidden): adding it to the residual broadcasts it."""
        return self.bias.view(1, 1, -1)


class EmptiedAttention(nn.Module):
    """Stands where an attention lost all its heads; hands its input on, or its projection's bias."""

    def __init__(self, output_name: str | None, output: Bias | None) -> None:
        super().__init__()
        self.output_name = output_name
        if output_name is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Returns (branch, None) as transformers' attention modules do."""
        if self.output_name is None:
            return hidden_states, None
        return self.get_submodule(self.output_name)(hidden_states), None


def rewrite_torch(model: Model, layout: ModelLayout, plan: PruningPlan) -> Model:
    """A copy of the model that holds only what the plan keeps; the input is untouched.

    Raises: PlanMismatch: the plan belongs to another layout.
    """
    plan.check(layout)
    smaller = copy.deepcopy(model)
    for layer, heads, neurons in zip(layout.layers, plan.heads, plan.neurons, strict=True):
        if heads:
            _cut(smaller, layer.attention, heads)
            if layer.attention.split:
                setattr(smaller.get_submodule(layer.core), layer.attention.split, len(heads) * layer.head_dim)
        else:
            _empty_attention(smaller, layer)
        if neurons:
            _cut(smaller, layer.ffn, neurons)
        else:
            _empty_ffn(smaller, layer)
    setattr(smaller, REWRITTEN, plan.hash)
    return smaller


def _cut(model: nn.Module, branch: Branch, kept: Sequence[int]) -> None:
    columns = unit_columns(kept, branch.unit_width)
    for path in branch.inputs:
        full = projection_at(model, path)
        rows = rows_in_parts(columns, branch.width, full.outputs)
        bias = None if full.bias is None else full.bias[rows]
        model.set_submodule(path, full.of_size(full.weight[rows], bias))
    full = projection_at(model, branch.output)
    model.set_submodule(branch.output, full.of_size(full.weight[:, columns], full.bias))


def _empty_attention(model: nn.Module, layer: LayerSpec) -> None:
    output = layer.attention.output
    bias, training = _bias(model, output), model.get_submodule(layer.core).training
    if output.startswith(f"{layer.core}."):
        name = output.removeprefix(f"{layer.core}.")
        model.set_submodule(layer.core, EmptiedAttention(name, bias).train(training))
    else:
        model.set_submodule(layer.core, EmptiedAttention(None, None).train(training))
        model.set_submodule(output, bias)


def _empty_ffn(model: nn.Module, layer: LayerSpec) -> None:
    for path in layer.ffn.inputs:
        model.set_submodule(path, nn.Identity().train(model.get_submodule(path).training))
    model.set_submodule(layer.ffn.output, _bias(model, layer.ffn.output))


def _bias(model: nn.Module, path: str) -> Bias:
    full = projection_at(model, path)
    # Nothing learned: no parameter.
    zeros = nn.Buffer(torch.zeros_like(full.weight[:, 0]))
    bias = zeros if full.bias is None else nn.Parameter(full.bias.detach().clone())
    return Bias(bias).train(full.module.training)
