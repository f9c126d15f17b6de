"""What pruning did to the outputs, on rows that no stage learned from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from optin_deploy.data.label_order import SURE, at_least
from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.quality.guessing import surely_more
from optin_deploy.quality.metrics import METRICS

log = logging.getLogger(__name__)
T = TypeVar("T")
Asked = Literal["perplexity", "pseudo_perplexity"]
"""What is measured only where it is asked for."""
MEANS_OF_ROWS = ("accuracy", "recall_at_10", "ndcg_at_10", "answer_f1")
"""Metrics that are a mean over samples of figures between 0 and 1."""


@dataclass(frozen=True)
class Quality:
    """One figure for the dense and the pruned model."""

    metric: str
    """Its name in `quality.metrics`: what fits the output, and the labels where there are any."""
    dense: float
    pruned: float
    samples: int
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Other figures of the dense and the pruned model, by name."""

    def __post_init__(self) -> None:
        for name, values in ((self.metric, (self.dense, self.pruned)), *self.beside.items()):
            if not all(map(math.isfinite, values)):
                raise NonFiniteActivation(
                    f"{name} is {values[0]} of the dense and {values[1]} of the pruned model, by which nothing can be "
                    "judged. Check the labels for NaN, and the weights for values that overflow."
                )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; figures beside the first are there where there are any."""
        found = asdict(self)
        return found if self.beside else {name: value for name, value in found.items() if name != "beside"}

    @property
    def drop(self) -> float:
        """Points (hundredths) that the pruned model lost; rounded, so that 0.95 - 0.9 are 5 points.

        Of perplexities, percent that they grew by.
        """
        metric = METRICS[self.metric]
        lost = self.pruned - self.dense if metric.less else self.dense - self.pruned
        return round(100 * (lost if metric.share or not metric.less else lost / self.dense), 6)

    def holds(self, drop: float) -> bool:
        """Is at most `drop` lost? A gain beyond noise is no answer to that: the rows do not measure what is lost.

        The noise is that of as many rows, each right with the dense model's probability (one row more of each kind);
        no mean of figures between 0 and 1 varies more. Spearman's correlation has its own, and tells no loss where the
        dense model's is not above 0. Figures of tokens, pixels and F1 over all rows have no such bound.
        """
        if self.drop > drop:
            return False
        if self.metric == "spearman":
            return self.dense > 0 and not surely_more(self.dense, self.pruned, self.samples)
        if self.metric not in MEANS_OF_ROWS:
            return True
        share = (self.dense * self.samples + 1) / (self.samples + 2)
        return at_least(round(self.pruned * self.samples), self.samples, share) >= SURE

    def __str__(self) -> str:
        values = f"{self.metric} {self.pruned:.4f}, dense {self.dense:.4f}"
        return f"{values}: {self.drop:.2f} points lost on {self.samples} rows"


def check_finite(values: Tensor, origin: str) -> None:
    """Refuse outputs that are no numbers.

    Raises: NonFiniteActivation.
    """
    if not bool(values.isfinite().all()):
        raise NonFiniteActivation(
            f"{origin}: the network put out NaN or infinity on rows that judge. Check the weights and the"
            " data; a network stored in half precision may overflow: export it in float32."
        )


def labels_judge(labelled: int, rows: int, origin: str, *, strict: bool) -> bool:
    """Whether labels are used: all rows have one, or at least half of them, of which a warning tells.

    Raises: BadInput: strictly, some rows have none beside others.
    """
    left = f"{origin}: {rows - labelled} of the {rows} rows that judge have no label"
    if 0 < labelled < rows:
        if strict:
            raise BadInput(f"{left}. Label all rows, or none.")
        if 2 * labelled < rows:
            log.warning("%s: too few have one to measure by them, agreement is measured", left)
            return False
        log.warning("%s: quality is that of the others", left)
    return labelled > 0


def known_labels(read: Callable[[], T], origin: str, *, strict: bool) -> T | None:
    """Return labels as a network numbers them; None: some do not fit, of which a warning tells.

    Args: read: raises BadInput where one does not fit. strict: refuse that.
    Raises: BadInput.
    """
    try:
        return read()
    except BadInput as err:
        if strict:
            raise BadInput(f"{origin}: {err} Correct the labels, or leave out all of them.") from err
        log.warning("%s: %s No label is used: agreement is measured", origin, err)
        return None


def spearman(wanted: Sequence[float], found: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where it is undefined, as of constant outputs."""
    from scipy.stats import spearmanr

    if len(set(wanted)) == 1 or len(set(found)) == 1:
        return 0.0
    return float(spearmanr(wanted, found).statistic)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where it is undefined, as of constant outputs."""
    if any(bool((each == each[0]).all()) for each in (a, b)):  # the mean of equal numbers may be another, by rounding
        return 0.0
    found = float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])
    return 0.0 if math.isnan(found) else found
