"""One classifier, read once as a graph, with the calibration rows of one seed and what methods and budgets share."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.scoring.rivals import mask_gradients
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.exporters import exporter
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.rows import Feeds
from optin_deploy.network.graph import Network
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import CostLimit, fits, limits_within
from optin_deploy.planning.plan import plan_of
from optin_deploy.planning.widths import Choice, Keep, aligned, choose
from optin_deploy.pruning.networks import Found
from optin_deploy.pruning.pruning import Curves, curves_of, emptiable, make, pick, ready_of, score, turned
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.tokens import least_error, schedules
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.find import find
from optin_deploy.structure.labels import DEFAULT_KINDS
from optin_deploy.structure.tokens import TokenStream

T = TypeVar("T")
ENGINE = "onnx"
"""Whose widths ours keeps; peers choose freely."""
OUTPUT = "logits"
"""Output of every task's classifier."""
Scores = Mapping[str, Tensor]
"""One number a unit by name of group; higher = keep."""


@dataclass(frozen=True, eq=False)
class Case:
    """One network, the calibration rows of one seed, and what several methods and budgets share."""

    task: str
    """Name of the task."""
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
    kinds: tuple[str, ...] = DEFAULT_KINDS
    """What ours cuts; the paper's and the peers' know heads and neurons alone."""
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    """What each shared stage took, and one dense forward over the calibration rows."""
    used: set[str] = field(default_factory=set, init=False)
    """Shared stages that were asked for since this was cleared."""
    _made: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.kept is not None and self.kept.exists():
            found = UnitScores.read(self.kept)
            found.check(self.ready.layout)
            self._made["scores"], self.seconds["scores"] = found, float(found.provenance["seconds"])

    @cached_property
    def ready(self) -> Ready:
        """Network and data as the product puts them together; no row judges, as the test rows do."""
        return turned(ready_of(self.found, Halves(self.calibration, None), seed=self.seed, kinds=self.kinds))

    @property
    def subject(self) -> Subject:
        """What is scored, measured and repaired."""
        return self.ready.subject

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
        """Seconds of a dense forward over the calibration rows."""

        def run() -> None:
            with torch.no_grad():
                for batch in self.batches:
                    self.subject.run(batch)

        self.shared("forward", run)
        return self.seconds["forward"]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the labels' loss with respect to the masks of every sample."""
        return self.shared("gradients", partial(mask_gradients, self.subject, self.batches, self.loss))

    def loss(self, outputs: Mapping[str, Tensor], index: int) -> Tensor:
        """Loss of each sample of a batch: cross-entropy, or the squared error of a number."""
        logits, labels = outputs[OUTPUT], self.labels[index]
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits[:, 0], labels, reduction="none")
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @property
    def scores(self) -> UnitScores:
        """The trajectory's, as the product makes them."""

        def made() -> UnitScores:
            found = score(self.ready, ScoreSettings(seed=self.seed))
            if self.kept is not None:
                found.write(self.kept)
            return found

        return self.shared("scores", made)

    @property
    def curves(self) -> Curves:
        """Error curves by these scores."""
        scores = self.scores
        self.hear()
        return self.shared("curves", lambda: curves_of(self.ready, scores))

    def hear(self) -> None:
        """Measure what each token counts in curves and compensation."""
        self.shared("token weights", self.ready.token_weights)

    def shared(self, stage: str, make: Callable[[], T]) -> T:
        """What this stage makes, once; its seconds are kept."""
        self.used.add(stage)
        if stage not in self._made:
            started = time.perf_counter()
            self._made[stage] = make()
            self.seconds[stage] = time.perf_counter() - started
        found: T = self._made[stage]
        return found

    def limits(self, flops: float, merges: tuple[int, ...] = ()) -> list[CostLimit]:
        """A share of the MACs, for one of the widest calibration rows."""
        return limits_within(self.ready.costs_with(merges), Limits(flops=flops))

    @property
    def stream(self) -> TokenStream:
        """Its tokens.

        Raises: BadInput: there are none that can be merged or dropped.
        """
        return self.ready.stream

    def merging(self, flops: float, merges: Iterable[tuple[int, ...]]) -> Network:
        """The network with all widths, by the first of these merges, ever more, that are within the budget.

        Raises: InfeasibleBudget: none is.
        """
        return self.ready.merging(self.first_within(flops, merges))

    def first_within(self, flops: float, merges: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """The first of these merges, ever more, that are within the budget.

        Raises: InfeasibleBudget: none is.
        """
        every = list(dict.fromkeys(merges))
        first = bisect_left(every, True, key=lambda some: fits(self.limits(flops, some), self.ready.layout.units))
        if first == len(every):
            raise InfeasibleBudget(f"{flops:g} of the multiply-accumulates cannot be had by merging tokens alone.")
        return every[first]

    def product(self, flops: float, allocation: str, *, tokens: bool = False) -> Network:
        """The smaller network, as `optin-export` makes it for ONNX Runtime.

        Args: tokens: merge them too, or drop those of a text.
        """
        how = Choice(kinds=self.kinds, align=exporter(ENGINE).align, allocation=allocation)
        choice = aligned(self.ready.layout, how, None)
        if tokens:
            within, every = partial(self.limits, flops), schedules(self.ready, drops=self.stream.of_text)
            merges, keep = least_error(self.ready, self.scores, choice, self.curves, within, every)
            return self.repaired(keep, merges)
        curves = self.curves if allocation == "curves" else None
        keep = pick(self.ready, self.scores, self.limits(flops), choice, curves)
        return self.repaired(keep)

    def plan(self, scores: Scores, flops: float, choice: Choice, merges: tuple[int, ...] = ()) -> Keep:
        """What is kept by other scores, beside these merges; unless widths are equal or tokens are merged, a bypassed
        branch may go as a whole.
        """
        layout, numbers = self.ready.layout, {name: values.numpy() for name, values in scores.items()}
        emptying = () if choice.allocation == "uniform" or any(merges) else emptiable(layout)
        return choose(layout, numbers, self.limits(flops, merges), choice, emptying=emptying)

    def equal_shares(self, scores: Scores, flops: float, align: int = 1) -> Keep:
        """The same share of the units in every group, as a pruning ratio means it; the best units of each.

        For importances that cannot be compared between heads and neurons.
        """
        return self.plan(scores, flops, Choice(align=align, allocation="uniform", one_measure=False))

    def repaired(self, keep: Keep, merges: Sequence[int] = ()) -> Network:
        """The smaller network, compensated as in the product."""
        self.hear()
        return make(self.ready, plan_of(self.ready.layout, keep, merges=merges)).network

    def sliced(self, keep: Keep, network: Network | None = None, merges: Sequence[int] = ()) -> Network:
        """The smaller network as it is, or with the weights of another."""
        if network is None:
            plan = plan_of(self.ready.layout, keep, merges=merges)
            return make(self.ready, plan, compensation=False).network
        layout = find(network, self.ready.found.probes)
        smaller = cut(layout, keep)
        prove(layout, keep, smaller, self.ready.found.probes)
        return smaller
