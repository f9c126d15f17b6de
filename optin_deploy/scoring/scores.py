"""The scores of all units, with where they came from; stored as safetensors + JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.layout import ModelLayout

SCHEMA_VERSION = 2


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of every unit; higher = keep."""

    heads: tuple[Tensor, ...]
    """Per layer, (heads,), not negative."""
    neurons: tuple[Tensor, ...]
    """Per layer, (neurons,), not negative."""
    layout_hash: str
    provenance: Mapping[str, Any]
    """Scorer, weighting, samples, probes, lambda, seed, cost: everything needed to make them again."""
    head_errors: tuple[Tensor, ...] = ()
    """Standard error of each head's score, same shapes as `heads`; 0 where nothing was estimated."""
    neuron_errors: tuple[Tensor, ...] = ()
    """Standard error of each neuron's score, same shapes as `neurons`."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise BadInput(
                f"scores: schema_version {self.schema_version}; this version reads {SCHEMA_VERSION}. Score again."
            )
        for name, layers in (("heads", self.heads), ("neurons", self.neurons)):
            for i, values in enumerate(layers):
                if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                    raise BadInput(f"scores: {name} of layer {i} hold a negative or non-finite value. Score again.")

    def check(self, layout: ModelLayout) -> None:
        """Make sure that the scores belong to this layout.

        Raises: PlanMismatch: another model, or counts that differ.
        """
        counts = [(len(h), len(n)) for h, n in zip(self.heads, self.neurons, strict=True)]
        if self.layout_hash != layout.hash or counts != [(x.heads, x.neurons) for x in layout.layers]:
            raise PlanMismatch(
                f"the scores were made for layout {self.layout_hash[:12]}, this model has {layout.hash[:12]}. "
                "Score this model with `optin score`."
            )
