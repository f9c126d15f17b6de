"""How far scores agree with exact ones: rank correlations, and kept units in common."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.scoring.rivals import KINDS, Importance, groups_of
from optin_deploy.planning.costs import CostLimit
from optin_deploy.planning.widths import Choice, choose
from optin_deploy.scoring.subject import Subject


@dataclass(frozen=True)
class Method:
    """One way to score, against exact."""

    name: str
    seconds: float
    forwards: float
    neurons: float
    """Spearman's rho over the exactly scored neurons of all layers."""
    heads: float
    """Spearman's rho over the heads of all layers."""
    neurons_in_a_layer: float
    """Mean over layers of the rho inside."""
    heads_in_a_layer: float
    shared: dict[str, float]
    """Share of the units kept at 60% of the MACs that exact scores keep too, by allocation."""


def mean_of(name: str, draws: Sequence[Method]) -> Method:
    """Every figure's mean."""
    mean = {f.name: statistics.mean(getattr(draw, f.name) for draw in draws) for f in fields(Method)[1:-1]}
    shared = {key: statistics.mean(draw.shared[key] for draw in draws) for key in draws[0].shared}
    return Method(name, **mean, shared=shared)


def rhos(pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> tuple[float, float, float, float]:
    """Spearman's rho of neurons and of heads over all layers, and their mean inside a layer."""
    both = (pairs["neurons"], pairs["heads"])
    whole = [rho(torch.cat([a for a, _ in some]), torch.cat([b for _, b in some])) for some in both]
    inside = [statistics.mean(rho(a, b) for a, b in some) for some in both]
    return whole[0], whole[1], inside[0], inside[1]


def rho(exact: Tensor, found: Tensor) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(exact.numpy(), found.numpy()).statistic)


def kept_shared(
    subject: Subject, limits: Sequence[CostLimit], truth: Importance, estimate: Importance
) -> dict[str, float]:
    """Share of kept units that two scores have in common, by allocation, if each scored neuron stands for its share."""
    layout, shared = subject.layout, {}
    stands = {
        group.name: np.arange(group.units) * len(truth[group.name]) // group.units for group in groups_of(subject)
    }
    for allocation in ("uniform", "paper"):
        kept = []
        for scores in (truth, estimate):
            full = {name: scores[name].numpy()[places] for name, places in stands.items()}
            found = choose(layout, full, limits, Choice(kinds=KINDS, align=1, allocation=allocation))
            kept.append({(name, unit) for name, s in stands.items() for unit in found.get(name, range(len(s)))})
        shared[allocation] = len(kept[0] & kept[1]) / max(map(len, kept))
    return shared
