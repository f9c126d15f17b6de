"""Prove that what an export left computes the same as the networks that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from optin_deploy.errors import ParityFailure
from optin_deploy.exporters.base import Artifact, Form
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.feeds.rows import MASK, Batch
from optin_deploy.jobs.building import ArtifactPair, Built, Forms
from optin_deploy.measuring.artifact_inputs import Input, make_feeds, network_inputs
from optin_deploy.measuring.points import Point
from optin_deploy.network.run import Program

ROWS = 8
"""Samples on which engines are compared."""
NARROW = ("fp16", "bf16")
"""Precisions that round so much that choices flip."""
ROUNDINGS = 4
"""An engine may be so many times as far off as float32 itself is, where that is more than the tolerance."""
Arrays = dict[str, np.ndarray]


def check_engine(built: Built, forms: Forms, samples: Sequence[Batch]) -> dict[str, float]:
    """Error of every artifact that runs here against our own float32 run of its network.

    Args: samples: real inputs, batch by batch.
    Returns: `torch_vs_engine` (and `_dense`) of the last engine that runs here, the others with their names added.
    Raises: ParityFailure: above the tolerance of the precision.
    """
    errors = {}
    runs_here = [pair for pair in built.pairs if pair.obstacle is None]
    for pair in runs_here:
        for name, artifact in pair.artifacts().items():
            form = forms.pruned if name == "pruned" else forms.dense
            if form is not None:
                key = "torch_vs_engine" if pair is runs_here[-1] else f"torch_vs_{pair.engine.engine}_{pair.precision}"
                errors[key if name == "pruned" else f"{key}_dense"] = _error(pair, artifact, form, samples)
    return errors


def _feeds(artifact: Artifact, form: Form, samples: Sequence[Batch]) -> list[Arrays]:
    """Real rows of two sizes, or random ones at the artifact's own shapes; the last token there is padding."""
    names = [port.name for port in form.network.inputs]
    if not artifact.shapes:
        chosen = (samples[0], samples[-1]) if len(samples) > 1 else (samples[0],)
        return [{name: _rows(batch[name]).numpy() for name in names} for batch in chosen]
    inputs: tuple[Input, ...] = network_inputs(form.network)
    found = []
    for batch, tokens in dict.fromkeys(artifact.shapes):
        feeds = make_feeds(inputs, Point(batch, tokens), seed=batch)
        if MASK in feeds and tokens > 1:
            feeds[MASK][-1, -1] = 0
        found.append(feeds)
    return found


def _rows(values: Tensor) -> Tensor:
    return values[:ROWS] if values.dim() else values


def _error(pair: ArtifactPair, artifact: Artifact, form: Form, samples: Sequence[Batch]) -> float:
    errors, rounding = [], [0.0]
    program = Program(form.network)
    # Narrow types flip a choice between entries that are nearly the same, such as tokens that are merged.
    chooses = pair.precision in NARROW and any(node.op == "TopK" for node in form.network.nodes)
    tolerance = TOLERANCES["int8" if chooses else pair.precision]
    distance = _rms_error if chooses or pair.precision == "int8" else relative_error
    with pair.engine.open(artifact.path, precision=pair.precision, task=form.task) as runtime, torch.inference_mode():
        for feeds in _feeds(artifact, form, samples):
            expected = program({name: torch.from_numpy(values) for name, values in feeds.items()}).outputs
            for name, values in runtime.run(feeds).items():
                if name in expected and np.issubdtype(values.dtype, np.floating):
                    ours = expected[name].float().numpy()
                    real = _real(feeds, ours)
                    errors.append(distance(ours * real, values * real))
            if not np.max(errors) <= tolerance:
                rounding.append(_rounding(form, feeds, expected))
    worst = float(np.max(errors))  # NaN stays NaN
    if not worst <= max(tolerance, ROUNDINGS * max(rounding)):
        raise ParityFailure(
            f"{artifact.path} differs from what it was made of by {worst:.2e} (allowed in {pair.precision}: "
            f"{tolerance:.0e}). See `optin doctor {artifact.path.parent}`."
        )
    return worst


def _rounding(form: Form, feeds: Arrays, expected: Mapping[str, Tensor]) -> float:
    """How far our own float32 run is from one in float64: what no engine can be blamed for."""
    exact = Program(form.network, dtype=torch.float64)(
        {name: torch.from_numpy(values) for name, values in feeds.items()}
    ).outputs
    errors = [0.0]
    for name, values in expected.items():
        if values.is_floating_point():
            real = _real(feeds, values.float().numpy())
            errors.append(relative_error(exact[name].numpy() * real, values.double().numpy() * real))
    return max(errors)


def _real(feeds: Mapping[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """1 where a value belongs to a real token, 0 at padding, where engines may put out what they like."""
    mask = feeds.get(MASK)
    if mask is None or mask.ndim != 2 or values.shape[:2] != mask.shape:
        return np.ones(1, np.float32)
    return mask.reshape(*mask.shape, *(1,) * (values.ndim - 2)).astype(np.float32)


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference over the largest value, at least 1."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected - found).max(initial=0) / max(1.0, float(np.abs(expected).max(initial=0))))


def _rms_error(expected: np.ndarray, found: np.ndarray) -> float:
    """|expected - found| / |expected|, Euclidean: rounding to int8 hits single values hard that matter little."""
    size = float(np.linalg.norm(expected))
    # Outputs that are all 0 have no size to compare with.
    return float(np.linalg.norm(expected - found)) / (size or 1.0)
