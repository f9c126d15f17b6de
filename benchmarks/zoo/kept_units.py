"""What another pruner left of a network, read from its weights: kept units of our groups, and other cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from optin_deploy.network.axes import touched, units_along
from optin_deploy.network.read import read
from optin_deploy.structure.groups import Layout


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """Weights as the reader of this project names them."""
    return {name: tensor.numpy() for name, tensor in read(path).weights.items()}


def kept_entries(whole: np.ndarray, less: np.ndarray) -> tuple[int, list[int]] | None:
    """The axis along which a weight was cut and the entries that stayed; None: along none, or along several."""
    shorter = [axis for axis, (one, other) in enumerate(zip(whole.shape, less.shape, strict=True)) if one != other]
    if len(shorter) != 1:
        return None
    here, there = (np.moveaxis(values, shorter[0], 0) for values in (whole, less))
    found: list[int] = []
    for row in there:
        begin = found[-1] + 1 if found else 0
        found += [next((n for n in range(begin, len(here)) if np.array_equal(here[n], row)), len(here))]
    return shorter[0], found


def kept_units(layout: Layout, whole: Mapping[str, np.ndarray], less: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Units of our groups that its weights hold; groups that it left alone, or cut amid units, are absent."""
    found: dict[str, list[int]] = {}
    for group in layout.groups:
        for each in group.slices:
            if each.weight not in less or whole[each.weight].ndim != less[each.weight].ndim:
                continue
            entries = kept_entries(whole[each.weight], less[each.weight])
            if entries is None or entries[0] != each.position:
                continue
            along = units_along(each.axis, group.leaf)
            left = np.isin(np.arange(len(along)), entries[1])
            units = [unit for unit in range(group.units) if left[along == unit].all()]
            if 0 < len(units) < group.units and np.array_equal(left, np.isin(along, [-1, *units])):
                found[group.name] = units
                break
    return found


def besides(
    layout: Layout, keep: Mapping[str, Sequence[int]], whole: Mapping[str, np.ndarray], less: Mapping[str, np.ndarray]
) -> int:
    """How many weights it cut along axes that none of these groups lies on."""
    leaves = layout.leaves(keep)
    ours = {
        (use.weight, position)
        for use in layout.structure.uses
        for position, axis in enumerate(use.axes)
        if touched(axis, leaves)
    }
    pairs = [(name, values.shape, less[name].shape) for name, values in whole.items() if name in less]
    return sum(
        len(one) != len(other) or any(one[n] != other[n] and (name, n) not in ours for n in range(len(one)))
        for name, one, other in pairs
    )
