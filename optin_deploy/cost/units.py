"""What a plan costs: the sum over branches of what their widths cost, and a fixed rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.layout import ModelLayout
from optin_deploy.validation import STORED, validated

MOST = 2**56
"""Of any number, so that sums fit into 64 bits."""


def prunable(layout: ModelLayout, head: Sequence[int], neuron: Sequence[int]) -> int:
    """What all units of a model cost together, if those of each layer cost this."""
    return sum(h * x.heads + n * x.neurons for h, n, x in zip(head, neuron, layout.layers, strict=True))


class Cost(Protocol):
    """What a search needs to know of one resource, in whole numbers."""

    @property
    def fixed(self) -> int:
        """What no plan can cut."""

    @property
    def dense(self) -> int:
        """Of the dense model."""

    def of_heads(self, layer: int, units: int) -> np.ndarray:
        """What 0, 1, ... `units` kept heads of a layer cost, (units + 1,), never falling, from 0 on."""

    def of_neurons(self, layer: int, units: int) -> np.ndarray:
        """The same of its FFN neurons."""


@dataclass(frozen=True)
class UnitCost:
    """Every kept unit costs the same wherever it stands in its layer."""

    __pydantic_config__ = STORED

    fixed: int
    """What no plan can cut."""
    head: tuple[int, ...]
    """Of one head, a layer."""
    neuron: tuple[int, ...]
    """Of one FFN neuron, a layer."""
    dense: int
    """Of the dense model."""

    def __post_init__(self) -> None:
        parts = (self.fixed, *self.head, *self.neuron)
        fits = all(0 <= part <= MOST for part in parts) and 1 <= self.dense <= MOST
        if not fits or len(self.head) != len(self.neuron):
            raise BadInput(f"cost: numbers must not be negative or above 2^56, and given for every layer: {self}.")

    def check(self, layout: ModelLayout) -> None:
        """Make sure that it is the cost of such a model.

        Raises: BadInput: other layers, or the parts do not add up to the whole.
        """
        if len(self.head) != len(layout.layers):
            raise BadInput(f"cost: of {len(self.head)} layers; the model has {len(layout.layers)}.")
        whole = self.fixed + prunable(layout, self.head, self.neuron)
        if whole != self.dense:
            raise BadInput(f"cost: the parts are {whole} together, but the dense model is said to cost {self.dense}.")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of one."""
        return validated(cls, data, "cost: not a cost of optin-deploy", "Write it with `optin score`.")

    def of(self, heads: Sequence[int], neurons: Sequence[int]) -> int:
        """With these counts of kept heads and neurons a layer."""
        pairs = (*zip(self.head, heads, strict=True), *zip(self.neuron, neurons, strict=True))
        return self.fixed + sum(cost * count for cost, count in pairs)

    def of_heads(self, layer: int, units: int) -> np.ndarray:
        """See `Cost.of_heads`."""
        return np.arange(units + 1) * self.head[layer]

    def of_neurons(self, layer: int, units: int) -> np.ndarray:
        """See `Cost.of_neurons`."""
        return np.arange(units + 1) * self.neuron[layer]

    def times(self, factor: int) -> UnitCost:
        """The same in a smaller unit, for example bytes instead of parameters."""
        return UnitCost(
            self.fixed * factor,
            tuple(cost * factor for cost in self.head),
            tuple(cost * factor for cost in self.neuron),
            self.dense * factor,
        )
