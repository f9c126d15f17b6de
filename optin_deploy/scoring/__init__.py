"""Score every head and FFN neuron: the published method and the fast sketch behind one function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from optin_deploy.arguments import checked, whole
from optin_deploy.data.batches import make_batches
from optin_deploy.guard import working
from optin_deploy.layout import ModelLayout, check_layout
from optin_deploy.masking import Batch, inference
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.exact import exact_terms
from optin_deploy.scoring.features import PAPER, Features
from optin_deploy.scoring.job import Job
from optin_deploy.scoring.parts import MemoryStore, PartsLeft, Store, Worker
from optin_deploy.scoring.scores import Scores
from optin_deploy.scoring.settings import SCORERS, ScoreSettings
from optin_deploy.scoring.sketch import sketch_terms
from optin_deploy.scoring.terms import Terms


def score(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    settings: ScoreSettings | None = None,
    *,
    memory_budget: int | None = None,
    store: Store | None = None,
    worker: Worker | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every unit by how far removing it bends the model's trajectory and output (no labels, no training).

    Args:
        batches: calibration inputs, see batches.py; padding is marked by `attention_mask`.
        memory_budget: bytes that scoring may take beyond the model; None: most of what is free.
        store: where finished parts are kept and found; None: in memory.
        worker: which share of the parts is this process's; None: all.
    Raises:
        BadInput: no batches, or a single sample does not fit the memory budget.
        NonFiniteActivation: a layer puts out NaN or infinity.
        PartsLeft: this worker's share is done, but not all of it.
    Source: Khaki & Plataniotis, ICLR 2024 (arXiv 2403.17921).
    """
    settings = checked(settings, ScoreSettings, "settings")
    if memory_budget is not None:
        memory_budget = whole(memory_budget, "memory_budget")
    with working(model), inference(model), torch.no_grad():
        check_layout(model, layout)
        job = Job(
            model=model,
            layout=layout,
            batches=make_batches(model, batches),
            settings=settings or ScoreSettings(),
            memory_budget=memory_budget,
            store=store or MemoryStore(),
            worker=worker or Worker(),
            progress=progress,
        )
        return job.scores()


__all__ = [
    "PAPER",
    "SCORERS",
    "Features",
    "PartsLeft",
    "ScoreSettings",
    "Scores",
    "Terms",
    "Worker",
    "exact_terms",
    "score",
    "sketch_terms",
]
