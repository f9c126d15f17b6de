"""Which tokens matter: how far a change of each token of each block's output moves what the model puts out.

A classifier that reads one token hears little of the others, and in its last block nothing: a least-squares fit that
weighs all tokens alike spends most of what is left of a pruned projection on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optin_deploy.data.batches import make_batches
from optin_deploy.guard import working
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import Batch, inference, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.dense import dense_pass, pulled_back
from optin_deploy.scoring.features import ALL_TOKENS
from optin_deploy.scoring.losses import exact_directions, random_direction
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.noise import sample_keys, stream

TokenWeights = list[list[Tensor]]
"""[layer][batch]: (batch, tokens), float64; the mean over a sample's real tokens is 1, padding has 0."""
PROBES = 2
"""Random directions of the output, where it has too many for exact ones."""
FLOOR = 0.05
"""Least weight of a real token: the fit stays determined where the output hears hardly any."""
ROWS = 32
"""Samples at once."""


def measure_token_weights(
    model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], *, seed: int = 0, progress: Progress = silent
) -> TokenWeights | None:
    """The norm of each token's gradient, over the directions in which the output distance grows, within its sample.

    The distance itself grows with the square. The norm is less uneven, so that the fit rests on more tokens: from few
    samples that carries further than the square where tokens differ most, and is as good elsewhere.
    An embedding is the mean of all tokens: there they count the same (on all-MiniLM-L6-v2 at 60% of the MACs, output
    projections compensated, weights by gradients brought the cosine to dense embeddings of unseen articles from 0.916
    to 0.912).
    Block by block from the last one, a few samples at once: the memory is that of one block's graph, beside the inputs
    of all blocks.
    Args: seed: of the random directions.
    Returns: None of an embedding: all tokens count the same.
    """
    found: TokenWeights = [[] for _ in layout.layers]
    with working(model), inference(model), torch.no_grad():
        batches = make_batches(model, batches)
        one = {name: value[:1] for name, value in batches[0].items()}
        if dense_pass(model, layout, one, ALL_TOKENS, seed).readout.kind == "embedding":
            return None
        for number, batch in enumerate(batches):
            parts = [_of_batch(model, layout, part, seed) for part in micro_batches([batch], ROWS)]
            for layer, weights in zip(found, zip(*parts, strict=True), strict=True):
                layer.append(torch.cat(weights))
            progress(number + 1, len(batches))
    return found


def _of_batch(model: nn.Module, layout: ModelLayout, batch: Batch, seed: int) -> list[Tensor]:
    """Of every layer, (batch, tokens) in float64."""
    dense = dense_pass(model, layout, batch, ALL_TOKENS, seed, inputs=[layer.path for layer in layout.layers])
    directions = exact_directions(dense.readout)
    if directions is None:
        keys, streams = sample_keys(batch), [stream(seed, "token weights", probe) for probe in range(PROBES)]
        directions = [random_direction(dense.readout, keys, each) for each in streams]
    gradients = pulled_back(model, layout, batch, dense, directions)
    found = []
    for index in reversed(range(len(layout.layers))):
        norms = torch.linalg.vector_norm(torch.stack(gradients).double(), dim=(0, -1))  # (batch, tokens)
        found.append(_shares(norms, dense.valid.double()))
        if index:
            gradients = _passed_down(model, layout, batch, index, dense.recording.inputs, gradients)
    return found[::-1]


def _passed_down(
    model: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    index: int,
    inputs: dict[str, Tensor],
    gradients: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients at a block's output -> at its input, (batch, tokens, hidden) each."""
    path = layout.layers[index].path
    hidden = inputs.pop(path).detach().requires_grad_()
    with torch.enable_grad():
        out = run_blocks(model, layout, batch, start=index, hidden=hidden, stop=path)
    return [torch.autograd.grad(out, hidden, gradient, retain_graph=True)[0] for gradient in gradients]


def _shares(norms: Tensor, valid: Tensor) -> Tensor:
    """(batch, tokens), scaled to a mean of 1 over real tokens; equal where nothing moves the output.

    Padding moves nothing: its norms are 0.
    """
    mean = norms.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    shares = torch.where(mean > 0, norms / mean, 1.0)
    return (FLOOR + (1 - FLOOR) * shares) * valid
