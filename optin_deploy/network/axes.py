"""Axes as expressions over leaves: ordered products, ordered sums, and what was found to be the same.

A Reshape of 768 entries into 12 x 64 makes a leaf of 768 the product of two leaves; a Split makes one a sum. Unifying
two axes says that they are cut alike, entry by entry: their leaves become one. What cannot be matched is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

Kind = Literal["leaf", "same", "product", "sum"]


class Axis:
    """An axis of a tensor; what it is made of may become known later."""

    __slots__ = ("_kind", "_parts", "_why", "size")

    def __init__(self, size: int, frozen: str = "", *, kind: Kind = "leaf", parts: tuple[Axis, ...] = ()) -> None:
        self.size = size
        """Entries along it, in the probe."""
        self._kind: Kind = kind
        self._parts = parts
        self._why = frozen

    @property
    def root(self) -> Axis:
        """The axis that stands for all that were found to be the same."""
        axis = self
        while axis._kind == "same":
            axis = axis._parts[0]
        if self is not axis and self._parts[0] is not axis:
            self._parts = (axis,)  # a shorter way for the next one
        return axis

    @property
    def parts(self) -> tuple[Axis, ...]:
        """Factors or summands; none for a leaf."""
        return self.root._parts

    @property
    def kind(self) -> Kind:
        """What it is, by what is known now."""
        return self.root._kind

    @property
    def frozen(self) -> str:
        """Why a leaf stays whole; empty if it may be cut."""
        return self.root._why

    def leaves(self) -> Iterator[Axis]:
        """Its leaves from left to right."""
        axis = self.root
        if axis._kind == "leaf":
            yield axis
        else:
            for part in axis._parts:
                yield from part.leaves()

    def __repr__(self) -> str:
        axis = self.root
        if axis._kind == "leaf":
            return f"{axis.size}{'*' if axis._why else ''}"
        return "(" + (" x " if axis._kind == "product" else " + ").join(map(repr, axis._parts)) + ")"

    def _become(self, kind: Kind, parts: tuple[Axis, ...]) -> tuple[Axis, ...]:
        """Give a leaf its structure, or tell what it is the same as; what is frozen stays so in its parts."""
        assert self._kind == "leaf", self
        if self._why:
            freeze(parts, self._why)
        self._kind, self._parts = kind, parts
        return parts


def product(axes: Iterable[Axis]) -> Axis:
    """Return the axis that runs over all of these, the last one fastest."""
    parts = tuple(axis for axis in axes if axis.size != 1)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Axis(1)
    return Axis(math.prod(part.size for part in parts), kind="product", parts=parts)


def total(axes: Iterable[Axis]) -> Axis:
    """Return the axis that is these, one behind the other."""
    parts = tuple(axis for axis in axes if axis.size)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Axis(0)
    return Axis(sum(part.size for part in parts), kind="sum", parts=parts)


def freeze(axes: Iterable[Axis], why: str) -> None:
    """Say that axes stay whole; the first reason is kept."""
    for axis in axes:
        for leaf in axis.leaves():
            leaf._why = leaf._why or why


def unify(one: Axis, other: Axis, why: str = "") -> None:
    """Say that two axes of one size are cut alike, entry by entry; where their parts do not match both are frozen."""
    one, other = one.root, other.root
    if one is other or one.size == other.size == 1:
        return
    assert one.size == other.size, f"{one} and {other} have {one.size} and {other.size} entries"
    if one._kind == "leaf":
        one._become("same", (other,))
    elif other._kind == "leaf":
        other._become("same", (one,))
    elif not _match(one, other):
        freeze((one, other), f"its parts do not match: {one!r}, {other!r} {why}".strip())


def _match(one: Axis, other: Axis) -> bool:
    """Unify the parts of two axes with parts."""
    if one._kind == other._kind:
        return _pair(one._kind, [one], [other])
    if one._kind == "sum":
        one, other = other, one
    return _pair("sum", [one], [other])


def _pair(kind: Kind, these: list[Axis], those: list[Axis]) -> bool:
    """Unify two rows of parts of one length from the left, splitting the longer of the two heads."""
    these, those = flat(kind, these), flat(kind, those)
    while these and those:
        a, b = these[0].root, those[0].root
        if a.size == b.size:
            unify(a, b)
            these.pop(0)
            those.pop(0)
            continue
        if a.size < b.size:
            a, b, these, those = b, a, those, these
        pieces = _factors(a, b.size) if kind == "product" else _segments(a, b.size)
        if pieces is None:
            return False
        these[:1] = [piece for each in pieces for piece in flat(kind, [each])]
    return not these and not those


def flat(kind: Kind, axes: Sequence[Axis]) -> list[Axis]:
    """Parts of parts of the same kind, in one row; without those that change nothing."""
    found: list[Axis] = []
    for axis in axes:
        axis = axis.root
        if axis._kind == kind:
            found += flat(kind, axis._parts)
        elif axis.size != (1 if kind == "product" else 0):
            found.append(axis)
    return found


def _factors(axis: Axis, first: int) -> tuple[Axis, ...] | None:
    """A leaf as a product whose first factor has this size."""
    if axis._kind != "leaf" or axis.size % first:
        return None
    return axis._become("product", (Axis(first), Axis(axis.size // first)))


def _segments(axis: Axis, first: int) -> tuple[Axis, ...] | None:
    """A leaf, or a product by its first factor, as a sum whose first summand has this size."""
    if axis._kind == "leaf":
        return axis._become("sum", (Axis(first), Axis(axis.size - first)))
    if axis._kind != "product":
        return None
    head, *tail = flat("product", [axis])
    inner = math.prod(part.size for part in tail)
    if first % inner:
        return None
    if head._kind == "leaf":
        pieces: Sequence[Axis] | None = _segments(head, first // inner)
    else:
        pieces = _boundary(head, first // inner)
    return None if pieces is None else tuple(product((piece, *tail)) for piece in pieces)


def _boundary(axis: Axis, first: int) -> tuple[Axis, ...] | None:
    """A sum as two sums, the first of this size."""
    left: list[Axis] = []
    right = flat("sum", [axis])
    while right and (size := sum(each.size for each in left)) < first:
        head = right.pop(0)
        if size + head.size > first:
            pieces = _segments(head, first - size)
            if pieces is None:
                return None
            head, rest = pieces
            right.insert(0, rest)
        left.append(head)
    return total(left), total(right)


Keep = Mapping[Axis, np.ndarray]
"""Leaf -> the entries of it that stay, in order; a leaf that is not there stays whole."""


def kept(axis: Axis, keep: Keep) -> np.ndarray:
    """Return which entries of an axis stay, in order, from what stays of its leaves."""
    axis = axis.root
    if axis._kind == "leaf":
        return keep[axis] if axis in keep else np.arange(axis.size)
    if axis._kind == "sum":
        starts = np.cumsum([0, *(part.size for part in axis._parts[:-1])])
        return np.concatenate([kept(part, keep) + start for part, start in zip(axis._parts, starts, strict=True)])
    index = np.zeros(1, dtype=np.int64)
    for part in axis._parts:
        index = (index[:, None] * part.size + kept(part, keep)).ravel()
    return index


def size(axis: Axis, sizes: Mapping[Axis, int]) -> int:
    """Return how many entries an axis has when its leaves have these sizes; the others keep theirs."""
    axis = axis.root
    if axis._kind == "leaf":
        return sizes.get(axis, axis.size)
    parts = [size(part, sizes) for part in axis._parts]
    return math.prod(parts) if axis._kind == "product" else sum(parts)


def touched(axis: Axis, leaves: Mapping[Axis, object]) -> bool:
    """Return whether any of an axis' leaves is among these."""
    return any(leaf in leaves for leaf in axis.leaves())


def units_along(axis: Axis, leaf: Axis) -> np.ndarray:
    """Return, for each entry of an axis, the unit of a leaf that it belongs to; -1: to none."""
    axis, leaf = axis.root, leaf.root
    if axis._kind == "leaf":
        return np.arange(axis.size) if axis is leaf else np.full(axis.size, -1)
    if axis._kind == "sum":
        return np.concatenate([units_along(part, leaf) for part in axis._parts])
    found = np.full(1, -1)
    for part in axis._parts:
        found = np.maximum(found[:, None], units_along(part, leaf)).ravel()
    return found
