"""The OPTIN score as published: mask one unit, run the rest of the model, measure how far its path bends.

    score(u in layer l) = sum over layers k >= l of D(F_k, F_k with u masked) + lambda * output distance

Forwards start at the unit's own layer; several units of one layer share a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, LayerSpec, ModelLayout
from optin_deploy.masking import Batch, check_finite, masked, recorded, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.losses import (
    output_distance,
    output_kind,
    readout,
    token_gram,
    trajectory_distance,
    valid_tokens,
)
from optin_deploy.scoring.terms import Terms

TOKENS_PER_FORWARD = 4096
"""Units are batched until a forward holds this many tokens: enough to fill a CPU's matrix products."""


def exact_terms(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    units: Mapping[Branch, Sequence[int]],
    *,
    progress: Progress = silent,
) -> Terms:
    """Score the given units of the given branches on all batches; other units stay 0.

    Source: Khaki & Plataniotis, ICLR 2024, section 3.
    """
    terms = Terms.zeros(units)
    paths = [layer.path for layer in layout.layers]
    total = len(batches) * sum(map(len, units.values()))
    done = 0
    for batch in batches:
        with recorded(model, outputs=paths) as dense:
            output = model(**batch)
        states = [dense.outputs[path] for path in paths]
        valid = valid_tokens(batch, states[0])
        reference = readout(output, valid)
        check_finite(model, batch, (*states, reference))
        grams = [token_gram(state, valid) for state in states]
        kind = output_kind(output, getattr(model.config, "problem_type", None))
        terms.samples += len(valid)
        for index, layer in enumerate(layout.layers):
            hidden = states[index - 1] if index else None
            for branch in _wanted(layer, units):
                for chunk in _chunks(units[branch], max(1, TOKENS_PER_FORWARD // valid.numel())):
                    many = {name: _repeat(value, len(chunk)) for name, value in batch.items()}
                    mask = _one_out(branch, chunk, valid)
                    start = None if hidden is None else _repeat(hidden, len(chunk))
                    with masked(model, {branch: mask}), recorded(model, outputs=paths[index:]) as bent:
                        output = run_blocks(model, layout, many, start=index, hidden=start)
                    wide = _repeat(valid, len(chunk))
                    moved = sum(
                        trajectory_distance(_repeat(grams[k], len(chunk)), token_gram(bent.outputs[paths[k]], wide))
                        for k in range(index, len(paths))
                    )
                    change = output_distance(kind, _repeat(reference, len(chunk)), readout(output, wide))
                    terms.trajectory[branch][chunk] += _per_unit(moved, chunk)
                    terms.output[branch][chunk] += _per_unit(change, chunk)
                    progress(done := done + len(chunk), total)
    return terms


def _wanted(layer: LayerSpec, units: Mapping[Branch, Sequence[int]]) -> Iterable[Branch]:
    return (branch for branch in (layer.attention, layer.ffn) if branch in units)


def _chunks(units: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(units[i : i + size]) for i in range(0, len(units), size))


def _repeat(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *(1,) * (value.dim() - 1))  # (times * B, ...)


def _one_out(branch: Branch, chunk: list[int], valid: Tensor) -> Tensor:
    """Masks of shape (units in chunk * batch, 1, units), each with one unit removed."""
    mask = torch.ones(len(chunk), branch.units).to(valid)
    mask[torch.arange(len(chunk)), chunk] = 0
    return mask.repeat_interleave(len(valid), dim=0).unsqueeze(1)


def _per_unit(distance: Tensor | int, chunk: list[int]) -> Tensor:
    """(units * batch,) -> (units,), summed over the batch in float64."""
    return torch.as_tensor(distance).view(len(chunk), -1).sum(1).double().cpu()
