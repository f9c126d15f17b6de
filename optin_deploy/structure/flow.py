"""Walk along a network once and let each operator's row say how axes flow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optin_deploy.network.axes import Axis, freeze
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Flow, Unsupported
from optin_deploy.network.shapes import Shapes
from optin_deploy.network.signs import never_negative
from optin_deploy.structure.sharing import Positions, positions
from optin_deploy.structure.structure import Contraction, Number, Structure, Tap, WeightUse

UNKNOWN_FORM = (AssertionError, IndexError, KeyError, TypeError, ValueError)
"""What a row raises at a node that is not as it expects, such as one with too few inputs."""


def walk(network: Network, shapes: Shapes) -> Structure:
    """Find the axes of every value.

    Args: shapes: what `network.shapes.shapes_of` finds for a probe.
    """
    found = Structure(network, shapes)
    shared = Sharing(positions(network, shapes))
    for port in network.inputs:
        sizes = shapes.shape(port.name)
        if sizes is not None:
            found.axes[port.name] = [Axis(size, f"input {port.name}") for size in sizes]
    for node in network.nodes:
        visit = Visit(found, node, shared)
        why = shapes.problems.get(node.index) or visit.follow()
        if why:
            found.problems[node.index] = why
            visit.give_up(why)
    for port in network.outputs:
        freeze(found.axes.get(port.name, ()), f"output {port.name}")
    for tap in found.taps:
        name = network.nodes[tap.node].inputs[tap.place]
        freeze([found.axes[name][tap.position]], "several layers share it, and each takes its own part")
    return found


@dataclass
class Sharing:
    """What several places read, as far as the walk has come."""

    positions: Positions
    axes: list[Axis] = field(default_factory=list)
    """Axes of the values that several places read."""

    def cuttable(self) -> set[Axis]:
        """Their leaves that are not frozen so far; those that are will stay so, and are forgotten."""
        found = {leaf for axis in self.axes for leaf in axis.leaves() if leaf.size > 1 and not leaf.frozen}
        self.axes = list(found)
        return found


class Visit(Flow):
    """One node on the way: what its row reads and says (see `network.operators.row.Flow`)."""

    def __init__(self, structure: Structure, node: Node, shared: Sharing) -> None:
        self._structure = structure
        self._shared = shared
        self._uses: dict[int, list[Axis]] = {}
        self._given: set[int] = set()
        self.node = node

    def follow(self) -> str:
        """Let the row speak; returns why it could not."""
        row = rows()[self.node.domain, self.node.op]
        try:
            row.flow(self)
        except Unsupported as err:
            return str(err)
        except UNKNOWN_FORM as err:
            return f"a form that its row does not know ({type(err).__name__}: {err})"
        missing = [
            n
            for n, name in enumerate(self.node.outputs)
            if name and n not in self._given and self._sizes(name) is not None
        ]
        return "its row says nothing of some outputs" if missing else ""

    def give_up(self, why: str) -> None:
        """Freeze all that the node touches."""
        reason = f"{self.node.op}: {why}"
        for place, name in enumerate(self.node.inputs):
            if name and self._sizes(name) is not None:
                freeze(self.axes(place), reason)
        for name in self.node.outputs:
            sizes = self._sizes(name) if name else None
            if sizes is not None:
                self._structure.axes[name] = [Axis(size, reason) for size in sizes]

    # What a row asks.

    def shape(self, place: int) -> tuple[int, ...]:
        """Sizes of an input."""
        return self._size_of(self.node.inputs[place])

    def out_shape(self, place: int = 0) -> tuple[int, ...]:
        """Sizes of an output."""
        return self._size_of(self.node.outputs[place])

    def known(self, place: int) -> np.ndarray | None:
        """Values of an input of numbers."""
        return self._structure.shapes.known(self.node.inputs[place]) if self.has(place) else None

    def stored(self, place: int) -> bool:
        """Whether an input is a weight."""
        return self.has(place) and self.node.inputs[place] in self._structure.network.weights

    def never_negative(self, place: int) -> bool:
        """Whether an input holds nothing negative."""
        return never_negative(self._structure.network, self.node.inputs[place])

    def axes(self, place: int) -> list[Axis]:
        """Axes of an input; a vector is a copy of its own at each place, a matrix is shared by all that read it."""
        name = self.node.inputs[place]
        if name not in self._structure.network.weights:
            if name not in self._structure.axes:
                raise Unsupported(f"the shape of {name} is not known")
            return list(self._structure.axes[name])
        return list(self._use(place, alone=sum(size > 1 for size in self.shape(place)) < 2))

    # What a row says.

    def give(self, place: int, axes: Sequence[Axis]) -> None:
        """Set the axes of an output."""
        if place >= len(self.node.outputs) or not self.node.outputs[place]:
            return
        sizes = self.out_shape(place)
        if tuple(axis.size for axis in axes) != sizes:
            raise AssertionError(f"{self.node}: axes {list(axes)} for an output of {sizes}")
        name = self.node.outputs[place]
        self._structure.axes[name] = list(axes)
        self._given.add(place)
        if name in self._shared.positions.several:
            self._shared.axes.extend(axes)

    def broadcast(self, places: Iterable[int], shape: Sequence[int]) -> list[Axis]:
        """Align inputs; what several layers share is read through a tap."""
        return self.align([self._elementwise(place) for place in places], shape)

    def contract(self, place: int, position: int, other: tuple[int, int] | None = None) -> None:
        """Note a place for masks."""
        fixed = self._structure.network.fixed
        sides = [(place, position), *([other] if other else [])]
        live = [side for side in sides if self.node.inputs[side[0]] not in fixed]
        if live:
            place, position = live[0]
            axis = self.axes(place)[position]
            self._structure.contractions.append(Contraction(self.node.index, place, position, axis, len(live) < 2))

    def ranged(self, place: int) -> None:
        """Note a place where only what is kept may count."""
        for position, axis in enumerate(self.axes(place)):
            self._structure.ranged.append(Contraction(self.node.index, place, position, axis, False))

    def macs(self, axes: Sequence[Axis]) -> None:
        """Note a cost."""
        self._structure.products.append((self.node.index, tuple(axes)))

    def label(self, axis: Axis, kind: str) -> None:
        """Note what people call an axis."""
        self._structure.labels.append((axis, kind))

    def number(self, place: int, entry: int, axis: Axis, *, exact: bool = True, because: Axis | None = None) -> None:
        """Note a number beside the weights."""
        known = self.known(place)
        if exact and known is not None and int(known.reshape(-1)[entry]) != axis.size:
            return
        if axis.size > 1 or not exact:
            self._structure.numbers.append(Number(self.node.index, place, entry, axis, because or axis))

    def attribute(self, name: str, axes: Axis | Sequence[Axis]) -> None:
        """Note an attribute that is a size, or lists sizes."""
        if isinstance(axes, Axis):
            self._structure.numbers.append(Number(self.node.index, name, None, axes, axes))
        else:
            for entry, axis in enumerate(axes):
                self._structure.numbers.append(Number(self.node.index, name, entry, axis, axis))

    # How it is looked up.

    def _sizes(self, name: str) -> tuple[int, ...] | None:
        return self._structure.shapes.shape(name)

    def _size_of(self, name: str) -> tuple[int, ...]:
        sizes = self._sizes(name) if name else None
        if sizes is None:
            raise Unsupported(f"the shape of {name or 'an input that is left out'} is not known")
        return sizes

    def _use(self, place: int, *, alone: bool) -> list[Axis]:
        """Axes of a weight: of this place alone, or of all places that read it."""
        if place not in self._uses:
            name = self.node.inputs[place]
            if alone:
                axes = [Axis(size) for size in self.shape(place)]
            else:
                axes = self._structure.axes.setdefault(name, [Axis(size) for size in self.shape(place)])
            self._uses[place] = axes
            self._structure.uses.append(WeightUse(name, self.node.index, place, tuple(axes)))
        return self._uses[place]

    def _elementwise(self, place: int) -> list[Axis]:
        name = self.node.inputs[place]
        if name in self._structure.network.weights:
            return self._use(place, alone=True)
        axes = self.axes(place)
        if name not in self._shared.positions.all:
            return axes
        shared = self._shared.cuttable()
        for position, axis in enumerate(axes):
            if any(leaf in shared for leaf in axis.leaves()):
                axes[position] = Axis(axis.size)
                self._structure.taps.append(Tap(self.node.index, place, position, axes[position]))
        return axes
