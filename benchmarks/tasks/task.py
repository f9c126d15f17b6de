"""A model, its data, and how both are divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from optin_deploy.data.calibration import Batches, Sample, image_batches, text_batches
from optin_deploy.inputs import input_names


@dataclass(frozen=True, eq=False)
class Task:
    """A classifier with rows that it was not trained on."""

    name: str
    model: nn.Module
    """Evaluation mode, float32."""
    preprocessor: Any
    """Tokenizer or image processor."""
    calibration: tuple[Sample, ...]
    """For scores and compensation. Labels are kept for rivals that need them; the product never looks at them."""
    test: tuple[Sample, ...]
    """For judging alone."""
    seq_len: int
    """Tokens at which texts are cut; of an image."""

    def batches(self, samples: Sequence[Sample], *, seq_len: int | None = None) -> Batches:
        """As the model takes them, labels in the order of their rows."""
        if samples[0].text is None:
            return image_batches(samples, self.preprocessor)
        return text_batches_of(self.model, samples, self.preprocessor, seq_len or self.seq_len)


def text_batches_of(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, seq_len: int, *, batch_size: int = 32
) -> Batches:
    """Texts as this model takes them."""
    return text_batches(samples, tokenizer, seq_len=seq_len, batch_size=batch_size, inputs=input_names(model))


def judged(outputs: torch.Tensor, labels: Sequence[Any]) -> dict[str, Any]:
    """The task's metric, and a figure for each row, by which methods are paired.

    Classes: accuracy, and 1 for a right row. Numbers: Spearman's correlation, and the negative squared error.
    """
    wanted = torch.tensor(labels)
    if outputs.shape[1] > 1:
        right = (outputs.argmax(1) == wanted).int()
        return {"value": float(right.float().mean()), "rows": right.tolist()}
    found = outputs[:, 0]
    constant = bool((found == found[0]).all() or (wanted == wanted[0]).all())
    value = 0.0 if constant else float(spearmanr(found, wanted).statistic)
    return {"value": value, "rows": (-((found - wanted) ** 2)).tolist()}
