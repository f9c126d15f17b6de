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

    What is cut is never copied whole: a copy that `deepcopy` finds in its memo takes the place of the original.
    Raises: PlanMismatch: the plan belongs to another layout.
    """
    plan.check(layout)
    smaller: dict[str, nn.Module] = {}
    for layer, heads, neurons in zip(layout.layers, plan.heads, plan.neurons, strict=True):
        smaller |= _cut(model, layer.attention, heads) if heads else _emptied_attention(model, layer)
        smaller |= _cut(model, layer.ffn, neurons) if neurons else _emptied_ffn(model, layer)
    copied = copy.deepcopy(model, {id(model.get_submodule(path)): module for path, module in smaller.items()})
    for layer, heads in zip(layout.layers, plan.heads, strict=True):
        if heads and layer.attention.split:
            setattr(copied.get_submodule(layer.core), layer.attention.split, len(heads) * layer.head_dim)
    setattr(copied, REWRITTEN, plan.hash)
    return copied


def _cut(model: nn.Module, branch: Branch, kept: Sequence[int]) -> dict[str, nn.Module]:
    """The smaller projections of a branch, by path."""
    columns = unit_columns(kept, branch.unit_width)
    found = {}
    for path in branch.inputs:
        full = projection_at(model, path)
        rows = rows_in_parts(columns, branch.width, full.outputs)
        found[path] = full.of_size(full.weight[rows], None if full.bias is None else full.bias[rows])
    full = projection_at(model, branch.output)
    return found | {branch.output: full.of_size(full.weight[:, columns], full.bias)}


def _emptied_attention(model: nn.Module, layer: LayerSpec) -> dict[str, nn.Module]:
    output = layer.attention.output
    bias, training = _bias(model, output), model.get_submodule(layer.core).training
    if output.startswith(f"{layer.core}."):
        return {layer.core: EmptiedAttention(output.removeprefix(f"{layer.core}."), bias).train(training)}
    return {layer.core: EmptiedAttention(None, None).train(training), output: bias}


def _emptied_ffn(model: nn.Module, layer: LayerSpec) -> dict[str, nn.Module]:
    passing: dict[str, nn.Module] = {
        path: nn.Identity().train(model.get_submodule(path).training) for path in layer.ffn.inputs
    }
    return passing | {layer.ffn.output: _bias(model, layer.ffn.output)}


def _bias(model: nn.Module, path: str) -> Bias:
    full = projection_at(model, path)
    # Nothing learned: no parameter.
    zeros = nn.Buffer(torch.zeros_like(full.weight[:, 0]))
    bias = zeros if full.bias is None else nn.Parameter(full.bias.detach().clone())
    return Bias(bias).train(full.module.training)
