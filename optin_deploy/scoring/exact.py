"""The OPTIN score as published: mask one unit, run the rest of the model, measure how far its path bends.

    score(u in layer l) = sum over layers k >= l of D(F_k, F_k with u masked) + lambda * output distance

Forwards start at the unit's own layer; several units of one layer share a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, masked, recorded, rows_of, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.dense import dense_pass
from optin_deploy.scoring.features import ALL_TOKENS, Features, trajectory_distance
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.terms import Terms

TOKENS_PER_FORWARD = {"cpu": 4096}
"""Units share a forward until it holds this many tokens: enough to fill the device's matrix products."""
MOST_TOKENS = 65536
"""The same on a GPU."""


def exact_terms(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    units: Mapping[Branch, Sequence[int]],
    *,
    features: Features = ALL_TOKENS,
    seed: int = 0,
    rows: int | None = None,
    progress: Progress = silent,
) -> Terms:
    """Score the given units of the given branches on all batches; other units stay 0.

    Args:
        seed: of the draw of tokens, if `features` asks for one.
        rows: most samples times units in one forward, for memory; None = no limit.
    Source: Khaki & Plataniotis, ICLR 2024, section 3.
    """
    terms = Terms.zeros(units)
    blocks, paths = ([f(layer) for layer in layout.layers] for f in (lambda x: x.path, features.path))
    total = len(batches) * sum(map(len, units.values()))
    done = 0
    for batch in batches:
        dense = dense_pass(model, layout, batch, features, seed, outputs={*blocks, *paths})
        grams = [dense.tokens.gram(dense.recording.outputs[path]) for path in paths]
        terms.samples += rows_of(batch)
        terms.forward_seconds += dense.seconds
        for index, layer in enumerate(layout.layers):
            hidden = dense.recording.outputs[blocks[index - 1]] if index else None
            for branch in layer.branches:
                for chunk in _chunks(units.get(branch, ()), units_at_once(dense.valid, rows)):
                    many = {name: _repeat(value, len(chunk)) for name, value in batch.items()}
                    start = None if hidden is None else _repeat(hidden, len(chunk))
                    mask = _one_out(branch, chunk, dense.valid)
                    with masked(model, {branch: mask}), recorded(model, outputs=paths[index:]) as bent:
                        output = run_blocks(model, layout, many, start=index, hidden=start)
                    bent_grams = [dense.tokens.gram(bent.outputs[path]) for path in paths[index:]]
                    moved = dense.tokens.weight * trajectory_distance(grams[index:], bent_grams)
                    changed = output_distance(dense.readout, dense.read(output, len(chunk)))
                    terms.sums[branch][:, chunk] += _sums(moved, changed)
                    progress(done := done + len(chunk), total)
    return terms


def units_at_once(valid: Tensor, rows: int | None) -> int:
    """Units that share a forward: so many that it fills the device, and that samples times units stay below `rows`."""
    full = max(1, TOKENS_PER_FORWARD.get(valid.device.type, MOST_TOKENS) // valid.numel())
    return full if rows is None else max(1, min(full, rows // len(valid)))


def _chunks(units: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(units[i : i + size]) for i in range(0, len(units), size))


def _repeat(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *(1,) * (value.dim() - 1))  # (times * B, ...)


def _one_out(branch: Branch, chunk: Sequence[int], valid: Tensor) -> Tensor:
    """Masks of shape (units in chunk * batch, 1, units), each with one unit removed."""
    mask = torch.ones(len(chunk), branch.units).to(valid)
    mask[torch.arange(len(chunk)), list(chunk)] = 0
    return mask.repeat_interleave(len(valid), dim=0).unsqueeze(1)


def _sums(moved: Tensor, changed: Tensor) -> Tensor:
    """Sums of D, O, D^2, O^2 and D O over the samples, (5, units), in float64."""
    d, o = moved.double(), changed.double()
    both = d * o if d.shape == o.shape else torch.zeros_like(d)  # one D a batch: no samples to compare
    return torch.stack([x.sum(1) for x in (d, o, d.square(), o.square(), both)]).cpu()
