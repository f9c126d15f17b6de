"""Masks of kept units at the inputs of the contractions that consume them: what a cut must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.network.axes import kept, touched
from optin_deploy.network.run import Place
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.keep import checked


def masks(layout: Layout, keep: Mapping[str, Sequence[int]]) -> dict[Place, Tensor]:
    """Return a multiplier of 0 and 1 for each place where units are consumed that go.

    Returns: float32 tensors that broadcast over the node's input, by node and place.
    Raises: BadInput: as `structure.keep.checked`.
    """
    leaves = layout.leaves(checked(layout, keep))
    structure = layout.structure
    found: dict[Place, Tensor] = {}
    for site in (*structure.contractions, *structure.ranged):
        if not touched(site.axis, leaves):
            continue
        vector = torch.zeros(site.axis.size)
        vector[torch.from_numpy(kept(site.axis, leaves))] = 1
        rank = len(structure.shapes.shape(structure.network.nodes[site.node].inputs[site.place]) or ())
        mask = vector.reshape([-1 if position == site.position else 1 for position in range(rank)])
        place = (site.node, site.place)
        found[place] = found[place] * mask if place in found else mask
    return found
