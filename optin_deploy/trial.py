"""What a plan does to the outputs, on calibration samples that its compensation has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from optin_deploy.data.batches import make_batches
from optin_deploy.guard import working
from optin_deploy.judging import joined, judged_samples, samples_of
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import Batch, inference, rows_of
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.pruning import cut
from optin_deploy.scoring.dense import dense_pass
from optin_deploy.scoring.features import ALL_TOKENS
from optin_deploy.scoring.losses import output_distance
from optin_deploy.token_weights import TokenWeights


def unseen_error(
    model: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    compensation: bool = True,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> float:
    """Mean distance of the smaller model's outputs to the dense ones, as error curves measure it, of a whole plan.

    Args:
        batches: unlabeled calibration inputs; every fourth sample, at most 128 of them, judge what the others fitted.
        token_weights: what each token of these batches counts in the fit; None = all the same.
    Raises: BadInput: too few samples. ParityFailure.
    """
    with working(model):
        batches = make_batches(model, batches)
    marks = judged_samples(batches)
    fitting = [i for i, mark in enumerate(marks) if not mark.all()]
    weights = token_weights
    if token_weights is not None:
        weights = [[layer[i][~marks[i].to(layer[i].device)] for i in fitting] for layer in token_weights]
    smaller = cut(
        model,
        layout,
        plan,
        [samples_of(batches[i], ~marks[i]) for i in fitting],
        compensation=compensation,
        token_weights=weights,
        progress=progress,
    ).model
    total = rows = 0.0
    with working(model), inference(model), inference(smaller), torch.no_grad():
        for batch in joined(batches, marks):
            dense = dense_pass(model, layout, batch, ALL_TOKENS, 0)
            total += float(output_distance(dense.readout, dense.read(smaller(**batch))).sum())
            rows += rows_of(batch)
    return total / rows
