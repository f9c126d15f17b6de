"""What a cut did to embeddings in use: searches for known texts, and how alike pairs of texts are found."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from optin_deploy.data.targets import Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds
from optin_deploy.quality.guessing import check_skill, spearman_skill
from optin_deploy.quality.quality import Quality, check_finite, spearman
from optin_deploy.quality.ranking import TOP, Ranking, mean_figures, ranked
from optin_deploy.scoring.losses import Readout

log = logging.getLogger(__name__)


class RetrievalJudge:
    """Compares cut networks with the dense one by exact search among all candidates, by the cosine.

    Each network searches by embeddings of its own, as when it is served alone.
    """

    def __init__(self, dense: Iterable[Readout], rows: Feeds) -> None:
        """Read what the dense network gives.

        Args: dense: one a batch of `rows`, unit vectors.
        Raises: BadInput: no query has a text to be found, and no pair a score; or the scores rank pairs no better than
            guessing.
        """
        self.rows = rows
        roles = [label if isinstance(label, Role) else Role(-1 - place) for place, label in enumerate(rows.labels)]
        places = {role.number: place for place, role in enumerate(roles)}
        self._candidates = torch.tensor([place for place, role in enumerate(roles) if role.candidate], dtype=torch.long)
        columns = {roles[place].number: column for column, place in enumerate(self._candidates.tolist())}
        self._queries: dict[int, list[int]] = {}
        """Columns of the candidates that should be found, by place of the query."""
        self._own = {place: columns[role.number] for place, role in enumerate(roles) if role.number in columns}
        for place, role in enumerate(roles):
            found = [columns[number] for number in role.positives if number in columns]
            if found:
                self._queries[place] = found
        self._pairs = [
            (place, places[number], score)
            for place, role in enumerate(roles)
            for number, score in role.scores
            if number in places
        ]
        if not self._queries and len(self._pairs) < 2:
            raise BadInput(
                f"{rows.origin}: no query of the rows that judge has its text to be found among them, and no pair a "
                "score. Give rows with `query` and `positive`, or with `sentence1`, `sentence2` and `score`, by --eval."
            )
        if self._queries and len(columns) <= TOP:
            log.warning(
                "%s: searches look through %d texts, all of which are among the first %d: recall@10 tells nothing. "
                "Give more rows that judge, by --eval.",
                *(rows.origin, len(columns), TOP),
            )
        self._dense = self._vectors(dense)
        self._before = self._figures(self._dense)
        if not self._queries:
            check_skill(spearman_skill(self._before["spearman"], len(self._pairs)), rows.origin)

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return recall@10 of both networks, or where there are only scores of pairs Spearman's correlation."""
        found = self._vectors(cut)
        cosine = {"cosine_to_dense": (1.0, float((self._dense * found).sum(1).mean()))}
        pruned = self._figures(found)
        (name, before), *others = self._before.items()
        beside = {other: (value, pruned[other]) for other, value in others}
        return Quality(name, before, pruned[name], len(self._queries) or len(self._pairs), {**beside, **cosine})

    def _vectors(self, readouts: Iterable[Readout]) -> Tensor:
        vectors = torch.cat([readout.values[:, 0].float().cpu() for readout in readouts])
        check_finite(vectors, self.rows.origin)
        return vectors

    def _figures(self, vectors: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        if self._queries:
            found = mean_figures(self._search(vectors, place, wanted) for place, wanted in self._queries.items())
        if len(self._pairs) > 1:
            cosines = [float(vectors[one] @ vectors[other]) for one, other, _ in self._pairs]
            found["spearman"] = spearman([score for *_, score in self._pairs], cosines)
        return found

    def _search(self, vectors: Tensor, place: int, wanted: list[int]) -> Ranking:
        """Figures of one query among all candidates."""
        scores = (vectors[self._candidates] @ vectors[place]).double()
        if place in self._own:
            scores[self._own[place]] = -torch.inf  # a text does not find itself
        right = torch.zeros(len(scores), dtype=torch.bool)
        right[wanted] = True
        return ranked(scores, right)
