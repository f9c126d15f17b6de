"""One classifier, read once as a graph, with the calibration rows of one seed and what methods and budgets share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.scoring.rivals import mask_gradients
from optin_deploy.budget import Limits
from optin_deploy.cutting.compensate import compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.data.rows import Feeds
from optin_deploy.errors import BadInput
from optin_deploy.jobs.networks import Found
from optin_deploy.jobs.pruning import sizes_of
from optin_deploy.network.graph import Network
from optin_deploy.planning.costs import Costs, costs_of, limits_within
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.planning.widths import DEFAULT_ALIGN, DEFAULT_KINDS, Choice, Keep, choose
from optin_deploy.scoring.hearing import TokenWeights, token_weights
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find

T = TypeVar("T")
OUTPUT = "logits"
"""Of every task's classifier."""
Scores = Mapping[str, Tensor]
"""One number a unit by name of group; higher = keep."""


@dataclass(frozen=True, eq=False)
class Case:
    """One network, the calibration rows of one seed, and what several methods and budgets share."""

    task: str
    """Its name."""
    model: nn.Module
    """The classifier that the network was read from, for peers that work on modules."""
    found: Found
    seq_len: int
    """Most tokens of a text."""
    calibration: Feeds
    """Padding is marked by `attention_mask`, as the network takes it."""
    seed: int
    kept: Path | None = None
    """File that keeps the scores, which several runs share; None: they are kept in memory."""
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    """What each shared stage took, and one dense forward over the calibration rows."""
    used: set[str] = field(default_factory=set, init=False)
    """Shared stages that were asked for since this was cleared."""
    _made: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.kept is not None and self.kept.exists():
            found = UnitScores.read(self.kept)
            found.check(self.found.layout)
            self._made["scores"], self.seconds["scores"] = found, float(found.provenance["seconds"])

    @cached_property
    def subject(self) -> Subject:
        """What is scored, measured and repaired."""
        return Subject.of(self.found.layout)

    @cached_property
    def costs(self) -> Costs:
        """In MACs, for one of the widest calibration rows."""
        return costs_of(self.found.layout, sizes_of(self.found, self.calibration))

    @cached_property
    def labels(self) -> list[Tensor]:
        """Batch by batch."""
        sizes = [len(next(iter(batch.values()))) for batch in self.batches]
        return list(torch.split(torch.tensor(self.calibration.labels), sizes))

    @property
    def batches(self) -> Sequence[Mapping[str, Tensor]]:
        """The calibration rows."""
        return self.calibration.batches

    def forward_seconds(self) -> float:
        """Of a dense forward over the calibration rows."""

        def run() -> None:
            with torch.no_grad():
                for batch in self.batches:
                    self.subject.run(batch)

        self.shared("forward", run)
        return self.seconds["forward"]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of the labels' loss for the masks of every sample."""
        return self.shared("gradients", partial(mask_gradients, self.subject, self.batches, self.loss))

    def loss(self, outputs: Mapping[str, Tensor], index: int) -> Tensor:
        """Of each sample of a batch: cross-entropy, or the squared error of a number."""
        logits, labels = outputs[OUTPUT], self.labels[index]
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits[:, 0], labels, reduction="none")
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @property
    def scores(self) -> Scores:
        """The trajectory's, as the product makes them."""

        def made() -> UnitScores:
            settings = ScoreSettings(seed=self.seed)
            found = score_units(self.subject, self.batches, settings, kinds=DEFAULT_KINDS)
            if self.kept is not None:
                found.write(self.kept)
            return found

        return self.shared("scores", made).scores

    @property
    def token_weights(self) -> TokenWeights | None:
        """What each token counts in curves and compensation."""
        return self.shared("token weights", partial(token_weights, self.subject, self.batches, seed=self.seed))

    @property
    def curves(self) -> Mapping[str, Curve]:
        """Error curves by these scores."""
        scores, weights = self.scores, self.token_weights
        return self.shared("curves", partial(unit_curves, self.subject, scores, self.batches, token_weights=weights))

    def shared(self, stage: str, make: Callable[[], T]) -> T:
        """What this stage makes, once; its seconds are kept."""
        self.used.add(stage)
        if stage not in self._made:
            started = time.perf_counter()
            self._made[stage] = make()
            self.seconds[stage] = time.perf_counter() - started
        found: T = self._made[stage]
        return found

    def plan(self, scores: Scores, flops: float, choice: Choice, curves: Mapping[str, Curve] | None = None) -> Keep:
        """What is kept at a share of the MACs; unless widths are equal, a bypassed branch may go as a whole."""
        layout, limits = self.found.layout, limits_within(self.costs, Limits(flops=flops))
        numbers = {name: values.numpy() for name, values in scores.items()}
        if choice.allocation == "uniform":
            return choose(layout, numbers, limits, choice)
        keep = choose(layout, numbers, limits, choice, curves=curves, emptying=bypassed(layout))
        if all(keep.values()):
            return keep
        try:
            cut(layout, keep)
        except BadInput:
            return choose(layout, numbers, limits, choice, curves=curves)
        return keep

    def equal_shares(self, scores: Scores, flops: float, align: int = 1) -> Keep:
        """The same share of the units in every group, as a pruning ratio means it; the best units of each.

        For importances that cannot be compared between heads and neurons.
        """
        return self.plan(scores, flops, Choice(align=align, allocation="uniform", one_measure=False))

    def cut(self, keep: Keep, *, compensation: bool) -> Network:
        """The smaller network, as the product makes it."""
        if not compensation:
            return self.sliced(self.found.network, keep)
        repaired = compensated(self.subject, keep, self.batches, token_weights=self.token_weights)
        return self.sliced(repaired.network, keep)

    def sliced(self, network: Network, keep: Keep) -> Network:
        """Cut this network, maybe with other weights, and prove it."""
        layout = find(network, self.found.probes)
        smaller = cut(layout, keep)
        prove(layout, keep, smaller, self.found.probes)
        return smaller


def ours_choice(allocation: str) -> Choice:
    """How the product chooses widths."""
    return Choice(align=DEFAULT_ALIGN, allocation=allocation)
