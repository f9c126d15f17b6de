"""Ways to prune a classifier without retraining: ours, its parts, and its peers, each at its best published setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks.accuracy.kwon import rearranged, tuned
from benchmarks.scoring.rivals import RIVALS, mask_gradients
from optin_deploy.arch.resolve import resolve
from optin_deploy.calibration import Batches
from optin_deploy.compensate import Weights, apply_weights, compensate
from optin_deploy.cost.macs import MacCost, mac_cost
from optin_deploy.curves import Curves, error_curves
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring import Scores, ScoreSettings, score
from optin_deploy.search import Budget, make_plan, search

ALIGN = 16
"""Ours keeps FFN widths that hardware likes; peers choose freely."""


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the calibration rows of one seed, and what several budgets share."""

    model: nn.Module
    seq_len: int
    calibration: Batches
    seed: int

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
        return score(self.model, self.layout, self.calibration.batches, ScoreSettings(seed=self.seed))

    @cached_property
    def curves(self) -> Curves:
        """Error curves by these scores."""
        return error_curves(self.model, self.layout, self.scores, self.calibration.batches)

    @cached_property
    def gradients(self) -> dict[Branch, Tensor]:
        """Of the labels' loss for the masks of every sample."""
        return mask_gradients(self.model, self.layout, self.calibration.batches, self.loss)

    @cached_property
    def labels(self) -> list[Tensor]:
        """Batch by batch."""
        sizes = [len(batch["attention_mask"]) for batch in self.calibration.batches]
        return list(torch.split(torch.tensor(self.calibration.labels), sizes))

    def loss(self, output: object, index: int) -> Tensor:
        """Cross-entropy of each sample of a batch."""
        return nn.functional.cross_entropy(output["logits"], self.labels[index], reduction="none")  # type: ignore[index]

    def rival(self, name: str) -> Scores:
        """Another importance as scores."""
        importance = RIVALS[name]
        if name == "random":
            importance = partial(importance, seed=self.seed)  # type: ignore[call-arg]
        heads, neurons = importance(self.model, self.layout, self.calibration.batches, self.loss)
        return Scores(heads, neurons, self.layout.hash, {"importance": name})

    def plan(
        self, scores: Scores, flops: float, allocation: str, align: int, curves: Curves | None = None
    ) -> PruningPlan:
        """What is kept at a budget."""
        budget = Budget(flops)
        masks = search(scores, self.layout, self.cost, budget, align=align, allocation=allocation, curves=curves)
        return make_plan(masks, self.layout, self.cost)

    def cut(self, plan: PruningPlan, weights: Weights) -> nn.Module:
        """The smaller model."""
        return rewrite_torch(apply_weights(self.model, weights), self.layout, plan)


Method = Callable[[Case, float], nn.Module]
"""(case, share of the MACs that stays) -> pruned model."""


def _compensated(case: Case, plan: PruningPlan) -> nn.Module:
    return case.cut(plan, compensate(case.model, case.layout, plan, case.calibration.batches))


def ours(case: Case, flops: float) -> nn.Module:
    """Trajectory scores, allocation by error curves, compensation."""
    return _compensated(case, case.plan(case.scores, flops, "curves", ALIGN, case.curves))


def ours_uniform(case: Case, flops: float) -> nn.Module:
    """Trajectory scores, equal widths, compensation."""
    return _compensated(case, case.plan(case.scores, flops, "uniform", ALIGN))


def optin(case: Case, flops: float) -> nn.Module:
    """The paper's: trajectory scores and its global search, nothing compensated.

    The scores are the sketch's, whose rank correlation with exact ones is above 0.99 (scoring_accuracy).
    """
    return case.cut(case.plan(case.scores, flops, "paper", 1), {})


def kwon(case: Case, flops: float) -> nn.Module:
    """Kwon et al. 2022 complete: Fisher of the labels, global search, rearrangement, tuned masks."""
    ranked = case.plan(case.rival("fisher"), flops, "paper", 1)
    masks = rearranged(ranked.masks(case.layout), case.layout, case.gradients)
    plan = make_plan(masks, case.layout, case.cost)
    return case.cut(plan, tuned(case.model, case.layout, plan, case.calibration.batches))


def rival(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal widths, nothing compensated."""
    return case.cut(case.plan(case.rival(name), flops, "uniform", 1), {})


def rival_compensated(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal widths, our compensation: what the score alone is worth."""
    return _compensated(case, case.plan(case.rival(name), flops, "uniform", ALIGN))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, uniform": ours_uniform,
    "OPTIN": optin,
    "Kwon et al.": kwon,
    "Taylor (Torch-Pruning)": partial(rival, "torch_pruning_taylor"),
    "magnitude": partial(rival, "magnitude"),
    "random": partial(rival, "random"),
    "Fisher + ours": partial(rival_compensated, "fisher"),
    "random + ours": partial(rival_compensated, "random"),
}
PEERS = ("OPTIN", "Kwon et al.", "Taylor (Torch-Pruning)", "magnitude", "random")
"""As published; the others are ours or hold parts of ours."""
