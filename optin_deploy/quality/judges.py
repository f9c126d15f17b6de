"""Which judge fits a network and the labels of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from optin_deploy.data.class_maps import ClassMap
from optin_deploy.data.targets import Grade, Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds
from optin_deploy.quality.answers import AnswerJudge
from optin_deploy.quality.label_sets import LabelSetJudge
from optin_deploy.quality.outputs import NetworkJudge
from optin_deploy.quality.perplexity import PerplexityJudge
from optin_deploy.quality.quality import Asked, Quality
from optin_deploy.quality.ranking import RankingJudge
from optin_deploy.quality.retrieval import RetrievalJudge
from optin_deploy.quality.segmentation import SegmentationJudge
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading


class Judge(Protocol):
    """Compares cut networks with the dense one on the same rows."""

    rows: Feeds

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return what fits the output, of both networks."""


def check_kind(rows: Feeds, reading: Reading) -> None:
    """Refuse rows of single texts for networks that read pairs, and rows of pairs for those that embed single texts.

    Raises: BadInput: says how to give them.
    """
    embeds = reading.kind == "embedding"
    if not embeds and any(isinstance(label, Role) for label in rows.labels):
        raise BadInput(
            f"{rows.origin}: rows of `query` and `positive`, or of `sentence1`, `sentence2` and `score`, are single"
            f" texts for networks that embed; the output of this one is read as {reading.kind}. For pairs give"
            " --text-column sentence1 --pair-column sentence2 --label-column score; for rankings rows of `query` and"
            " lists `positive` and `negative`; if it does embed, --compare-output :embedding."
        )
    if embeds and any(isinstance(label, Grade) for label in rows.labels):
        raise BadInput(
            f"{rows.origin}: rows of `query` and lists `positive` and `negative` are pairs for cross-encoders; the"
            " output of this network is read as embedding. Give a row for each `query` and `positive`, both of them"
            " texts."
        )


def judge_of(
    dense: Iterable[Readout],
    reading: Reading,
    rows: Feeds,
    *,
    names: Sequence[str] | None = None,
    metric: Asked | None = None,
    strict: bool = False,
) -> Judge:
    """Keep of the dense network what cut ones are compared with.

    Args:
        dense: one a batch of `rows`, as `readouts` makes them.
        names: of the classes, in their order.
        metric: what is asked for; None means what fits.
        strict: refuse labels that the network does not know; else they are left out, with a warning.
    Raises: BadInput: labels by which the network is no better than guessing, or that do not fit what it puts out.
    """
    if metric is not None:
        return PerplexityJudge(dense, rows, masked=metric == "pseudo_perplexity")
    if any(isinstance(label, ClassMap) for label in rows.labels):
        return SegmentationJudge(dense, rows, strict=strict)
    if any(isinstance(label, Grade) for label in rows.labels):
        return RankingJudge(dense, rows)
    if reading.kind == "span":
        return AnswerJudge(dense, rows, strict=strict)
    if reading.kind == "multi-label":
        return LabelSetJudge(dense, rows, names=names, strict=strict)
    if reading.kind == "embedding" and any(isinstance(label, Role) for label in rows.labels):
        return RetrievalJudge(dense, rows)
    return NetworkJudge(dense, rows, names=names, strict=strict)
