"""The two terms of the score, summed over samples and joined by lambda."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.layout import Branch, ModelLayout

KL_SHARE = 0.1
"""lambda makes the output term a tenth of the trajectory term on average (the authors' code: about 1/10 a unit)."""


@dataclass
class Terms:
    """Running sums over samples of both terms, per branch (units,), in float64."""

    trajectory: dict[Branch, Tensor]
    output: dict[Branch, Tensor]
    samples: int = 0

    @classmethod
    def zeros(cls, branches: Iterable[Branch]) -> Terms:
        """Empty sums for these branches."""
        chosen = tuple(branches)
        return cls(
            {b: torch.zeros(b.units, dtype=torch.float64) for b in chosen},
            {b: torch.zeros(b.units, dtype=torch.float64) for b in chosen},
        )

    def kl_weight(self) -> float:
        """Lambda of SCORING: one constant a model, 0.1 * mean trajectory / mean output term."""
        trajectory, output = (float(torch.cat(list(t.values())).mean()) for t in (self.trajectory, self.output))
        return KL_SHARE * trajectory / output if output > 0 else 0.0

    def total(self, branch: Branch, kl_weight: float) -> Tensor:
        """Score of a branch's units, mean over samples, (units,)."""
        return (self.trajectory[branch] + kl_weight * self.output[branch]) / max(self.samples, 1)


def attention_branches(layout: ModelLayout) -> tuple[Branch, ...]:
    """The branches whose units are heads."""
    return tuple(layer.attention for layer in layout.layers)


def ffn_branches(layout: ModelLayout) -> tuple[Branch, ...]:
    """The branches whose units are neurons."""
    return tuple(layer.ffn for layer in layout.layers)
