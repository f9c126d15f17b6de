"""What pruning did to the outputs, on rows that no stage learned from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.data.calibration import Batches
from optin_deploy.data.label_order import SURE, at_least, check_order
from optin_deploy.data.labels import class_index, is_regression
from optin_deploy.inputs import gives_logits
from optin_deploy.masking import inference
from optin_deploy.pooling import pooling_of
from optin_deploy.scoring.features import valid_tokens
from optin_deploy.scoring.losses import pooled


@dataclass(frozen=True)
class Quality:
    """One figure for the dense and the pruned model."""

    metric: str
    """`accuracy` if labels were given; else `same_prediction` (share), `correlation_with_dense` (regression) or
    `cosine_to_dense` (mean). Of outputs with several positions `accuracy_per_token` and `same_prediction_per_token`; of
    scorers of text `perplexity`; of other numbers `relative_error`: in these two less is better."""
    dense: float
    pruned: float
    samples: int

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


def outputs_of(model: nn.Module, batches: tuple[Mapping[str, Tensor], ...], pooling: str | None = None) -> Tensor:
    """Logits (rows, classes), or unit embeddings (rows, hidden).

    Args: pooling: of embeddings; None = the model's own.
    """
    pooling = pooling or pooling_of(model)
    with inference(model), torch.inference_mode():
        return torch.cat([_readout(model(**batch), batch, pooling) for batch in batches])


def _readout(output: Any, batch: Mapping[str, Tensor], pooling: str) -> Tensor:
    if "logits" in output:
        logits: Tensor = output["logits"]
        return logits
    states = output["last_hidden_state"]
    return pooled(states, valid_tokens(batch, states), pooling)


class Judge:
    """Compares pruned models with one dense model on the same rows; the dense one runs once."""

    def __init__(self, dense: Any, rows: Batches, *, origin: str = "the labels") -> None:
        """Args: origin: where the labels are from, for messages.

        Raises: BadInput: labels that the model does not know, or by which it is no better than guessing.
        """
        self.rows, self._dense = rows, outputs_of(dense, rows.batches)
        self._pooling = pooling_of(dense)
        self._classifies = gives_logits(dense)
        self._is_regression = self._classifies and is_regression(dense)
        labelled = self._classifies and not self._is_regression and None not in rows.labels
        self._labels = torch.tensor([class_index(x, dense.config) for x in rows.labels]) if labelled else None
        if self._labels is not None and self._dense.isfinite().all():  # else scoring names the layer
            known = {int(index): str(name) for index, name in dense.config.id2label.items()}
            names = [known.get(index, str(index)) for index in range(self._dense.shape[1])]
            check_order(self._labels.numpy(), self._dense.argmax(1).numpy(), names, origin)

    def of(self, pruned: nn.Module) -> Quality:
        """Accuracy of both models if the rows are labelled and the model classifies; else their agreement."""
        before, after, rows = self._dense, outputs_of(pruned, self.rows.batches, self._pooling), len(self.rows)
        if not self._classifies:
            return Quality("cosine_to_dense", 1.0, float((before * after).sum(1).mean()), rows)
        if self._is_regression:
            return Quality("correlation_with_dense", 1.0, correlation(before.flatten(), after.flatten()), rows)
        if self._labels is None:
            return Quality("same_prediction", 1.0, _share(before.argmax(1) == after.argmax(1)), rows)
        dense, small = (_share(logits.argmax(1) == self._labels) for logits in (before, after))
        return Quality("accuracy", dense, small, rows)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where it is undefined, as of constant outputs."""
    found = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
    return 0.0 if math.isnan(found) else found
