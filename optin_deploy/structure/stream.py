"""The trajectory of a network: values along its residual stream, which of their axes hold features, and which samples.

A value belongs to the stream where a branch is added to what it left. Where nothing is added, as in plain
convolutional networks, the last value of each size is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from optin_deploy.network.axes import Axis, touched
from optin_deploy.network.graph import Node
from optin_deploy.network.operators import factors_of
from optin_deploy.structure.branches import SKIPS, branches
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.structure import Structure

NORMALIZATIONS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Feature:
    """A value that the trajectory looks at."""

    value: str
    node: int
    """What makes it."""
    channels: int
    """Position of the axis that one token's features lie along; the others, but that of the samples, are tokens."""


def samples_axis(structure: Structure, value: str) -> int | None:
    """Return the position of the axis that runs over the samples, maybe over parts of each sample too; None: there is
    none, or samples are not one behind the other."""
    leaves = {axes[0].root for port in structure.network.inputs if (axes := structure.axes.get(port.name))}
    for position, axis in enumerate(structure.axes.get(value, ())):
        first = next(iter(axis.leaves()), None)
        if first in leaves and axis.kind != "sum":
            return position
    return None


def features(layout: Layout, site: Literal["block", "ffn"] = "block") -> tuple[Feature, ...]:
    """Return the features of a network, in the order of work; each has its samples along the first axis.

    Args: site: `block`: what a branch leaves when it is added; `ffn`: what is added, as the paper's authors took it.
    """
    structure = layout.structure
    ways = [way for group in layout.groups for way in branches(structure, group) if way is not None]
    nodes = structure.network.nodes
    if site == "ffn":
        values = [way.value for way in ways]
    else:
        residuals = {way.residual for way in ways}
        values = [_left(structure, nodes[add], residuals) for add in sorted({way.add[0] for way in ways if way.add})]
    made = _made(structure)
    found = (_feature(structure, value, made) for value in dict.fromkeys(values or _last_of_sizes(layout)))
    return tuple(sorted((each for each in found if each is not None), key=lambda each: each.node))


def _left(structure: Structure, add: Node, residuals: Collection[str | None]) -> str:
    """What an Add leaves for the next branch: its result, or that of the normalization which alone reads it."""
    value = add.outputs[0]
    readers = structure.network.consumers.get(value, ())
    outputs = {port.name for port in structure.network.outputs}
    if add.op in SKIPS or value in residuals or value in outputs or len(readers) != 1:
        return value
    node, place = readers[0]
    return node.outputs[0] if node.op in NORMALIZATIONS and place == 0 else value


def _last_of_sizes(layout: Layout) -> list[str]:
    """The last value before its sizes, but the features, change, of those that weights are contracted with."""
    structure = layout.structure
    sites = sorted({(s.node, s.place): s for g in layout.groups for s in g.sites if s.with_weight}.items())
    if not sites:
        return []
    read = [(structure.network.nodes[node].inputs[place], site) for (node, place), site in sites]
    shapes = [(structure.shapes.shape(value) or (), site.position) for value, site in read]
    sizes = [(*shape[:position], *shape[position + 1 :]) for shape, position in shapes]
    found = [value for (value, _), one, other in zip(read, sizes, [*sizes[1:], None], strict=True) if one != other]
    return [*found, structure.network.nodes[sites[-1][0][0]].outputs[0]]


def _feature(structure: Structure, value: str, made: Mapping[Axis, None]) -> Feature | None:
    """None: samples or features have no axis of their own, or there are no tokens."""
    axes = structure.axes.get(value, ())
    if len(axes) < 3 or (samples_axis(structure, value) != 0 and not _takes_one(structure)):
        return None
    held = [position for position, axis in enumerate(axes) if position and touched(axis, made)]
    return Feature(value, structure.network.producer[value].index, held[-1]) if held else None


def _takes_one(structure: Structure) -> bool:
    """Whether a run has a single sample: an axis of one entry is the same nowhere."""
    return all((structure.shapes.shape(port.name) or ())[:1] in ((), (1,)) for port in structure.network.inputs)


def _made(structure: Structure) -> Mapping[Axis, None]:
    """Leaves that lie on matrices: what projections make."""
    network = structure.network
    stored = {(use.node, use.place): use.axes for use in structure.uses}
    found: dict[Axis, None] = {}
    for node in network.nodes:
        for place in factors_of(node):
            if node.inputs[place] in network.fixed:  # stored as it is, or transposed or dequantised before
                axes = stored.get((node.index, place), structure.axes.get(node.inputs[place], []))
                found.update({leaf: None for axis in axes for leaf in axis.leaves() if leaf.size > 1})
    return found
