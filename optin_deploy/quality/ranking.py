"""What a cut did to rerankers: where the texts that fit a query stand among all that were offered."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from optin_deploy.data.label_order import upper_bound
from optin_deploy.data.targets import Grade
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds
from optin_deploy.quality.guessing import Skill, check_skill
from optin_deploy.quality.quality import Quality, check_finite, correlation
from optin_deploy.scoring.losses import Readout

TOP = 10
"""Texts of a list that are looked at."""


@dataclass(frozen=True)
class Ranking:
    """Figures of one query."""

    recall: float
    """Share of its texts among the first ten."""
    first: float
    """Share of its texts that stand first: one at most does."""
    gain: float
    """nDCG@10, all fitting texts alike."""
    reciprocal: float
    """1 through the rank of the first fitting text."""


def ranked(scores: Tensor, right: Tensor) -> Ranking:
    """Figures of a query by the score of each text, (texts,), and whether it fits, (texts,).

    A text with the same score as another stands behind it: equal scores bring nothing.
    """
    found = scores[right].sort(descending=True).values
    before = (scores[~right] >= found.unsqueeze(1)).sum(1)  # of the others
    ranks = (before + torch.arange(1, len(found) + 1)).tolist()
    gains = [1 / math.log2(rank + 1) for rank in ranks if rank <= TOP]
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(ranks), TOP) + 1))
    return Ranking(len(gains) / len(ranks), float(ranks[0] == 1) / len(ranks), sum(gains) / best, 1 / ranks[0])


def guessed_gain(texts: int, fitting: int) -> tuple[float, float]:
    """Mean and variance of nDCG@10 of a query over all orders of its texts: so many places drawn without repeats."""
    gains = torch.zeros(texts, dtype=torch.float64)
    top = min(TOP, texts)
    gains[:top] = 1 / torch.arange(2, top + 2, dtype=torch.float64).log2()
    best = float(gains[:fitting].sum())
    variance = fitting * (texts - fitting) / (texts - 1) * float(gains.var(correction=0))
    return fitting * float(gains.mean()) / best, variance / best**2


def mean_figures(rankings: Iterable[Ranking]) -> dict[str, float]:
    """Means over queries, by the names of `quality.metrics`."""
    figures = torch.tensor([astuple(ranking) for ranking in rankings]).mean(0).tolist()
    return dict(zip(("recall_at_10", "recall_at_1", "ndcg_at_10", "mrr"), figures, strict=True))


class RankingJudge:
    """Compares cut networks with the dense one by how each ranks the texts of every query."""

    def __init__(self, dense: Iterable[Readout], rows: Feeds) -> None:
        """Read what the dense network gives.

        Raises: BadInput: the network does not put out one number or two classes a row, no query has texts of both
            kinds, or the network ranks them no better than a random order.
        """
        self.rows = rows
        places: dict[int, list[tuple[int, bool]]] = {}
        for place, label in enumerate(rows.labels):
            if isinstance(label, Grade):
                places.setdefault(label.query, []).append((place, label.grade > 0))
        self._queries = [found for found in places.values() if len({fits for _, fits in found}) == 2]
        if not self._queries:
            raise BadInput(
                f"{rows.origin}: no query of the rows that judge has texts that fit it and texts that do not. Give "
                "rows with `query` and lists `positive` and `negative`, by --eval."
            )
        self._dense = self._scores(dense)
        self._before = self._figures(self._dense)
        check_skill(self._skill(self._before["ndcg_at_10"]), rows.origin)

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return nDCG@10 of both networks, and the reciprocal rank of the first fitting text."""
        found = self._scores(cut)
        before, after = self._before, self._figures(found)
        beside = {
            "mrr": (before["mrr"], after["mrr"]),
            "correlation_with_dense": (1.0, correlation(self._dense, found)),
        }
        return Quality("ndcg_at_10", before["ndcg_at_10"], after["ndcg_at_10"], len(self._queries), beside)

    def _scores(self, readouts: Iterable[Readout]) -> Tensor:
        """One score a row, (rows,): the number, or how much more the second class is than the first."""
        values = torch.cat([readout.values.float().cpu() for readout in readouts])
        check_finite(values, self.rows.origin)
        if values.shape[1] != 1 or values.shape[2] > 2:
            raise BadInput(
                f"{self.rows.origin}: rows with `positive` and `negative` judge networks that put out one score for a "
                f"pair of texts; this one puts out {values.shape[2]} numbers at {values.shape[1]} positions."
            )
        return values[:, 0, -1] - (values[:, 0, 0] if values.shape[2] == 2 else 0)

    def _skill(self, found: float) -> Skill:
        """Put nDCG@10 beside that of a random order."""
        count = len(self._queries)
        means, variances = zip(*(guessed_gain(len(q), sum(fits for _, fits in q)) for q in self._queries), strict=True)
        guessed, spread = sum(means) / count, math.sqrt(sum(variances)) / count
        # A mean of figures between 0 and 1 varies at most as much as one of rows that are right or wrong.
        return Skill("nDCG@10", found, guessed, spread, upper_bound(found * count, count), count, "queries")

    def _figures(self, scores: Tensor) -> dict[str, float]:
        queries = (zip(*query, strict=True) for query in self._queries)
        return mean_figures(ranked(scores[list(chosen)], torch.tensor(fits)) for chosen, fits in queries)
