"""Ways to prune a classifier without retraining: ours, its parts, and its peers, each at its best published setting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.accuracy.kwon import rearranged, tuned
from benchmarks.scoring.rivals import Importance, magnitude, mask_gradients, random, squared, torch_pruning_taylor
from optin_deploy.arch.resolve import resolve
from optin_deploy.budget import Budget
from optin_deploy.compensate import apply_weights
from optin_deploy.cost.macs import MacCost, mac_cost
from optin_deploy.curves import Curves, error_curves
from optin_deploy.data.calibration import Batches
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import rows_of
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.pruning import cut
from optin_deploy.quality import outputs_of
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring import Scores, ScoreSettings, score
from optin_deploy.search import make_plan, search
from optin_deploy.token_weights import TokenWeights, measure_token_weights

T = TypeVar("T")
ALIGN = 16
"""Ours keeps FFN widths that hardware likes; peers choose freely."""


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the calibration rows of one seed, and what several methods and budgets share."""

    model: nn.Module
    seq_len: int
    calibration: Batches
    seed: int
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    """What each shared stage took, and one dense forward over the calibration rows."""
    used: set[str] = field(default_factory=set, init=False)
    """Shared stages that were asked for since this was cleared."""
    _made: dict[str, Any] = field(default_factory=dict, init=False)

    @cached_property
    def layout(self) -> ModelLayout:
        """Of the dense model."""
        return resolve(self.model)

    @cached_property
    def cost(self) -> MacCost:
        """In MACs at the task's length."""
        return mac_cost(self.model, self.layout, seq_len=self.seq_len)

    @cached_property
    def labels(self) -> list[Tensor]:
        """Batch by batch."""
        sizes = [rows_of(batch) for batch in self.calibration.batches]
        return list(torch.split(torch.tensor(self.calibration.labels), sizes))

    def forward_seconds(self) -> float:
        """Of a dense forward over the calibration rows."""
        self._shared("forward", lambda: outputs_of(self.model, self.calibration.batches))
        return self.seconds["forward"]

    @property
    def scores(self) -> Scores:
        """The trajectory's, as the product makes them."""
        settings = ScoreSettings(seed=self.seed)
        return self._shared("scores", lambda: score(self.model, self.layout, self.calibration.batches, settings))

    @property
    def curves(self) -> Curves:
        """Error curves by these scores."""
        scores, weights, batches = self.scores, self.token_weights, self.calibration.batches
        make = partial(error_curves, self.model, self.layout, scores, batches, token_weights=weights)
        return self._shared("curves", make)

    @property
    def token_weights(self) -> TokenWeights | None:
        """What each token counts in the compensation."""
        make = partial(measure_token_weights, self.model, self.layout, self.calibration.batches, seed=self.seed)
        return self._shared("token weights", make)

    @property
    def gradients(self) -> dict[Branch, Tensor]:
        """Of the labels' loss for the masks of every sample."""
        make = partial(mask_gradients, self.model, self.layout, self.calibration.batches, self.loss)
        return self._shared("gradients", make)

    def loss(self, output: Any, index: int) -> Tensor:
        """Of each sample of a batch: cross-entropy, or the squared error of a number."""
        logits, labels = output["logits"], self.labels[index]
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits[:, 0], labels, reduction="none")
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def rival(self, name: str) -> Scores:
        """Another importance as scores."""
        if name == "fisher":
            heads, neurons = squared(self.layout, self.gradients)
        else:
            heads, neurons = self._shared(name, lambda: IMPORTANCES[name](self))
        return Scores(heads, neurons, self.layout.hash, {"importance": name})

    def _shared(self, stage: str, make: Callable[[], T]) -> T:
        self.used.add(stage)
        if stage not in self._made:
            started = time.perf_counter()
            self._made[stage] = make()
            self.seconds[stage] = time.perf_counter() - started
        found: T = self._made[stage]
        return found

    def plan(
        self, scores: Scores, flops: float, allocation: str, align: int, curves: Curves | None = None
    ) -> PruningPlan:
        """What is kept at a budget."""
        budget = Budget(flops)
        masks = search(scores, self.layout, self.cost, budget, align=align, allocation=allocation, curves=curves)
        return make_plan(masks, self.layout, self.cost)

    def equal_shares(self, scores: Scores, flops: float, align: int) -> PruningPlan:
        """The same share of heads and of neurons in every layer, as a pruning ratio means it; the best units of each.

        For importances that cannot be compared between heads and neurons.
        """
        cost = self.cost
        room = Budget(flops).within(cost) - cost.fixed
        share = room / (cost.dense - cost.fixed)
        heads = [_best(t, round(share * len(t))) for t in scores.heads]
        room -= sum(c * sum(kept) for c, kept in zip(cost.head, heads, strict=True))
        share = room / sum(c * len(t) for c, t in zip(cost.neuron, scores.neurons, strict=True))
        neurons = [_best(t, int(share * len(t)) // align * align) for t in scores.neurons]
        return make_plan(Masks(tuple(heads), tuple(neurons), self.layout.hash), self.layout, cost)

    def cut(self, plan: PruningPlan, *, compensation: bool) -> nn.Module:
        """The smaller model, as the product makes it."""
        weights = self.token_weights if compensation else None
        batches = self.calibration.batches
        return cut(self.model, self.layout, plan, batches, compensation=compensation, token_weights=weights).model


def _best(scores: Tensor, count: int) -> tuple[bool, ...]:
    chosen = set(scores.argsort(descending=True, stable=True)[:count].tolist())
    return tuple(unit in chosen for unit in range(len(scores)))


IMPORTANCES: dict[str, Callable[[Case], Importance]] = {
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
    teacher = case.plan(case.rival("fisher"), flops**0.5, "paper", 1).masks(case.layout)
    first_token = "input_ids" in case.calibration.batches[0]
    weights = tuned(case.model, case.layout, plan, case.calibration.batches, teacher=teacher, first_token=first_token)
    return rewrite_torch(apply_weights(case.model, weights), case.layout, plan)


def rival(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal shares, nothing compensated."""
    return case.cut(case.equal_shares(case.rival(name), flops, 1), compensation=False)


def rival_compensated(name: str, case: Case, flops: float) -> nn.Module:
    """Another importance, equal shares, our compensation: what the score alone is worth."""
    return case.cut(case.equal_shares(case.rival(name), flops, ALIGN), compensation=True)


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
ABLATIONS = ("Fisher + ours", "random + ours")
"""What the score alone is worth; only on demand."""
