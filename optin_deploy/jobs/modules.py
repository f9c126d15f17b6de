"""`optin_deploy.prune` of modules that no row of the table serves: by the graph that they are exported to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_deploy.budget import Limits
from optin_deploy.cutting.proof import Proof
from optin_deploy.cutting.torch import cut_module
from optin_deploy.data.feeds import Drawing, feeds_of
from optin_deploy.data.module_feeds import example_in
from optin_deploy.jobs.networks import find_in
from optin_deploy.jobs.pruning import Recipe, prune_network, ready, scored
from optin_deploy.jobs.stored import save
from optin_deploy.network.graph import Network
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.structure.find import find


@dataclass(frozen=True, eq=False)
class PrunedModule:
    """A smaller module, and how it came to be."""

    model: nn.Module
    """Of the given one's class where that holds the result, else a `NetworkModule`."""
    network: Network
    """Its graph, which `network.write.write` stores as an ONNX file."""
    plan: NetworkPlan
    proof: Proof

    def save(self, folder: str | Path) -> Path:
        """Write the graph to a folder, whole or not at all; `optin_deploy.load` reads it as a torch module.

        Returns: the folder.
        Raises: BadInput: the folder holds something else.
        """
        return save(self.network, self.plan, Path(folder))


def prune_module(
    model: nn.Module,
    batches: Any,
    *,
    limits: Limits,
    align: int | None = None,
    allocation: str = "uniform",
    settings: ScoreSettings | None = None,
    compensation: bool = True,
    seed: int = 0,
) -> PrunedModule:
    """Make a smaller copy of a torch module by the graph that it is exported to.

    Args: batches: a list, a generator or a DataLoader of dicts, tuples or tensors; labels are left out.
    Raises: BadInput and its kinds; see errors.py.
    """
    rows = feeds_of(model, batches, Drawing(held_out=0.0, seed=seed))
    example = example_in(rows.calibration)
    found = find_in(read_module(model, example.inputs, axes=example.axes))
    choice = Choice(allocation=allocation) if align is None else Choice(align=align, allocation=allocation)
    recipe = Recipe(limits, choice, settings or ScoreSettings(seed=seed), compensation)
    asked = ready(found, rows, recipe)
    pruned = prune_network(asked, scored(asked))
    repaired = with_weights_of(model, pruned.dense, found.network)
    if repaired is None:
        smaller: nn.Module = NetworkModule(pruned.network)
    else:
        smaller = cut_module(repaired, find(pruned.dense, found.probes), pruned.plan.keep, found.probes)
    return PrunedModule(smaller, pruned.network, pruned.plan, pruned.proof)


def with_weights_of(model: nn.Module, repaired: Network, before: Network) -> nn.Module | None:
    """A copy of a module with the weights that were repaired; None: one of them is no tensor of the module."""
    changed = {name: weight for name, weight in repaired.weights.items() if before.weights.get(name) is not weight}
    copied = copy.deepcopy(model)
    tensors = copied.state_dict()
    if not set(changed) <= set(tensors):
        return None
    with torch.no_grad():
        for name, weight in changed.items():
            tensors[name].copy_(torch_tensor(weight))
    return copied
