"""One batch through the dense model: what both scorers start from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.layout import ModelLayout
from optin_deploy.masking import Batch, Recording, check_finite, recorded, run_blocks
from optin_deploy.pooling import pooling_of
from optin_deploy.scoring.features import Features, Tokens, draw_tokens, valid_tokens
from optin_deploy.scoring.losses import Readout, read_out


@dataclass(frozen=True, eq=False)
class DensePass:
    """What a batch gives in the dense model."""

    recording: Recording
    last: Tensor
    """Output of the last block, (batch, tokens, hidden)."""
    valid: Tensor
    """(batch, tokens), 0 or 1."""
    tokens: Tokens
    """Those that the trajectory compares."""
    readout: Readout
    problem: str | None
    """`problem_type` of the config: regression or classification."""
    pooling: str
    """Of embeddings, see `optin_deploy.pooling`."""
    seconds: float
    """Of the forward."""

    def read(self, output: Any, times: int = 1) -> Tensor:
        """The compared values of another output on the same batch, repeated `times`."""
        return read_out(output, self.valid.repeat(times, 1), self.problem, self.pooling).values


def dense_pass(
    model: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    features: Features,
    seed: int,
    *,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
) -> DensePass:
    """Run a batch and keep the inputs and outputs of these modules.

    Raises: NonFiniteActivation: a layer puts out NaN or infinity.
    """
    end = layout.layers[-1].path
    started = _now(model)
    with recorded(model, inputs=inputs, outputs={*outputs, end}) as recording:
        output = model(**batch)
    seconds = _now(model) - started
    last = recording.outputs[end]
    valid = valid_tokens(batch, last)
    problem, pooling = getattr(model.config, "problem_type", None), pooling_of(model)
    readout = read_out(output, valid, problem, pooling)
    check_finite(model, batch, (*recording.inputs.values(), *recording.outputs.values(), readout.values))
    tokens = draw_tokens(features, batch, valid, seed)
    return DensePass(recording, last, valid, tokens, readout, problem, pooling, seconds)


def pulled_back(
    model: nn.Module, layout: ModelLayout, batch: Batch, dense: DensePass, directions: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of <direction, output> at the end of the last block, (batch, tokens, hidden) each."""
    with torch.enable_grad():
        hidden = dense.last.detach().requires_grad_()
        values = dense.read(run_blocks(model, layout, batch, start=len(layout.layers), hidden=hidden))
    return [torch.autograd.grad(values, hidden, direction, retain_graph=True)[0] for direction in directions]


def _now(model: nn.Module) -> float:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
