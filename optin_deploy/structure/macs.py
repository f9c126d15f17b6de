"""Multiply-accumulates and stored entries of any plan: sizes are expressions of leaves, so both are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optin_deploy.network.axes import Axis, size
from optin_deploy.structure.flow import Structure


def macs(structure: Structure, sizes: Mapping[Axis, int] | None = None) -> int:
    """Return the multiply-accumulates of the probe's inputs when leaves have these sizes; the others keep theirs."""
    sizes = sizes or {}
    return sum(math.prod(size(axis, sizes) for axis in axes) for _, axes in structure.products)


def weight_entries(structure: Structure, sizes: Mapping[Axis, int] | None = None) -> int:
    """Return the entries of all stored weights that nodes read, each stored tensor counted once."""
    sizes = sizes or {}
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for use in structure.uses:
        shape = tuple(size(axis, sizes) for axis in use.axes)
        found[use.weight, shape] = math.prod(shape)
    return sum(found.values())
