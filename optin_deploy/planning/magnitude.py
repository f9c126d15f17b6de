"""Score units by the norms of their weights: needs no data, and is no more than a first guess."""

from __future__ import annotations

import numpy as np

from optin_deploy.network.axes import units_along
from optin_deploy.network.graph import Network
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.structure.groups import Layout, UnitGroup, WeightSlice


def magnitudes(layout: Layout) -> dict[str, np.ndarray]:
    """Return a score for each unit of each group: the root of the mean, over weights, of its share of their squares.

    A share of 1 is that of an average unit of its group, so that layers and weights of other scales compare. Vectors
    such as biases and statistics of normalizations do not count; the integers of quantised weights do, as they are.
    Returns: float64 arrays of as many entries as a group has units, by name; higher = keep.
    """
    squares = _Squares(layout.structure.network)
    return {group.name: _scores(group, squares) for group in layout.groups}


def _scores(group: UnitGroup, squares: _Squares) -> np.ndarray:
    parts = {(part.weight, part.position): part for part in group.slices}
    summed, weights = np.zeros(group.units), 0
    for part in parts.values():
        along = squares.along(part)
        if along is None:
            continue
        unit = units_along(part.axis, group.leaf)
        here = np.bincount(unit[unit >= 0], along[unit >= 0], group.units)
        mean = here.mean()
        summed += here / mean if mean else 0
        weights += 1
    return np.sqrt(summed / max(1, weights))


class _Squares:
    """Sums of squares of weights along one axis; several groups ask for the same."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._found: dict[tuple[str, int], np.ndarray | None] = {}

    def along(self, part: WeightSlice) -> np.ndarray | None:
        """Return one sum for each entry of the axis; None for vectors and for axes that are broadcast."""
        key = part.weight, part.position
        if key not in self._found:
            stored = self._network.weights[part.weight]
            shape = stored.shape.numpy()
            if sum(size > 1 for size in shape) < 2 or shape[part.position] != part.axis.size:
                self._found[key] = None
            else:
                values = torch_tensor(stored).float().nan_to_num(0, 0, 0)
                others = [position for position in range(len(shape)) if position != part.position]
                self._found[key] = values.square().sum(others).double().numpy()
        return self._found[key]
