"""The fast scorer: the curvature of the OPTIN score by random projections, all units from a few backward passes.

At mask m = 1 the score and its gradient vanish, and its Gauss-Newton curvature is a squared Jacobian norm:
D_k(u) ~ ||dG_k / dm_u||^2. With R of independent N(0, 1) entries, E[(d<R, G>/dm_u)^2] is exactly that norm, so
one backward pass of s = sum of <R_k, G_k> estimates it for every unit of every layer, and a mask of shape
(batch, 1, units) keeps the samples apart. Noise is seeded by sample, layer and probe: batching changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, check_finite, masked, recorded, rows_of
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.losses import output_directions, output_kind, readout, token_gram, valid_tokens
from optin_deploy.scoring.terms import Terms, attention_branches, ffn_branches
from optin_deploy.storage import tensor_bytes

OUTPUT_STREAM = -1
"""Stands for the layer number in the seed of noise on the output."""


def sketch_terms(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    *,
    probes: int,
    seed: int,
    progress: Progress = silent,
) -> Terms:
    """Estimate both terms for every head and neuron; unbiased for the curvature, error ~ 1/sqrt(samples * probes).

    Args: probes: random projections per sample for each term.
    """
    branches = (*attention_branches(layout), *ffn_branches(layout))
    terms = Terms.zeros(branches)
    paths = [layer.path for layer in layout.layers]
    for done, batch in enumerate(batches):
        rows = rows_of(batch)
        device = next(iter(batch.values())).device
        masks = {b: torch.ones(rows, 1, b.units, device=device, requires_grad=True) for b in branches}
        with torch.enable_grad(), masked(model, masks), recorded(model, outputs=paths) as recording:
            output = model(**batch)
            states = [recording.outputs[path] for path in paths]
            valid = valid_tokens(batch, states[0])
            grams = [token_gram(state, valid) for state in states]
            reference = readout(output, valid)
        check_finite(model, batch, (*states, reference))
        keys = sample_keys(batch)
        kind = output_kind(output, getattr(model.config, "problem_type", None))
        output_noise = torch.stack([_noise(keys, seed, OUTPUT_STREAM, p, reference[0]) for p in range(probes)], 1)
        directions, factor = output_directions(kind, reference.detach(), output_noise)
        sums: list[tuple[Tensor, dict[Branch, Tensor], float]] = []
        with torch.enable_grad():
            for probe in range(probes):
                parts = [(_token_noise(keys, seed, k, probe, valid) * gram).sum() for k, gram in enumerate(grams)]
                sums.append((torch.stack(parts).sum(), terms.trajectory, 1.0 / probes))
            for direction in directions.unbind(1):
                sums.append(((direction * reference).sum(), terms.output, factor))
        for index, (projected, target, weight) in enumerate(sums):
            gradients = torch.autograd.grad(projected, list(masks.values()), retain_graph=index < len(sums) - 1)
            for branch, gradient in zip(branches, gradients, strict=True):
                target[branch] += weight * gradient.double().square().sum((0, 1)).cpu()  # (B, 1, units) -> (units,)
        terms.samples += rows
        progress(done + 1, len(batches))
    return terms


def sample_keys(batch: Batch) -> tuple[int, ...]:
    """A number for each sample that depends on its content alone, not on its place or padding."""
    valid = batch.get("attention_mask")
    main = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]
    rows = (row if valid is None else row[valid[i].bool()] for i, row in enumerate(main))
    return tuple(int.from_bytes(hashlib.sha256(tensor_bytes(row)).digest()[:6], "little") for row in rows)


def _noise(keys: Sequence[int], seed: int, layer: int, probe: int, like: Tensor) -> Tensor:
    """Standard normal noise of the shape of `like` for each sample: (batch, *like.shape)."""
    drawn = [torch.randn(like.shape, generator=_generator(key, seed, layer, probe)) for key in keys]
    return torch.stack(drawn).to(like)


def _token_noise(keys: Sequence[int], seed: int, layer: int, probe: int, valid: Tensor) -> Tensor:
    """Noise on the Gram of each sample's real tokens, zero on padding: (batch, tokens, tokens)."""
    noise = torch.zeros(*valid.shape, valid.shape[1])
    for row, key in enumerate(keys):
        real = valid[row].nonzero().squeeze(1).cpu()
        drawn = torch.randn(len(real), len(real), generator=_generator(key, seed, layer, probe))
        noise[row, real.unsqueeze(1), real] = drawn
    return noise.to(valid)


def _generator(key: int, seed: int, layer: int, probe: int) -> torch.Generator:
    digest = hashlib.sha256(f"{key}/{seed}/{layer}/{probe}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
