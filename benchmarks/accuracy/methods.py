"""Ways to prune a classifier without retraining: ours, its parts, and its peers, each at its best published setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.kwon import rearranged, tuned
from benchmarks.scoring.rivals import Importance, magnitude, mask_gradients, random, squared, torch_pruning_taylor
from optin_deploy.arch.resolve import resolve
from optin_deploy.budget import Budget
from optin_deploy.calibration import Batches
from optin_deploy.compensate import apply_weights
from optin_deploy.cost.macs import MacCost, mac_cost
from optin_deploy.curves import Curves, error_curves
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import rows_of
from optin_deploy.plan import PruningPlan
from optin_deploy.pruning import cut
from optin_deploy.quality import outputs_of
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring import Scores, ScoreSettings, score
from optin_deploy.search import make_plan, search

ALIGN = 16
"""Ours keeps FFN widths that hardware likes; peers choose freely."""


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the calibration rows of one seed, and what several budgets share."""

    model: nn.Module
    seq_len: int
    calibration: Batches
    seed: int
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    """Of a dense forward over the calibration rows, and of what was made for ours, by stage; the last of each."""
    _rivals: dict[str, Scores] = field(default_factory=dict, init=False)

    @cached_property
    def layout(self) -> ModelLayout:
        """Of the dense model."""
        return resolve(self.model)

    @cached_property
    def cost(self) -> MacCost:
        """In MACs at the task's length."""
        return mac_cost(self.model, self.layout, seq_len=self.seq_len)

    @cached_property
    def scores(self) -> Scores:
        """The trajectory's, as the product makes them."""
        with self._timed("forward"):
            outputs_of(self.model, self.calibration.batches)
        with self._timed("scores"):
            return score(self.model, self.layout, self.calibration.batches, ScoreSettings(seed=self.seed))

    @cached_property
    def curves(self) -> Curves:
        """Error curves by these scores."""
        scores = self.scores
        with self._timed("curves"):
            return error_curves(self.model, self.layout, scores, self.calibration.batches)

    @cached_property
    def gradients(self) -> dict[Branch, Tensor]:
        """Of the labels' loss for the masks of every sample."""
        return mask_gradients(self.model, self.layout, self.calibration.batches, self.loss)

    @cached_property
    def labels(self) -> list[Tensor]:
        """Batch by batch."""
        sizes = [rows_of(batch) for batch in self.calibration.batches]
        return list(torch.split(torch.tensor(self.calibration.labels), sizes))

    def loss(self, output: Any, index: int) -> Tensor:
        """Of each sample of a batch: cross-entropy, or the squared error of a number."""
        logits, labels = output["logits"], self.labels[index]
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits[:, 0], labels, reduction="none")
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def rival(self, name: str) -> Scores:
        """Another importance as scores, found once."""
        if name not in self._rivals:
            heads, neurons = IMPORTANCES[name](self)
            self._rivals[name] = Scores(heads, neurons, self.layout.hash, {"importance": name})
        return self._rivals[name]

    def plan(
        self, scores: Scores, flops: float, allocation: str, align: int, curves: Curves | None = None
    ) -> PruningPlan:
        """What is kept at a budget."""
        budget = Budget(flops)
        masks = search(scores, self.layout, self.cost, budget, align=align, allocation=allocation, curves=curves)
        return make_plan(masks, self.layout, self.cost)

    def cut(self, plan: PruningPlan, *, compensation: bool) -> nn.Module:
        """The smaller model, as the product makes it."""
        with self._timed("compensation and cut"):
            return cut(self.model, self.layout, plan, self.calibration.batches, compensation=compensation).model

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


IMPORTANCES: dict[str, Callable[[Case], Importance]] = {
    "fisher": lambda case: squared(case.layout, case.gradients),
    "magnitude": lambda case: magnitude(case.model, case.layout, case.calibration.batches, case.loss),
    "random": lambda case: random(case.model, case.layout, case.calibration.batches, case.loss, seed=case.seed),
    "taylor": lambda case: torch_pruning_taylor(case.model, case.layout, case.calibration.batches, case.loss),
}
Method = Callable[[Case, float], nn.Module]
"""(case, share of the MACs that stays) -> pruned model."""


def ours(case: Case, flops: float) -> nn.Module:
    """Trajectory scores, allocation by error curves, compensation."""
    return case.cut(case.plan(case.scores, flops, "curves", ALIGN, case.curves), compensation=True)


def ours_uniform(case: Case, flops: float) -> nn.Module:
    """Trajectory scores, equal widths, compensation."""
    return case.cut(case.plan(case.scores, flops, "uniform", ALIGN), compensation=True)


def optin(case: Case, flops: float) -> nn.Module:
    """The paper's: trajectory scores and its global search, nothing compensated.

    The scores are the sketch's, whose rank correlation with exact ones is above 0.99 (scoring_accuracy).
    """
    return case.cut(case.plan(case.scores, flops, "paper", 1), compensation=False)


def kwon(case: Case, flops: float) -> nn.Module:
    """Kwon et al. 2022 complete: Fisher of the labels, global search, rearrangement, tuned masks."""
    ranked = case.plan(case.rival("fisher"), flops, "paper", 1)
    masks = rearranged(ranked.masks(case.layout), case.layout, case.gradients)
    plan = make_plan(masks, case.layout, case.cost)
    weights = tuned(case.model, case.layout, plan, case.calibration.batches)
    return rewrite_torch(apply_weights(case.model, weights), case.layout, plan)


def rival(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal widths, nothing compensated."""
    return case.cut(case.plan(case.rival(name), flops, "uniform", 1), compensation=False)


def rival_compensated(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal widths, our compensation: what the score alone is worth."""
    return case.cut(case.plan(case.rival(name), flops, "uniform", ALIGN), compensation=True)


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, uniform": ours_uniform,
    "OPTIN": optin,
    "Kwon et al.": kwon,
    "Taylor (Torch-Pruning)": partial(rival, "taylor"),
    "magnitude": partial(rival, "magnitude"),
    "random": partial(rival, "random"),
    "Fisher + ours": partial(rival_compensated, "fisher"),
    "random + ours": partial(rival_compensated, "random"),
}
PEERS = ("OPTIN", "Kwon et al.", "Taylor (Torch-Pruning)", "magnitude", "random")
"""As published; the others are ours or hold parts of ours."""
