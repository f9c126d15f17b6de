"""What one walk along a network finds: axes of values, uses of weights, places where axes are summed, and numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.shapes import Shapes

FOLLOWS = "the shape of"
"""So begins the reason of a node that reads what another one, not understood, gives."""


@dataclass(frozen=True)
class WeightUse:
    """One place where a node reads a weight; each place has a copy of its own when it is cut."""

    weight: str
    node: int
    place: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Contraction:
    """A place where an axis of an activation is summed over."""

    node: int
    place: int
    position: int
    axis: Axis
    with_weight: bool
    """Whether the other factor follows from weights alone."""


@dataclass(frozen=True)
class Number:
    """A number beside the weights that is the size of an axis."""

    node: int
    where: int | str
    """Place of an input, or name of an attribute."""
    entry: int | None
    """Which entry of it; None: the attribute is one number."""
    axis: Axis
    because: Axis
    """It is written anew when units of this axis go; mostly the same axis."""


@dataclass(frozen=True)
class Tap:
    """A place where an axis of a value that several layers share is read; each of them takes its own part."""

    node: int
    place: int
    position: int
    axis: Axis


@dataclass
class Structure:
    """What one walk finds."""

    network: Network
    shapes: Shapes
    axes: dict[str, list[Axis]] = field(default_factory=dict)
    """Axes of values by name; weights are in `uses`."""
    uses: list[WeightUse] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    ranged: list[Contraction] = field(default_factory=list)
    """Places where one number follows from all entries of an activation: no sites, but masks belong there too."""
    products: list[tuple[int, tuple[Axis, ...]]] = field(default_factory=list)
    """Nodes with the axes whose sizes multiply to their multiply-accumulates; one node may have several."""
    numbers: list[Number] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    labels: list[tuple[Axis, str]] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    """Nodes by index that were not understood, with the reason; what they touch is frozen."""

    @property
    def not_understood(self) -> Counter[tuple[str, str]]:
        """How many nodes of an operator are not understood for a reason, without those that only lie behind others."""
        nodes = self.network.nodes
        return Counter((nodes[index].op, why) for index, why in self.problems.items() if not why.startswith(FOLLOWS))
