"""A network as scoring, error curves and compensation see it: run, masked unit by unit, with what is compared."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optin_deploy.errors import NonFiniteActivation
from optin_deploy.feeds.rows import MASK, Batch, rows_of
from optin_deploy.network.axes import units_along
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.hashing import network_hash
from optin_deploy.network.run import Cone, Mask, Place, Program, Values
from optin_deploy.scoring.copies import cone_of_copies
from optin_deploy.scoring.features import Features, Tokens, draw_tokens
from optin_deploy.scoring.features import Site as FeatureSite
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Kind, Reading, reading_of
from optin_deploy.structure.flow import Structure
from optin_deploy.structure.groups import Layout, UnitGroup
from optin_deploy.structure.stream import Feature, features, samples_axis

Key = tuple[Place, int]
"""Key of a site: a node's input, and one of its axes."""
MOST_TOKENS = 512
"""Pictures of more places are compared by so many, drawn for each sample."""


@dataclass(frozen=True, eq=False)
class Site:
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


def masks_of(multipliers: Iterable[tuple[Site, Tensor]]) -> dict[Place, Mask]:
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


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, its groups, and how its outputs are compared."""

    layout: Layout
    program: Program
    reading: Reading
    compared: FeatureSite = "block"
    """Which values the trajectory looks at, see `structure.stream.features`."""

    @classmethod
    def of(
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
    def sites(self) -> Mapping[str, tuple[Site, ...]]:
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
        return self.reading.read(outputs, valid if self._masked_alike(self.reading.output, -1) else None)

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

    def _sites(self, group: UnitGroup) -> Iterable[Site]:
        nodes = self.structure.network.nodes
        ranged = [site for site in self.structure.ranged if any(leaf is group.leaf for leaf in site.axis.leaves())]
        for site in dict.fromkeys((*group.sites, *ranged)):
            value = nodes[site.node].inputs[site.place]
            along = torch.from_numpy(units_along(site.axis, group.leaf))
            along[along < 0] = group.units
            yield Site((site.node, site.place), site.position, samples_axis(self.structure, value), along)


@dataclass(frozen=True, eq=False)
class Dense:
    """What a batch gives in the dense network: what all comparisons start from."""

    values: Values
    tokens: Mapping[str, Tokens]
    """Compared tokens by value of the features."""
    readout: Readout
    valid: Tensor | None
    """(samples, tokens), 0 or 1, of texts."""
    seconds: float
    """Seconds of the forward."""

    def gram(self, feature: Feature, value: Tensor, times: int = 1) -> Tensor:
        """The Gram matrices of a feature in a run of these samples, each so many times."""
        tokens = self.tokens[feature.value]
        return tokens.gram(tokens_of(feature, value, times * tokens.batch))


def dense_run(
    subject: Subject,
    batch: Batch,
    chosen: Features,
    seed: int,
    *,
    watch: Collection[str] = (),
) -> Dense:
    """Run a batch and keep these values, and those of the features.

    Raises: NonFiniteActivation: the network puts out NaN or infinity.
    """
    assert chosen.site == subject.compared, "the subject says which values are compared"
    started = _now(subject)
    values = subject.run(batch, watch={*watch, *(feature.value for feature in subject.features)})
    seconds = _now(subject) - started
    watched, valid = values.watched, valid_of(batch)
    tokens = {f.value: chosen_tokens(subject, f, watched[f.value], batch, chosen, seed) for f in subject.features}
    readout = subject.read(values.outputs, valid)
    check_finite(subject, batch, [readout.values])
    return Dense(values, tokens, readout, valid, seconds)


def check_finite(subject: Subject, batch: Batch, values: Sequence[Tensor]) -> None:
    """Refuse NaN and infinity in what this batch gave.

    Raises: NonFiniteActivation: names the first operator that puts one out.
    """
    if all(bool(torch.isfinite(value).all()) for value in values):
        return
    network = subject.structure.network
    nodes = network.nodes
    names = [name for node in nodes for name in node.outputs if name]
    watched = subject.run(batch, watch=names).watched
    first = next(
        (
            _told(node, network)
            for node in nodes
            for name in node.outputs
            if name in watched and watched[name].is_floating_point() and not bool(torch.isfinite(watched[name]).all())
        ),
        "a layer",
    )
    raise NonFiniteActivation(
        f"{first} put out NaN or infinity on the calibration data. Check the weights and the data; a network stored "
        "in half precision may overflow: export it in float32."
    )


def _told(node: Node, network: Network) -> str:
    """An operator with the weights that it reads, by whose names people know the layer."""
    weights = [name for name in node.inputs if name in network.weights]
    return f"{node}, which reads {', '.join(weights)}," if weights else str(node)


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


def chosen_tokens(
    subject: Subject, feature: Feature, value: Tensor, batch: Batch, chosen: Features, seed: int
) -> Tokens:
    """Which tokens of a feature are compared."""
    flat = tokens_of(feature, value, rows_of(batch))
    valid = subject.real(batch, feature.value, feature.channels)
    if valid is None or valid.shape != flat.shape[:2]:
        valid = torch.ones(flat.shape[:2])
        if chosen.tokens is None and flat.shape[1] > MOST_TOKENS:
            chosen = Features(chosen.site, MOST_TOKENS, chosen.across)
    return draw_tokens(chosen, batch, valid.to(value.device, torch.promote_types(value.dtype, torch.float32)), seed)


def _now(subject: Subject) -> float:
    if subject.program.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
