"""Cut a transformers model physically: smaller Linear layers, emptied branches become their bias."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, LayerSpec, ModelLayout
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.slices import linear_at, unit_columns

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
        full = linear_at(model, path)
        bias = None if full.bias is None else full.bias[columns]
        model.set_submodule(path, _sized_linear(full.weight[columns], bias, full.training))
    full = linear_at(model, branch.output)
    model.set_submodule(branch.output, _sized_linear(full.weight[:, columns], full.bias, full.training))


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
    full = linear_at(model, path)
    if full.bias is None:  # nothing learned: no parameter
        return Bias(nn.Buffer(torch.zeros_like(full.weight[:, 0]))).train(full.training)
    return Bias(nn.Parameter(full.bias.detach().clone())).train(full.training)


def _sized_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    outputs, inputs = weight.shape
    # On the meta device nothing is initialised in vain; the parameters are set below.
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.train(training)
