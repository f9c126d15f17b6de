"""Error curves: how far the outputs move when one branch alone gets narrower, compensated, at a few widths.

Every branch keeps its best units by score. Between the measured widths the error is interpolated, so that a search can
trade any width of one branch for any of another. No labels: the error is the scores' own distance to dense outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, inference, recorded, rows_of, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.regression import Moments
from optin_deploy.rewrite.slices import linear_at, unit_columns
from optin_deploy.scoring.dense import DensePass, dense_pass
from optin_deploy.scoring.features import ALL_TOKENS, valid_tokens
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.scores import Scores
from optin_deploy.validation import STORED, validated

SCHEMA_VERSION = 1
HINT = "Measure them with `optin plan DIR --allocation curves`."
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Measured widths, of a branch's units; with all of them the error is 0."""
RIDGE = 1e-2
"""Relative to the mean variance of the kept inputs: the middle of what compensation chooses from."""
JUDGED_EVERY = 4
"""Every fourth sample of a batch measures the error; the others fit the compensation."""


@dataclass(frozen=True)
class Curve:
    """The error of one branch at some widths."""

    __pydantic_config__ = STORED

    counts: tuple[int, ...]
    """Kept units, ascending from 0 to all."""
    errors: tuple[float, ...]
    """Mean distance of the outputs to the dense ones; never rises, 0 at the end."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        falling = all(a >= b for a, b in zip(self.errors, self.errors[1:], strict=False))
        if len(self.counts) < 2 or len(self.counts) != len(self.errors) or self.counts[0] != 0:
            raise BadInput(f"curve: give an error for 0 to all units: {self.counts}, {self.errors}.")
        if not (ascending and falling and self.errors[-1] == 0 and np.isfinite(self.errors).all()):
            raise BadInput(f"curve: counts must rise, and errors fall to 0: {self.counts}, {self.errors}.")

    def at(self, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Interpolated errors, monotone between the measured widths."""
        found: np.ndarray = PchipInterpolator(self.counts, self.errors)(np.asarray(counts)).clip(min=0)
        return found


@dataclass(frozen=True)
class Curves:
    """Error curves of all branches."""

    __pydantic_config__ = STORED

    heads: tuple[Curve, ...]
    """One a layer."""
    neurons: tuple[Curve, ...]
    layout_hash: str
    schema_version: int = SCHEMA_VERSION

    def check(self, layout: ModelLayout) -> None:
        """Make sure that they belong to this layout.

        Raises: BadInput.
        """
        counts = [curve.counts[-1] for curve in (*self.heads, *self.neurons)]
        expected = [*(layer.heads for layer in layout.layers), *(layer.neurons for layer in layout.layers)]
        if self.layout_hash != layout.hash or self.schema_version != SCHEMA_VERSION or counts != expected:
            raise BadInput(
                "curves: of another model or version. Measure them again with `optin plan DIR --allocation curves`."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curves:
        """Read what `to_json` wrote.

        Raises: BadInput: a field is missing, unknown or of the wrong type.
        """
        return validated(
            cls,
            data,
            "curves: not curves of optin-deploy",
            "Measure them again with `optin plan DIR --allocation curves`.",
        )


def error_curves(
    model: nn.Module,
    layout: ModelLayout,
    scores: Scores,
    batches: Sequence[Batch],
    *,
    progress: Progress = silent,
) -> Curves:
    """Measure every branch at a few widths; costs about as much as 20 dense forwards over the samples.

    Args: batches: unlabeled calibration inputs; every fourth sample judges what the others fitted.
    """
    scores.check(layout)
    fitted, judged = _divided(batches)
    heads: list[Curve] = []
    neurons: list[Curve] = []
    with inference(model), torch.no_grad():
        dense = [dense_pass(model, layout, batch, ALL_TOKENS, 0) for batch in judged]
        inputs: list[list[Tensor | None]] = [[None] * len(some) for some in (fitted, judged)]
        for index, layer in enumerate(layout.layers):
            moments = {branch: Moments(branch.units * branch.unit_width, 0) for branch in layer.branches}
            ahead: list[list[Tensor | None]] = []
            for some, states in zip((fitted, judged), inputs, strict=True):
                ahead.append([])
                for batch, hidden in zip(some, states, strict=True):
                    with recorded(model, inputs=[branch.output for branch in moments]) as seen:
                        after = run_blocks(model, layout, batch, start=index, hidden=hidden, stop=layer.path)
                    ahead[-1].append(after)
                    if some is fitted:
                        _take(moments, seen.inputs, valid_tokens(batch, after))
            for branch, unit_scores, found in (
                (layer.attention, scores.heads[index], heads),
                (layer.ffn, scores.neurons[index], neurons),
            ):
                order = unit_scores.argsort(descending=True, stable=True).tolist()
                found.append(_curve(model, layout, branch, index, order, moments[branch], judged, inputs[1], dense))
            inputs = ahead
            progress(index + 1, len(layout.layers))
    return Curves(tuple(heads), tuple(neurons), layout.hash)


def _take(moments: Mapping[Branch, Moments], units: Mapping[str, Tensor], valid: Tensor) -> None:
    for branch, sums in moments.items():
        rows = units[branch.output][valid.bool()]  # (real tokens, units * width)
        sums.add(rows, rows[:, :0])


def _curve(
    model: nn.Module,
    layout: ModelLayout,
    branch: Branch,
    index: int,
    order: Sequence[int],
    moments: Moments,
    batches: Sequence[Batch],
    inputs: Sequence[Tensor | None],
    dense: Sequence[DensePass],
) -> Curve:
    """The curve of one branch of block `index`; `inputs` are the block's."""
    counts = sorted({round(share * branch.units) for share in SHARES} - {branch.units})
    errors: list[float] = []
    for count in counts:
        with _narrowed(model, branch, unit_columns(sorted(order[:count]), branch.unit_width), moments):
            total = 0.0
            for batch, hidden, before in zip(batches, inputs, dense, strict=True):
                after = before.read(run_blocks(model, layout, batch, start=index, hidden=hidden))
                total += float(output_distance(before.readout, after).sum())
        errors.append(total / sum(map(rows_of, batches)))
    # A wider branch can do what a narrower one does: where it measures worse, that is noise.
    falling = np.minimum.accumulate(errors).tolist()
    return Curve((*counts, branch.units), (*falling, 0.0))


@contextmanager
def _narrowed(model: nn.Module, branch: Branch, columns: Tensor, moments: Moments) -> Iterator[None]:
    """Let a branch do with some columns of its output projection, compensated from dense inputs."""
    linear = linear_at(model, branch.output)
    weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
    change, offset = moments.narrowed(columns, weight).solve(RIDGE, centred=bias is not None)
    narrow = torch.zeros_like(weight)
    narrow[:, columns] = weight[:, columns] + change.T.to(weight)
    linear.weight.data = narrow
    if bias is not None:
        linear.bias.data = bias + offset.to(bias)
    try:
        yield
    finally:
        linear.weight.data = weight
        if bias is not None:
            linear.bias.data = bias


def _divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples to fit and samples to judge; batches stay sorted by length.

    Raises: BadInput: too few samples for both.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    start = 0
    for batch in batches:
        number = torch.arange(rows_of(batch)) + start
        start += rows_of(batch)
        judged = number % JUDGED_EVERY == JUDGED_EVERY - 1
        for part, rows in zip(parts, (~judged, judged), strict=True):
            if rows.any():
                part.append({name: value[rows.to(value.device)] for name, value in batch.items()})
    if not all(parts):
        raise BadInput(f"{start} calibration samples are too few for error curves: give at least {JUDGED_EVERY}.")
    return parts
