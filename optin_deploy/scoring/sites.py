"""Places of a network where units of a group are masked, for each sample alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.network.run import Mask, Place

Key = tuple[Place, int]
"""Key of a site: a node's input, and one of its axes."""


@dataclass(frozen=True, eq=False)
class MaskSite:
    """A place where units of a group are masked, for each sample alone."""

    place: Place
    position: int
    """Position of the axis with the units."""
    samples: int | None
    """Position of the axis with the samples, each maybe in several parts; None means that all samples share the
    value."""
    units: Tensor
    """The unit of each entry along the axis; the number of units where an entry belongs to none."""

    @property
    def key(self) -> Key:
        """Sites of several groups with one key are one multiplier."""
        return self.place, self.position

    def of_units(self, units: Tensor) -> Tensor:
        """(samples, units) -> (samples, entries of the axis); entries that belong to no unit get 1."""
        return torch.cat([units, torch.ones(len(units), 1).to(units)], 1)[:, self.units.to(units.device)]

    def mask(self, entries: Tensor) -> Mask:
        """Return what makes a multiplier for the node's input.

        Args: entries: (samples, entries of the axis), or one row for all samples.
        """

        def placed(value: Tensor) -> Tensor:
            shape = [1] * value.dim()
            shape[self.position] = entries.shape[1]
            if self.samples is None or len(entries) == 1:
                assert len(entries) == 1, "a value that all samples share is masked for one sample at a time"
                return entries.reshape(shape)
            shape[self.samples] = value.shape[self.samples]
            spread = entries.repeat_interleave(shape[self.samples] // len(entries), 0)
            return (spread.T if self.samples > self.position else spread).reshape(shape)

        return placed


def masks_of(multipliers: Iterable[tuple[MaskSite, Tensor]]) -> dict[Place, Mask]:
    """Masks for places, from (samples, entries) for each site; where several stand at one place all multiply."""
    found: dict[Place, Mask] = {}
    for site, entries in multipliers:
        one, other = site.mask(entries), found.get(site.place)
        found[site.place] = one if other is None else _both(one, other)
    return found


def _both(one: Mask, other: Mask) -> Mask:
    assert callable(one)
    assert callable(other)
    return lambda value: one(value) * other(value)
