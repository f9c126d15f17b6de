"""Multiply-accumulates and stored entries of any plan: sizes are expressions of leaves, so both are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optin_deploy.network.axes import Axis, flat, size, touched
from optin_deploy.structure.structure import Structure

Way = tuple[object, ...] | Axis | int
"""How an axis is cut, as something to compare by."""


def batch_axes(structure: Structure) -> list[Axis]:
    """Return the free first axes of inputs, which hold the samples; with a size of 1 for them `macs` counts one."""
    firsts = ((port, structure.axes[port.name]) for port in structure.network.inputs)
    return [axes[0].root for port, axes in firsts if axes and (port.shape is None or isinstance(port.shape[0], str))]


def macs(structure: Structure, sizes: Mapping[Axis, int] | None = None) -> int:
    """Return the multiply-accumulates of the probe's inputs when leaves have these sizes; the others keep theirs."""
    sizes = sizes or {}
    return sum(math.prod(size(axis, sizes) for axis in axes) for _, axes in structure.products)


def weight_entries(structure: Structure, sizes: Mapping[Axis, int] | None = None) -> int:
    """Return the entries of all stored weights that nodes read, each stored tensor counted once.

    A weight that several nodes cut differently is stored once for each of them.
    """
    sizes = sizes or {}
    cut = {leaf: None for leaf, left in sizes.items() if left != leaf.size}
    found: dict[tuple[str, tuple[Way, ...]], int] = {}
    for use in structure.uses:
        ways = tuple(way(axis, cut) for axis in use.axes)
        found[use.weight, ways] = math.prod(size(axis, sizes) for axis in use.axes)
    return sum(found.values())


def way(axis: Axis, cut: Mapping[Axis, object]) -> Way:
    """Return the same for two axes of a weight exactly if the same of their entries stay, whichever units of leaves go.

    Args: cut: the leaves that lose units.
    """
    axis = axis.root
    if not touched(axis, cut):
        return axis.size
    if axis.kind == "leaf":
        return axis
    found: list[Way] = []
    for part in flat(axis.kind, axis.parts):
        one = way(part, cut)
        if found and isinstance(one, int) and isinstance(before := found[-1], int):
            found[-1] = before * one if axis.kind == "product" else before + one
        else:
            found.append(one)
    return axis.kind, *found
