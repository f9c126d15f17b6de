"""Prove that two forms of a model compute the same: masked against rewritten, torch against engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_deploy.errors import ParityFailure
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import Batch, branch_masks, inference, masked
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.exact import in_float64
from optin_deploy.rewrite.slices import widened

REWRITE_TOLERANCE = 1e-9
"""In float64: cut columns were multiplied by exact zeros, so a right cut differs by rounding alone. (float32 rounding
of a real model reaches 1e-5 by itself and would hide small mistakes.)"""
ROWS = 4
"""Samples compared: a wrong cut shows on any."""


def masked_vs_rewritten(
    model: nn.Module,
    smaller: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batch: Batch,
    *,
    refitted: bool = False,
) -> float:
    """Relative error, in float64, of the rewritten model against the same weights with the cut units masked.

    Args: refitted: the smaller model's kept units have new weights; the masked model is given them, block by block.
    Raises: ParityFailure: above 1e-9.
    """
    few = {k: v[:ROWS].double() if v.is_floating_point() else v[:ROWS] for k, v in batch.items()}

    def refits(index: int) -> dict[str, Tensor]:
        layer = layout.layers[index]
        return {
            **widened(model, smaller, layer.attention, plan.heads[index]),
            **widened(model, smaller, layer.ffn, plan.neurons[index]),
        }

    masks = branch_masks(layout, plan.masks(layout))
    changes = refits if refitted else None
    with inference(model), torch.no_grad(), in_float64(model, layout, changes), masked(model, masks):
        expected = main_output(model(**few)).cpu().numpy()
    with inference(smaller), torch.no_grad(), in_float64(smaller, layout):
        error = relative_error(expected, main_output(smaller(**few)).cpu().numpy())
    if not error <= REWRITE_TOLERANCE:
        raise ParityFailure(f"rewritten and masked model differ by {error:.2e} (allowed: {REWRITE_TOLERANCE:.0e}).")
    return error


def main_output(output: Any) -> torch.Tensor:
    """`logits` if the model has them, else `last_hidden_state`."""
    found: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """max |expected - found| / max(1, max |expected|)."""
    return float(np.abs(expected - found).max() / max(1.0, float(np.abs(expected).max())))
