"""Prove that what an export left computes the same as the torch model it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.base import POOLED, TOLERANCES, Artifact
from exporters.building import Built, Pair
from optin_deploy.errors import ParityFailure
from optin_deploy.inputs import example_inputs
from optin_deploy.masking import Batch, inference
from optin_deploy.pooling import pooling_of
from optin_deploy.rewrite.verify import main_output, relative_error
from optin_deploy.runtimes.base import Runtime

PARITY_POINTS = ((1, 1.0), (3, 0.4))
"""(batch, share of seq_len) at which engines are compared with torch: not the sizes that were traced."""
ROWS = 8
"""Samples on which int8 is compared."""


def check_engine(
    built: Built, pruned: nn.Module, dense: nn.Module | None, *, seq_len: int, samples: Sequence[Batch] = ()
) -> dict[str, float]:
    """Error on real tokens of every artifact that runs here against its torch model.

    Args: samples: real inputs, for int8, whose activations have their measured range on nothing else.
    Returns: `torch_vs_engine` (and `_dense`) of the last engine that runs here, the others with their names added.
    Raises: ParityFailure: above the tolerance of the precision.
    """
    errors = {}
    runs_here = [pair for pair in built.pairs if pair.obstacle is None]
    for pair in runs_here:
        for name, artifact in pair.artifacts().items():
            model = pruned if name == "pruned" else dense
            if model is not None:
                key = "torch_vs_engine" if pair is runs_here[-1] else f"torch_vs_{pair.engine.engine}_{pair.precision}"
                inputs = _inputs(pair, artifact, model, seq_len, samples)
                errors[key if name == "pruned" else f"{key}_dense"] = _error(pair, artifact, model, inputs)
    return errors


def _inputs(
    pair: Pair, artifact: Artifact, model: nn.Module, seq_len: int, samples: Sequence[Batch]
) -> list[dict[str, Tensor]]:
    """Random inputs at the artifact's own shapes, or at sizes that were not traced; the last token is padding."""
    if pair.precision == "int8" and samples:
        return [{name: values[:ROWS] for name, values in samples[0].items()}]
    shapes = artifact.shapes or tuple((batch, max(2, int(share * seq_len))) for batch, share in PARITY_POINTS)
    found = []
    for batch, tokens in dict.fromkeys(shapes):
        inputs = example_inputs(model, batch=batch, seq_len=tokens, seed=batch)
        if "attention_mask" in inputs and tokens > 1:
            inputs["attention_mask"][-1, -1] = 0
        found.append(inputs)
    return found


def _error(pair: Pair, artifact: Artifact, model: nn.Module, feeds: Sequence[Mapping[str, Tensor]]) -> float:
    errors = []
    distance = _rms_error if pair.precision == "int8" else relative_error
    with (
        pair.engine.open(artifact.path, precision=pair.precision) as runtime,
        inference(model),
        torch.inference_mode(),
    ):
        for inputs in feeds:
            expected = main_output(model(**inputs))
            found = runtime.run({k: v.numpy() for k, v in inputs.items()})
            main = found[artifact.outputs[0]]
            if expected.dim() < 3:
                errors.append(distance(expected.numpy(), main))
                continue
            real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).unsqueeze(-1)  # (batch, tokens, 1)
            errors.append(distance((expected * real).numpy(), main * real.numpy()))
            if POOLED in found:
                if pooling_of(model) == "cls":
                    embedding = expected[torch.arange(len(expected)), real.squeeze(-1).argmax(1)]
                else:
                    embedding = (expected * real).sum(1) / real.sum(1)
                errors.append(distance(embedding.numpy(), found[POOLED]))
    worst = float(np.max(errors))  # NaN stays NaN
    if not worst <= TOLERANCES[pair.precision]:
        raise ParityFailure(
            f"{artifact.path} differs from its torch model by {worst:.2e} (allowed in {pair.precision}: "
            f"{TOLERANCES[pair.precision]:.0e}). See `optin doctor {artifact.path.parent}`."
        )
    return worst


def _rms_error(expected: np.ndarray, found: np.ndarray) -> float:
    """|expected - found| / |expected|, Euclidean: rounding to int8 hits single values hard that matter little."""
    size = float(np.linalg.norm(expected))
    # Outputs that are all 0 have no size to compare with.
    return float(np.linalg.norm(expected - found)) / (size or 1.0)


class EngineModel(nn.Module):
    """An open artifact with the face of a transformers model, so that quality is judged on what is shipped."""

    def __init__(self, runtime: Runtime, output: str) -> None:
        super().__init__()
        self.runtime, self.output = runtime, output

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The main output, under its name."""
        found = self.runtime.run({name: values.numpy() for name, values in inputs.items()})
        return {self.output: torch.from_numpy(found[self.output].copy())}
