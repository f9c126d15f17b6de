"""A model, its data, and how both are divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import onnx_ir as ir
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from optin_deploy.data.samples import Sample
from optin_deploy.feeds.image_feeds import image_feeds, image_input
from optin_deploy.feeds.inputs import input_names
from optin_deploy.feeds.ports import Takes
from optin_deploy.feeds.rows import Batching, Feeds
from optin_deploy.feeds.text_feeds import text_feeds, text_inputs
from optin_deploy.network.graph import Port


@dataclass(frozen=True, eq=False)
class Task:
    """A classifier with rows that it was not trained on."""

    name: str
    model: nn.Module
    """Evaluation mode, float32."""
    preprocessor: Any
    """Tokenizer or image processor."""
    calibration: tuple[Sample, ...]
    """Samples for scores and compensation. Labels are kept for rivals that need them; the product never looks at
    them."""
    test: tuple[Sample, ...]
    """Samples for judging alone."""
    seq_len: int
    """Tokens at which texts are cut; of an image."""
    inputs: Mapping[str, Tensor] | None = None
    """Example inputs by which a convolutional network is read; transformers' encoders say themselves what they take."""

    def batches(self, samples: Sequence[Sample], *, seq_len: int | None = None) -> Feeds:
        """Samples as the model takes them, labels in the order of their rows."""
        if samples[0].text is None:
            return images_of(self.model, samples, self.preprocessor)
        return texts_of(self.model, samples, self.preprocessor, seq_len or self.seq_len)


def texts_of(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, seq_len: int, *, batch_size: int = 32
) -> Feeds:
    """Texts as this model takes them, sorted by length."""
    inputs = text_inputs(_takes(model, ir.DataType.INT64, "rows", "tokens"))
    return text_feeds(inputs, samples, tokenizer, seq_len=seq_len, batching=Batching(batch_size), origin="a task")


def images_of(model: nn.Module, samples: Sequence[Sample], processor: Any, *, batch_size: int = 32) -> Feeds:
    """Images as this model takes them."""
    inputs = image_input(_takes(model, ir.DataType.FLOAT, "rows", 3, "height", "width"))
    how: dict[str, Any] = {"pixels": None, "size": None, "batching": Batching(batch_size), "origin": "a task"}
    return image_feeds(inputs, samples, processor, **how)


def _takes(model: nn.Module, dtype: ir.DataType, *shape: int | str) -> Takes:
    names = input_names(model) if hasattr(model, "config") else signature(model.forward).parameters
    ports = {name: Port(name, dtype, shape) for name in names}
    return Takes(type(model).__name__, ports, None, (), {})


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
