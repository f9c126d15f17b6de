"""What pruning did to the outputs, on rows that no stage learned from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from optin_deploy.data.label_order import SURE, at_least


@dataclass(frozen=True)
class Quality:
    """One figure for the dense and the pruned model."""

    metric: str
    """`accuracy` if labels were given, `mean_iou` if maps of classes; else `same_prediction` (share),
    `correlation_with_dense` (regression) or `cosine_to_dense` (mean). Of outputs with several positions
    `accuracy_per_token` and `same_prediction_per_token`; of scorers of text `perplexity`; of other numbers
    `relative_error`: in these two less is better."""
    dense: float
    pruned: float
    samples: int
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Other figures of the dense and the pruned model, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; figures beside the first are there where there are any."""
        found = asdict(self)
        return found if self.beside else {name: value for name, value in found.items() if name != "beside"}

    @property
    def drop(self) -> float:
        """Points (hundredths) that the pruned model lost; rounded, so that 0.95 - 0.9 are 5 points.

        Of perplexity, percent that it grew by.
        """
        if self.metric in ("perplexity", "relative_error"):
            grown = self.pruned - self.dense
            return round(100 * (grown / self.dense if self.metric == "perplexity" else grown), 6)
        return round(100 * (self.dense - self.pruned), 6)

    def holds(self, drop: float) -> bool:
        """Is at most `drop` lost? A gain beyond noise is no answer to that: the rows do not measure what is lost.

        The noise is that of as many rows, each right with the dense model's probability (one row more of each kind).
        """
        if self.drop > drop:
            return False
        share = (self.dense * self.samples + 1) / (self.samples + 2)
        return self.metric != "accuracy" or at_least(round(self.pruned * self.samples), self.samples, share) >= SURE

    def __str__(self) -> str:
        values = f"{self.metric} {self.pruned:.4f}, dense {self.dense:.4f}"
        return f"{values}: {self.drop:.2f} points lost on {self.samples} rows"


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where it is undefined, as of constant outputs."""
    found = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
    return 0.0 if math.isnan(found) else found
