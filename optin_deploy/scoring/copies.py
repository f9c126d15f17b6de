"""Partial runs on copies of the samples: what must be computed again, and what is copied from one dense run.

Units that share a run are masked each on a copy of its own. Values along the samples are copied; what has no axis of
samples, such as sizes, positions and indices, follows from the number of copies and is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from optin_deploy.network.run import Cone, Program
from optin_deploy.structure.sharing import REAL
from optin_deploy.structure.stream import samples_axis
from optin_deploy.structure.structure import Structure


def cone_of_copies(program: Program, structure: Structure, nodes: Collection[int]) -> Cone:
    """Return what must run again on copies of the samples when inputs of these nodes change."""
    network = structure.network
    cone = program.cone(nodes)
    inside, needs, left = set(cone.nodes), dict[str, None](), list(cone.needs)
    while left:
        name = left.pop()
        producer = network.producer.get(name)
        if producer is None or name in network.fixed or copied_along(structure, name) is not None:
            needs[name] = None
        elif producer.index not in inside:
            inside.add(producer.index)
            left += [each for each in producer.inputs if each and each not in network.weights]
    return Cone(tuple(sorted(inside)), tuple(needs))


def copied_along(structure: Structure, value: str) -> int | None:
    """Return the axis along which a value is copied with its samples; None: it is computed again."""
    kind = structure.shapes.tensors[value].dtype if value in structure.shapes.tensors else torch.int64
    return samples_axis(structure, value) if kind.is_floating_point or kind in REAL else None


def copies(structure: Structure, values: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Return the values that a cone needs, samples so many times one behind the other."""
    inputs = {port.name for port in structure.network.inputs}
    found = {}
    for name, value in values.items():
        fixed = name in structure.network.fixed
        along = 0 if name in inputs else None if fixed else copied_along(structure, name)
        found[name] = value if along is None else _repeated(value, along, times)
    return found


def _repeated(value: Tensor, along: int, times: int) -> Tensor:
    return value if times == 1 else value.repeat([times if axis == along else 1 for axis in range(value.dim())])
