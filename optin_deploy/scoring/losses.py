"""How far a model's output moved: distances of two outputs, and the directions that a sketch projects them on.

Source: Khaki & Plataniotis, ICLR 2024 (arXiv 2403.17921), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from optin_deploy.scoring.noise import signs

OutputKind = Literal["logits", "multi-label", "regression", "embedding"]
"""How two outputs are compared: KL divergence over classes, the sum of those of each class being there or not, squared
error, squared distance of unit vectors."""
FEW_CLASSES = 4
"""Most classes for which the KL term takes one exact direction for each class but one; above, random ones cost less."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The vectors that are compared: one a sample, or one a token (language models)."""

    kind: OutputKind
    values: Tensor
    """(batch, positions, classes or hidden)."""
    valid: Tensor
    """(batch, positions), 0 or 1: a sample's distance is the mean over its valid positions."""
    pictures: Tensor | None = None
    """(batch, classes, height, width): what each class is worth at each place, where the positions are a picture's."""

    def mean(self, distances: Tensor) -> Tensor:
        """(batch, positions) -> (batch,)."""
        return (distances * self.valid).sum(1) / self.valid.sum(1)


def output_distance(dense: Readout, masked: Tensor) -> Tensor:
    """How far the output moved, never negative.

    Args: masked: (times * batch, positions, classes or hidden).
    Returns: (times, batch).
    """
    moved = masked.view(-1, *dense.values.shape)
    if dense.kind == "logits":
        # In float32 the rounding of log p (1e-7) is above what most single neurons change.
        p, q = dense.values.double().log_softmax(-1), moved.double().log_softmax(-1)
        distances = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    elif dense.kind == "multi-label":
        both = torch.tensor([1.0, -1.0], dtype=torch.float64, device=moved.device)  # there, and not there
        p, q = (logsigmoid(values.double().unsqueeze(-1) * both) for values in (dense.values, moved))
        distances = (p.exp() * (p - q)).sum((-1, -2)).clamp(min=0)
    else:
        distances = (dense.values - moved).square().sum(-1)
    return torch.stack([dense.mean(each) for each in distances])


def exact_directions(dense: Readout) -> list[Tensor] | None:
    """Few directions v, each shaped as the values, with sum of <v, J>^2 = the second-order output distance.

    None where they would be too many.
    KL(p || p_m) ~ 1/2 J^T (diag(p) - p p^T) J; the columns here are the Cholesky factor of that matrix by breaking a
    stick: column j weighs class j against all later ones. Two classes give one: 1/2 p0 p1 (J1 - J0)^2.
    """
    classes = dense.values.shape[-1]
    if dense.values.shape[1] > 1 or classes > FEW_CLASSES or dense.kind == "embedding":
        return None
    eye = torch.eye(classes).to(dense.values)
    if dense.kind == "regression":
        return [eye[j].expand_as(dense.values) for j in range(classes)]
    if dense.kind == "multi-label":
        return [eye[j] * _spread(dense.values) for j in range(classes)]
    p = dense.values.softmax(-1)
    left = p.flip(-1).cumsum(-1).flip(-1)  # of the stick before class j
    found = []
    for j in range(classes - 1):
        later = p * (torch.arange(classes, device=p.device) > j)
        rest = left[..., j + 1, None].clamp(min=torch.finfo(p.dtype).tiny)
        scale = (p[..., j, None] * rest / left[..., j, None].clamp(min=torch.finfo(p.dtype).tiny) / 2).sqrt()
        found.append(scale * (eye[j] - later / rest))
    return found


def random_direction(dense: Readout, keys: Sequence[int], number: int) -> Tensor:
    """A random v, shaped as the values, with E <v, J>^2 = the second-order output distance.

    For KL: sqrt(p) * e - p <sqrt(p), e> has covariance diag(p) - p p^T for signs e.
    """
    values = dense.values
    noise = signs(keys, number, values.shape[1], values.shape[2], like=values)
    weights = dense.valid / dense.valid.sum(1, keepdim=True)
    if dense.kind == "logits":
        p = values.softmax(-1)
        noise = p.sqrt() * noise
        noise = noise - p * noise.sum(-1, keepdim=True)
        weights = weights / 2
    elif dense.kind == "multi-label":
        noise = _spread(values) * noise
    return noise * weights.sqrt().unsqueeze(-1)


def _spread(logits: Tensor) -> Tensor:
    """sqrt(p (1 - p) / 2): KL of a class that is there with probability p ~ p (1 - p) / 2 J^2."""
    p = logits.sigmoid()
    return (p * (1 - p) / 2).sqrt()
