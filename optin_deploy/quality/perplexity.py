"""What a cut did to models of language: how well they foretell the next word, or one that is masked."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.feeds.rows import Batch, Feeds, real_first, rows_of
from optin_deploy.quality.quality import Quality, check_finite
from optin_deploy.scoring.losses import Readout

MOST = 700.0
"""Nats of a token below which the perplexity is a number."""


class PerplexityJudge:
    """Compares cut networks with the dense one: perplexity of each next token, or of the masked ones with the share of
    them that is right (pseudo-perplexity on masked tokens: Devlin et al., 2019, arXiv 1810.04805, section 3.1)."""

    def __init__(self, dense: Iterable[Readout], rows: Feeds, *, ids: str = "input_ids", masked: bool = False) -> None:
        """Read what the dense network gives.

        Args: dense: one a batch of `rows`. ids: the input with the tokens. masked: the labels of the rows are what
            masked tokens stand for, -1 elsewhere.
        Raises: BadInput: what is compared are no logits of each token. NonFiniteActivation: no finite perplexity.
        """
        self.rows, self._ids, self._masked = rows, ids, masked
        self._dense = self._found(dense)

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return the perplexity of both networks."""
        (before, right), (after, still) = self._dense, self._found(cut)
        if not self._masked:
            return Quality("perplexity", before, after, len(self.rows))
        return Quality("pseudo_perplexity", before, after, len(self.rows), {"masked_accuracy": (right, still)})

    def _found(self, readouts: Iterable[Readout]) -> tuple[float, float]:
        """Perplexity, and the share of the tokens that are right."""
        loss, right, count, start = 0.0, 0, 0, 0
        for readout, batch in zip(readouts, self.rows.batches, strict=True):
            values, targets = readout.values, self._targets(readout, batch, start)
            check_finite(values, self.rows.origin)
            for row, wanted in zip(values, targets, strict=True):  # a row at a time: logits of a vocabulary are large
                mark = wanted >= 0
                logits, words = row[mark].float(), wanted[mark].long()
                loss += float(torch.nn.functional.cross_entropy(logits, words, reduction="none").double().sum())
                right += int((logits.argmax(-1) == words).sum())
                count += int(mark.sum())
            start += rows_of(batch)
        if not count:
            raise BadInput(f"{self.rows.origin}: no token of the rows that judge is foretold. Give longer texts.")
        if not loss / count < MOST:
            raise NonFiniteActivation(
                f"{self.rows.origin}: a token costs {loss / count:.3g} nats on average, whose exponential, the "
                "perplexity, is no finite number. Check the weights; a network stored in half precision may overflow: "
                "export it in float32."
            )
        return math.exp(loss / count), right / count

    def _targets(self, readout: Readout, batch: Batch, start: int) -> Tensor:
        """The token that each position should foretell, (rows, positions), -1 where it foretells none."""
        ids, values = batch.get(self._ids), readout.values
        if ids is None or ids.shape != values.shape[:2] or int(ids.max()) >= values.shape[-1]:
            shape = "none" if ids is None else f"of shape {tuple(ids.shape)}"
            raise BadInput(
                f"perplexity needs logits of each token of a text; these are {tuple(values.shape)}, and the ids"
                f" ({self._ids!r}) are {shape}. Leave out the metric: agreement is measured."
            )
        if self._masked:
            some = self.rows.labels[start : start + rows_of(batch)]
            found = [label if isinstance(label, Tensor) else torch.full(ids.shape[1:], -1) for label in some]
            return real_first(torch.stack(found), batch).to(values.device)
        ids = real_first(ids, batch).to(values.device)
        ids = ids.masked_fill(readout.valid == 0, -1)
        return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -1)), 1)
