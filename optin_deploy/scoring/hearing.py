"""Which tokens matter: how far a change of each token of each feature moves what the network puts out.

A classifier that reads one token hears little of the others, and behind its last attention nothing: a least-squares fit
that weighs all tokens alike spends most of what is left of a pruned product on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.run import REAL_TYPES
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.scoring.losses import exact_directions, random_direction
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.noise import sample_keys, stream
from optin_deploy.scoring.subject import Subject, read_tokens, tokens_of
from optin_deploy.structure.stream import Feature, samples_axis

PROBES = 2
"""Random directions of the output, where it has too many for exact ones."""
FLOOR = 0.05
"""Least weight of a real token: the fit stays determined where the output hears hardly any."""
ROWS = 32
"""Samples at once."""


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """What each token's error counts, of some batches."""

    of: Mapping[str, tuple[Tensor, ...]]
    """Weights by value of the features, one tensor a batch: (batch, tokens), float64. The mean over a sample's real
    tokens is 1, and padding has 0."""

    def split(self, rows: int) -> TokenWeights:
        """Return the same for batches of at most so many samples, as `memory.micro_batches` makes them."""
        return TokenWeights(
            {name: tuple(p for each in of for p in torch.split(each, rows)) for name, of in self.of.items()}
        )

    def chosen(self, marks: Sequence[Tensor]) -> TokenWeights:
        """Return the same for the marked samples of each batch; batches without any are left out."""
        return TokenWeights(
            {
                name: tuple(each[mark] for each, mark in zip(of, marks, strict=True) if mark.any())
                for name, of in self.of.items()
            }
        )


def token_weights(
    subject: Subject, batches: Sequence[Batch], *, seed: int = 0, progress: Progress = silent
) -> TokenWeights | None:
    """The norm of each token's gradient, over the directions in which the output distance grows, within its sample.

    The distance itself grows with the square. The norm is less uneven, so that the fit rests on more tokens.
    Args: seed: of the random directions.
    Returns: None of an embedding that is a mean over tokens: all count the same.
    """
    shape = subject.structure.shapes.shape(subject.reading.output) or ()
    reading = subject.reading
    if reading.kind == "embedding" and reading.pooling == "mean" and len(shape) != 2:
        return None
    found: dict[str, list[Tensor]] = {feature.value: [] for feature in subject.features}
    for number, batch in enumerate(batches):
        parts = [_of_batch(subject, part, seed) for part in micro_batches([batch], 1 if subject.alone else ROWS)]
        for value, of in found.items():
            of.append(torch.cat([part[value] for part in parts]))
        progress(number + 1, len(batches))
    return TokenWeights({value: tuple(of) for value, of in found.items()})


def _of_batch(subject: Subject, batch: Batch, seed: int) -> dict[str, Tensor]:
    gradients = slopes_at(subject, batch, [feature.value for feature in subject.features], seed)
    found = {}
    for feature in subject.features:
        tokens = torch.stack([tokens_of(feature, each, rows_of(batch)) for each in gradients[feature.value]])
        norms = torch.linalg.vector_norm(tokens.double(), dim=(0, -1))  # (batch, tokens)
        valid = subject.real(batch, feature.value, feature.channels)
        fits = valid is not None and valid.shape == norms.shape
        real = valid.to(norms) if fits and valid is not None else torch.ones_like(norms)
        mean = (norms * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        shares = torch.where(mean > 0, norms / mean, 1.0)
        found[feature.value] = ((FLOOR + (1 - FLOOR) * shares) * real).detach().cpu()
    return found


def slopes_at(
    subject: Subject, batch: Batch, values: Sequence[str], seed: int, *, most: int | None = None
) -> dict[str, list[Tensor]]:
    """Return the gradients at some values of directions in which the output distance grows: the sum of their squares
    is how far a small change moves the output.

    Args: most: directions; where there are more, or they have no number, `PROBES` random ones stand for all.
    Returns: by value, one tensor of its shape a direction; a single one of zeros where nothing moves the output.
    """
    network = subject.structure.network
    first = min((network.producer[value].index for value in values), default=-1)
    early = {name for node in network.nodes[: first + 1] for name in node.inputs if name in network.weights}
    weights = {
        name: torch_tensor(network.weights[name]).to(subject.program.device, copy=True).requires_grad_()
        for name in early
        if int(network.weights[name].dtype) in REAL_TYPES
        and sum(size > 1 for size in network.weights[name].shape.numpy()) > 1
    }  # so that everything behind tables and matrices is recorded
    with torch.enable_grad():
        run = subject.program({**subject.fed(batch), **weights}, watch=values)
        readout = subject.read(run.outputs, read_tokens(batch))
    directions = exact_directions(readout)
    if directions is None or (most is not None and len(directions) > most):
        keys = sample_keys(batch)
        directions = [random_direction(readout, keys, stream(seed, "token weights", n)) for n in range(PROBES)]
    live = {value: root for value, root in run.watched.items() if root.requires_grad}
    gradients: dict[str, list[Tensor]] = {value: [] for value in values}
    for each in directions if live else ():
        back = torch.autograd.grad(
            readout.values, list(live.values()), each.detach(), retain_graph=True, allow_unused=True
        )
        for value, gradient in zip(live, back, strict=True):
            gradients[value] += [] if gradient is None else [gradient]
    return {value: some or [torch.zeros_like(run.watched[value])] for value, some in gradients.items()}


class Counts:
    """What an error at each place of a value counts: nothing for padding, else the weight of its token."""

    def __init__(self, subject: Subject, batches: Sequence[Batch], weights: TokenWeights | None) -> None:
        self._subject, self._batches, self._weights = subject, batches, weights

    def places(self, number: int, name: str, value: Tensor, node: int, *, behind: bool) -> Tensor:
        """Return what places of a value of a batch count, as a tensor that broadcasts over it.

        Args: behind: the tokens count as in the first feature that this node or a later one makes; else as in the last
            one before it. Where no feature has the shape of the value, real tokens all count the same.
        """
        feature = self._feature(name, node, behind)
        channels = feature.channels if feature is not None else value.dim() - 1
        counts = self._subject.real(self._batches[number], name, channels)
        if feature is not None and self._weights is not None:
            counts = self._weights.of[feature.value][number]
        none = value.new_ones([1] * value.dim(), dtype=torch.float32)
        if counts is None or samples_axis(self._subject.structure, name) != 0:
            return none
        places = [size for position, size in enumerate(value.shape) if position != channels]
        if math.prod(places) != counts.numel() or places[:1] not in ([len(counts)], [counts.numel()]):
            return none
        return counts.to(value.device).reshape(places).unsqueeze(channels)

    def _feature(self, name: str, node: int, behind: bool) -> Feature | None:
        shapes = self._subject.structure.shapes
        alike = [each for each in self._subject.features if shapes.shape(each.value) == shapes.shape(name)]
        if behind:
            return next((each for each in alike if each.node >= node), None)
        return next((each for each in reversed(alike) if each.node < node), None)
