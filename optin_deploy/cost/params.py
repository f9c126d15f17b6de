"""Parameters of the whole model and of each unit."""

from __future__ import annotations

from torch import nn

from optin_deploy.cost.units import UnitCost, prunable
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.rewrite.slices import projection_at

BYTES = 4
"""Of one parameter in float32, as models are stored."""


def count_params(model: nn.Module) -> int:
    """Number of parameters; tied ones once."""
    return sum(p.numel() for p in model.parameters())


def param_cost(model: nn.Module, layout: ModelLayout) -> UnitCost:
    """Cost table of a dense model in parameters."""
    dense = count_params(model)
    head = tuple(_of_unit(model, layer.attention) for layer in layout.layers)
    neuron = tuple(_of_unit(model, layer.ffn) for layer in layout.layers)
    return UnitCost(dense - prunable(layout, head, neuron), head, neuron, dense)


def _of_unit(model: nn.Module, branch: Branch) -> int:
    """Rows and biases of the input projections, columns of the output projection."""
    inputs = sum(p.numel() for path in branch.inputs for p in projection_at(model, path).module.parameters())
    return (inputs + projection_at(model, branch.output).weight.numel()) // branch.units
