"""The stop rule: how far the ranking of units would still change if its noise were drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STABLE_NEURONS = 0.996
"""Rank correlation with the noise-free ranking that is enough. On MiniLM the bias of the sketch costs 0.005 itself."""
STABLE_HEADS = 0.99
DRAWS = 16


def rank_stability(scores: Sequence[Tensor], errors: Sequence[Tensor]) -> float:
    """Expected Spearman correlation of the ranking over all layers with one whose noise is drawn again.

    Args: scores, errors: per layer (units,): the scores and their standard errors.
    Returns: mean over seeded draws; 1 if there is no error.
    """
    score, error = torch.cat(list(scores)).double(), torch.cat(list(errors)).double()
    if len(score) < 2 or not bool(error.any()):
        return 1.0
    generator = torch.Generator().manual_seed(0)
    ranks = _ranks(score)
    found = [
        _correlation(ranks, _ranks(score + error * torch.randn(len(score), generator=generator, dtype=torch.float64)))
        for _ in range(DRAWS)
    ]
    return sum(found) / DRAWS


def enough(
    scores: Sequence[Tensor],
    errors: Sequence[Tensor],
    now: int,
    most: int,
    target: float,
    *,
    without_replacement: bool = False,
) -> int:
    """The smallest number of draws at which the ranking will reach the target, else `most`.

    Args:
        errors: after `now` draws; they fall with the root of the number.
        without_replacement: from a population of `most`, so that the error ends at 0.
    """

    def factor(draws: int) -> float:
        rest = [1 / n - 1 / most * without_replacement for n in (now, draws)]
        return math.sqrt(rest[1] / rest[0]) if rest[0] > 0 else 0.0

    def reached(draws: int) -> bool:
        return rank_stability(scores, [factor(draws) * error for error in errors]) >= target

    if now >= most or reached(now):
        return now
    low, high = now, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two scores of the same units; ties are broken as they come."""
    return _correlation(_ranks(one), _ranks(other))


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])
