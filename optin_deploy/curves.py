"""Error curves: how far the outputs move when one branch alone gets narrower, compensated, at a few widths.

Every branch keeps its best units by score. Between the measured widths the error is interpolated, so that a search can
trade any width of one branch for any of another. No labels: the error is the scores' own distance to dense outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from optin_deploy.data.batches import make_batches
from optin_deploy.errors import BadInput
from optin_deploy.guard import working
from optin_deploy.judging import joined, judged_samples
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, inference, recorded, rows_of, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.regression import Moments
from optin_deploy.rewrite.slices import projection_at, unit_columns
from optin_deploy.scoring.dense import DensePass, dense_pass
from optin_deploy.scoring.features import ALL_TOKENS, valid_tokens
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.scores import Scores
from optin_deploy.token_weights import TokenWeights
from optin_deploy.validation import STORED, validated

SCHEMA_VERSION = 2
HINT = "Measure them with `optin plan DIR`."
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Measured widths, of a branch's units; with all of them the error is 0."""
RIDGE = 1e-2
"""Relative to the mean variance of the kept inputs: the middle of what compensation chooses from."""


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
            raise BadInput(f"curves: of another model or version. {HINT}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curves:
        """Read what `to_json` wrote.

        Raises: BadInput: a field is missing, unknown or of the wrong type.
        """
        return validated(cls, data, "curves: not curves of optin-deploy", HINT)


def error_curves(
    model: nn.Module,
    layout: ModelLayout,
    scores: Scores,
    batches: Sequence[Batch],
    *,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> Curves:
    """Measure every branch at a few widths; each costs forwards of the judging samples from the branch's block on.

    Args:
        batches: unlabeled calibration inputs; every fourth sample, at most 128 of them, judge what the others fitted.
        token_weights: what each token of these batches counts in the fit; None = all the same.
    """
    scores.check(layout)
    curves: dict[Branch, Curve] = {}
    with working(model), inference(model), torch.no_grad():
        batches = make_batches(model, batches)
        marks = judged_samples(batches)
        judged = joined(batches, marks)
        dense = [dense_pass(model, layout, batch, ALL_TOKENS, 0) for batch in judged]
        fit_inputs: list[Tensor | None] = [None] * len(batches)  # of the block in hand
        inputs: list[Tensor | None] = [None] * len(judged)
        for index, layer in enumerate(layout.layers):
            moments = {branch: Moments(branch.width, 0) for branch in layer.branches}
            for i, batch in enumerate(batches):
                with recorded(model, inputs=[branch.output for branch in layer.branches]) as seen:
                    after = run_blocks(model, layout, batch, start=index, hidden=fit_inputs[i], stop=layer.path)
                fitted = valid_tokens(batch, after).bool() & ~marks[i].to(after.device).unsqueeze(1)
                weights = None if token_weights is None else token_weights[index][i][fitted]
                for branch, sums in moments.items():
                    units = seen.inputs[branch.output][fitted]  # (fitted tokens, units * width)
                    sums.add(units, units[:, :0], weights)
                fit_inputs[i] = after
            error = partial(_error, model, layout, index, judged, inputs, dense)
            for branch, values in zip(layer.branches, (scores.heads[index], scores.neurons[index]), strict=True):
                order = values.argsort(descending=True, stable=True).tolist()
                curves[branch] = _curve(model, branch, order, moments[branch], error)
            inputs = [
                run_blocks(model, layout, batch, start=index, hidden=hidden, stop=layer.path)
                for batch, hidden in zip(judged, inputs, strict=True)
            ]
            progress(index + 1, len(layout.layers))
    heads, neurons = zip(*[[curves[branch] for branch in layer.branches] for layer in layout.layers], strict=True)
    return Curves(heads, neurons, layout.hash)


def _error(
    model: nn.Module,
    layout: ModelLayout,
    index: int,
    batches: Sequence[Batch],
    inputs: Sequence[Tensor | None],
    dense: Sequence[DensePass],
) -> float:
    """Mean distance of the outputs to the dense ones, from the inputs of block `index` on."""
    total = 0.0
    for batch, hidden, before in zip(batches, inputs, dense, strict=True):
        after = before.read(run_blocks(model, layout, batch, start=index, hidden=hidden))
        total += float(output_distance(before.readout, after).sum())
    return total / sum(map(rows_of, batches))


def _curve(
    model: nn.Module, branch: Branch, order: Sequence[int], moments: Moments, error: Callable[[], float]
) -> Curve:
    """The errors of a branch that keeps its first units in this order."""
    counts = sorted({round(share * branch.units) for share in SHARES} - {branch.units})
    errors: list[float] = []
    for count in counts:
        with _narrowed(model, branch, unit_columns(sorted(order[:count]), branch.unit_width), moments):
            errors.append(error())
    # A wider branch can do what a narrower one does: where it measures worse, that is noise.
    falling = np.minimum.accumulate(errors).tolist()
    return Curve((*counts, branch.units), (*falling, 0.0))


@contextmanager
def _narrowed(model: nn.Module, branch: Branch, columns: Tensor, moments: Moments) -> Iterator[None]:
    """Let a branch do with some columns of its output projection, compensated from dense inputs."""
    projection = projection_at(model, branch.output)
    module, weight = projection.module, projection.weight.data
    stored, bias = module.weight.data, None if module.bias is None else module.bias.data
    change, offset = moments.narrowed(columns, weight).solve(RIDGE, centred=bias is not None)
    narrow = torch.zeros_like(weight)
    narrow[:, columns] = weight[:, columns] + change.T.to(weight)
    module.weight.data = projection.stored(narrow)
    if bias is not None:
        module.bias.data = bias + offset.to(bias)
    try:
        yield
    finally:
        module.weight.data = stored
        if bias is not None:
            module.bias.data = bias
