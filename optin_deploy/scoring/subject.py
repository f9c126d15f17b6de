"""A network as scoring, error curves and compensation see it: run, masked unit by unit, with what is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optin_deploy.feeds.rows import MASK, READ, Batch
from optin_deploy.network.axes import units_along
from optin_deploy.network.hashing import network_hash
from optin_deploy.network.run import Cone, Mask, Place, Program, Values
from optin_deploy.scoring.copies import cone_of_copies
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading, reading_of
from optin_deploy.scoring.settings import FeatureSite, Kind
from optin_deploy.scoring.sites import MaskSite, masks_of
from optin_deploy.structure.groups import Layout, UnitGroup
from optin_deploy.structure.stream import Feature, features, samples_axis
from optin_deploy.structure.structure import Structure


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, its groups, and how its outputs are compared."""

    layout: Layout
    program: Program
    reading: Reading
    compared: FeatureSite = "block"
    """Which values the trajectory looks at, see `structure.stream.features`."""

    @classmethod
    def make(
        cls,
        layout: Layout,
        *,
        output: str | None = None,
        kind: Kind | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Subject:
        """Make a network ready.

        Args: output, kind: see `scoring.reading.reading_of`. dtype: of all real numbers; None: as they are stored.
        """
        network = layout.structure.network
        shapes = {port.name: layout.structure.shapes.shape(port.name) for port in network.outputs}
        reading = reading_of(network, shapes, output=output, kind=kind)
        return cls(layout, Program(network, device=device, dtype=dtype), reading)

    @property
    def structure(self) -> Structure:
        """How axes flow."""
        return self.layout.structure

    @cached_property
    def hash(self) -> str:
        """`network.hashing.network_hash` of the network."""
        return network_hash(self.structure.network)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's real numbers."""
        stored = self.structure.shapes.tensors.get(self.reading.output)
        return self.program.dtype or (torch.float32 if stored is None else stored.dtype)

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """What the trajectory looks at, in the order of work."""
        return features(self.layout, self.compared)

    @cached_property
    def sites(self) -> Mapping[str, tuple[MaskSite, ...]]:
        """Sites at which each group is masked, by name of group."""
        return {group.name: tuple(self._sites(group)) for group in self.layout.groups}

    @cached_property
    def alone(self) -> bool:
        """Whether samples must run one by one: some value with units has no axis of samples, or numbers follow from
        the entries of all samples."""
        shared = any(site.samples is None for sites in self.sites.values() for site in sites)
        return shared or bool(self.structure.ranged) or not self.repeatable

    @cached_property
    def repeatable(self) -> bool:
        """Whether the number of samples is free."""
        ports = self.structure.network.inputs
        return all(port.shape is None or not port.shape or isinstance(port.shape[0], str) for port in ports)

    @cached_property
    def cones(self) -> Mapping[str, Cone]:
        """What must run again on copies of the samples when units of a group are masked, by name."""
        places = {name: {site.place[0] for site in sites} for name, sites in self.sites.items()}
        if self.alone:
            return {name: self.program.cone(nodes) for name, nodes in places.items()}
        return {name: cone_of_copies(self.program, self.structure, nodes) for name, nodes in places.items()}

    def behind(self, group: UnitGroup) -> tuple[Feature, ...]:
        """Features that a group can change."""
        nodes = set(self.cones[group.name].nodes)
        return tuple(feature for feature in self.features if feature.node in nodes)

    def run(self, batch: Batch, *, masks: Mapping[Place, Mask] | None = None, watch: Iterable[str] = ()) -> Values:
        """Run the whole network."""
        return self.program(self.fed(batch), masks=masks, watch=tuple(watch))

    def fed(self, batch: Batch) -> dict[str, Tensor]:
        """Those of a batch that the network takes, in its types."""
        return {port.name: batch[port.name] for port in self.structure.network.inputs if port.name in batch}

    def masks(self, group: UnitGroup, units: Tensor) -> dict[Place, Mask]:
        """Masks for a group.

        Args: units: (samples, units), or one row for all samples.
        """
        return masks_of((site, site.of_units(units)) for site in self.sites[group.name])

    def read(self, outputs: Mapping[str, Tensor], valid: Tensor | None) -> Readout:
        """What is compared of a run.

        Args: valid: (samples, tokens), 0 or 1; it counts where the output's tokens are those of the padding mask.
        """
        places = self.reading.kind == "span" or self._masked_alike(self.reading.output, -1)
        return self.reading.read(outputs, valid if places else None)

    def real(self, batch: Batch, value: str, channels: int = -1) -> Tensor | None:
        """Which tokens of a value are real, (samples, tokens), 0 or 1; None: all of them."""
        return valid_of(batch) if self._masked_alike(value, channels) else None

    def _masked_alike(self, value: str, channels: int) -> bool:
        """Whether a value has as many tokens as the padding mask in the probe, where no two sizes are equal by chance,
        or the network takes no such mask."""
        shapes = self.structure.shapes
        mask, shape = shapes.shape(MASK), shapes.shape(value)
        if mask is None or len(mask) != 2 or not shape:
            return True
        return math.prod(shape) == mask[0] * mask[1] * shape[channels]

    def _sites(self, group: UnitGroup) -> Iterable[MaskSite]:
        nodes = self.structure.network.nodes
        ranged = [site for site in self.structure.ranged if any(leaf is group.leaf for leaf in site.axis.leaves())]
        for site in dict.fromkeys((*group.sites, *ranged)):
            value = nodes[site.node].inputs[site.place]
            along = torch.from_numpy(units_along(site.axis, group.leaf))
            along[along < 0] = group.units
            yield MaskSite((site.node, site.place), site.position, samples_axis(self.structure, value), along)


def tokens_of(feature: Feature, value: Tensor, samples: int) -> Tensor:
    """(samples, .., channels, ..), each sample maybe in several parts -> (samples, tokens, channels)."""
    return value.movedim(feature.channels, -1).reshape(samples, -1, value.shape[feature.channels])


def value_of(feature: Feature, tokens: Tensor, value: Tensor) -> Tensor:
    """The inverse of `tokens_of`, in the shape of this value."""
    return tokens.reshape(value.movedim(feature.channels, -1).shape).movedim(-1, feature.channels)


def valid_of(batch: Batch) -> Tensor | None:
    """Which tokens are real, (samples, tokens), 0 or 1; None: nothing is padded."""
    found = batch.get(MASK)
    return found if found is not None and found.dim() == 2 else None


def read_tokens(batch: Batch) -> Tensor | None:
    """Which tokens an output is read from, (samples, tokens), 0 or more than 0; None: all of them."""
    return batch.get(READ, valid_of(batch))
