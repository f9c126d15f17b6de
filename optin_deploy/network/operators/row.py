"""An operator is a row: its name, how torch computes it, and how its axes flow, with what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from optin_deploy.network.axes import Axis, freeze, product, total, unify
from optin_deploy.network.graph import Node

Result = Tensor | tuple[Tensor | None, ...]


class Flow(Protocol):
    """What a row says of one node, while `structure.flow` walks along the graph.

    Places count inputs (or outputs) of the node from 0; positions count axes of one tensor from 0.
    """

    node: Node
    """The node whose axes flow."""

    def has(self, place: int) -> bool:
        """Whether the input is there."""
        return place < len(self.node.inputs) and bool(self.node.inputs[place])

    def shape(self, place: int) -> tuple[int, ...]:
        """Sizes of an input, in the probe."""

    def out_shape(self, place: int = 0) -> tuple[int, ...]:
        """Sizes of an output, in the probe."""

    def axes(self, place: int) -> list[Axis]:
        """Axes of an input."""

    def give(self, place: int, axes: Sequence[Axis]) -> None:
        """Say which axes an output has; one that nobody reads has none."""

    def fresh(self, size: int, frozen: str = "") -> Axis:
        """Make an axis that was nowhere before; with a reason, one that stays whole."""
        return Axis(size, frozen)

    def unify(self, one: Axis, other: Axis) -> None:
        """Say that two axes are cut alike, entry by entry."""
        unify(one, other, f"at {self.node}")

    def freeze(self, axes: Iterable[Axis], why: str = "") -> None:
        """Say that axes stay whole; the reason is the operator where none is given."""
        freeze(axes, why or self.node.op)

    def product(self, axes: Sequence[Axis]) -> Axis:
        """Make the axis that runs over all of these, the last one fastest."""
        return product(axes)

    def total(self, axes: Sequence[Axis]) -> Axis:
        """Make the axis that is these, one behind the other."""
        return total(axes)

    def broadcast(self, places: Iterable[int], shape: Sequence[int]) -> list[Axis]:
        """Unify the axes of inputs as element-wise operators align them; returns those of the result."""

    def align(self, tensors: Iterable[Sequence[Axis]], shape: Sequence[int]) -> list[Axis]:
        """Do the same for lists of axes."""
        out: list[Axis | None] = [None] * len(shape)
        for axes in tensors:
            for position, axis in enumerate(axes, start=len(shape) - len(axes)):
                if axis.size != shape[position] or axis.size == 1:
                    continue
                known = out[position]
                if known is None:
                    out[position] = axis
                else:
                    self.unify(known, axis)
        return [Axis(size) if axis is None else axis for axis, size in zip(out, shape, strict=True)]

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """Split and merge axes into a shape of as many entries."""
        if 0 in shape:
            freeze(axes, "a tensor without entries")
            return [Axis(size, "a tensor without entries") for size in shape]
        out = [Axis(size) for size in shape]
        olds, news = [axis for axis in axes if axis.size > 1], [n for n, size in enumerate(shape) if size > 1]
        while olds or news:
            these, those = [olds.pop(0)], [news.pop(0)]
            one, other = these[0].size, shape[those[0]]
            while one != other:
                if one < other:
                    these.append(olds.pop(0))
                    one *= these[-1].size
                else:
                    those.append(news.pop(0))
                    other *= shape[those[-1]]
            if len(those) == 1:
                out[those[0]] = product(these)
            else:
                self.unify(product(these), product([out[n] for n in those]))
        return out

    def contract(self, place: int, position: int, other: tuple[int, int] | None = None) -> None:
        """Say that an input's axis is summed over here: a mask on units of that axis belongs here.

        Args: other: place and position of the axis that it is summed with; it is masked if the first is a weight.
        """

    def ranged(self, place: int) -> None:
        """Say that one number follows from all entries of an input, such as the largest: a mask must take away here
        what a cut takes away, whatever reads the entries later."""

    def label(self, axis: Axis, kind: str) -> None:
        """Say what people call the units of an axis, such as heads, where the axes alone do not tell."""

    def macs(self, axes: Sequence[Axis]) -> None:
        """Add as many multiply-accumulates as the product of the sizes of the axes."""

    def known(self, place: int) -> np.ndarray | None:
        """Values of an input of numbers in the probe; None where they follow from real numbers."""

    def stored(self, place: int) -> bool:
        """Whether an input is a weight of the file."""

    def never_negative(self, place: int) -> bool:
        """Whether an input holds nothing negative, by the operators before it."""

    def number(self, place: int, entry: int, axis: Axis, *, exact: bool = True, because: Axis | None = None) -> None:
        """Say that an entry of an input (flattened) is the size of an axis.

        Args: exact: only where the entry is that number in the probe; -1, or 0 in a Reshape, then stay as they are.
            because: an axis that changes what the entry means, such as one that negative places are counted on.
        """

    def attribute(self, name: str, axes: Axis | Sequence[Axis]) -> None:
        """Say that an attribute is the size of an axis, or the sizes of several."""


@dataclass(frozen=True)
class Row:
    """One operator: how it computes, and how axes flow through it."""

    name: str
    compute: Callable[..., Result]
    """`compute(node, *inputs)`: tensors, or None for inputs that were left out. Differentiable, on any device and
    type, and on torch's meta device; it never changes its inputs."""
    flow: Callable[[Flow], object]
    """Says how axes flow from inputs to outputs, what is contracted, what it costs, and which numbers are sizes."""
    numbers: tuple[int, ...] = ()
    """Places of inputs that are read as Python numbers, such as shapes: they stay on the CPU, and are real in a run
    that only finds shapes."""
    domain: str = ""
    factors: tuple[int, int] | None = None
    """Places of the two tensors that a product multiplies; None: it is no product."""
    zeros: Mapping[int, int] = field(default_factory=dict)
    """Place of an input -> place of the number that stands for 0 in it, as in tensors of whole numbers. A mask sets
    this number instead of 0."""


class Unsupported(NotImplementedError):
    """A form of an operator that its row does not know; what it touches is frozen, with these words."""


def refuse(why: str) -> Callable[[Flow], None]:
    """Make the flow of an operator whose axes stay whole, with the reason."""

    def flow(_: Flow) -> None:
        raise Unsupported(why)

    return flow


def refused(name: str, domain: str, why: str) -> Row:
    """Make the row of an operator that is known, but can neither be run nor followed."""

    def compute(*_: object) -> Tensor:
        raise Unsupported(why)

    return Row(name, compute, refuse(why), domain=domain)


CHANNELS_LAST = "it keeps channels last, which ONNX Runtime writes for one engine; give the file from before"
"""Why some forms are refused."""


def optional(inputs: Sequence[Tensor | None], count: int) -> list[Any]:
    """Inputs that a file may leave out at the end, with None for each that it does.

    Args: count: how many the row knows; more are returned too.
    """
    return [*inputs, *[None] * (count - len(inputs))]


def channels_first(node: Node) -> None:
    """Refuse a node that keeps channels last."""
    if node.get("channels_last", 0):
        raise Unsupported(CHANNELS_LAST)


def only(node: Node, **usual: object) -> None:
    """Refuse a node with an attribute that is set to something else than what its row knows."""
    for name, value in usual.items():
        if node.get(name, value) != value:
            raise Unsupported(f"{node.op} with {name} = {node.get(name)}")
