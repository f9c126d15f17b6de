"""What the trajectory compares: which features of a block, of which tokens, and the Gram matrix over them.

Source: Khaki & Plataniotis, ICLR 2024 (arXiv 2403.17921), section 3; the normalisations are ours: Grams are per
sample over its own tokens and divided by the token count, so that long texts do not dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.feeds.rows import Batch
from optin_deploy.scoring.noise import sample_keys, stream, uniform_order
from optin_deploy.scoring.settings import Features


@dataclass(frozen=True, eq=False)
class Tokens:
    """The compared tokens of one batch, in groups; each group has a Gram matrix of its own."""

    batch: int
    """Number of samples."""
    places: Tensor | None
    """(groups, tokens): places in the flattened (batch * tokens) features; None = all, where they are."""
    valid: Tensor
    """(groups, tokens), 0 or 1."""

    @property
    def weight(self) -> float:
        """Samples a group stands for."""
        return self.batch / len(self.valid)

    def gram(self, features: Tensor) -> Tensor:
        """Cosine of every pair of a group's tokens, divided by its token count.

        Args: features: (times * batch, tokens, hidden).
        Returns: (times * groups, tokens, tokens); rows and columns of padding are zero.
        """
        times = len(features) // self.batch
        valid = self.valid.repeat(times, 1)
        unit = torch.nn.functional.normalize(self._chosen(features), dim=-1) * valid.unsqueeze(-1)
        return unit @ unit.transpose(1, 2) / valid.sum(1).view(-1, 1, 1)

    def pulled(self, features: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of sums of weights times `gram`, by the features.

        Args: features: (batch, tokens, hidden). weights: (groups, tokens, tokens) each.
        """
        chosen = self._chosen(features)
        norms = torch.linalg.vector_norm(chosen, dim=-1, keepdim=True).clamp(min=1e-12)  # as `normalize` has it
        unit, valid = chosen / norms, self.valid.unsqueeze(-1)
        real, shares = unit * valid, valid / valid.sum(1, keepdim=True) / norms
        found = []
        for each in weights:
            pulled = (each + each.transpose(1, 2)) @ real
            found.append((pulled - unit * (unit * pulled).sum(-1, keepdim=True)) * shares)
        if self.places is None:
            return found
        empty, places = torch.zeros_like(features).flatten(0, 1), self.places.flatten()
        return [empty.index_add(0, places, each.flatten(0, 1)).view_as(features) for each in found]

    def _chosen(self, features: Tensor) -> Tensor:
        """(times * groups, tokens, hidden)."""
        if self.places is None:
            return features
        flat = features.reshape(len(features) // self.batch, -1, features.shape[-1])
        return flat[:, self.places].flatten(0, 1)


def draw_tokens(features: Features, batch: Batch, valid: Tensor, seed: int) -> Tokens:
    """The tokens to compare, real ones first in each group.

    Args: valid: (batch, tokens), 0 or 1. seed: of the draw, which depends on the samples' content alone.
    """
    samples, length = valid.shape
    if features.tokens is None:
        if bool((valid[:, 1:] <= valid[:, :-1]).all()):
            return Tokens(samples, None, valid)
        rank = torch.arange(length, device=valid.device).expand(samples, -1)
        width = length
    else:
        rank = uniform_order(sample_keys(batch), stream(seed, "tokens", 0), length, valid.device)
        place = (valid.bool().cumsum(1) - 1).clamp(min=0)  # in the text, wherever its padding is
        rank = rank.gather(1, place)
        width = min(features.tokens, length)
    if features.across:
        # Padding last; real tokens in random order over the whole batch.
        real = valid.flatten().nonzero().squeeze(1)
        places = real[rank.flatten()[real].argsort()[: features.tokens]]
        return Tokens(samples, places.unsqueeze(0), torch.ones(1, len(places)).to(valid))
    last = torch.iinfo(rank.dtype).max
    order = rank.masked_fill(valid == 0, last).argsort(dim=1, stable=True)[:, :width]
    start = torch.arange(samples, device=valid.device).unsqueeze(1) * length
    return Tokens(samples, order + start, valid.gather(1, order))


def trajectory_distance(grams: Sequence[Tensor], masked_grams: Sequence[Tensor]) -> Tensor:
    """Squared Frobenius distances of Grams, summed over the layers; 0 when nothing changed.

    Args: grams: per layer (groups, tokens, tokens). masked_grams: per layer (times * groups, tokens, tokens).
    Returns: (times, groups).
    """
    pairs = zip(grams, masked_grams, strict=True)
    return torch.stack([(m.view(-1, *g.shape) - g).square().sum((2, 3)) for g, m in pairs]).sum(0)
