"""Tiny transformers models that are cut unevenly: as torch computes them, and as the file that engines start from."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_deploy.checkpoint.loading import drop_pooler
from optin_deploy.checkpoint.smaller import save
from optin_deploy.checkpoint.tasks import task_of
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.torch import cut_and_tell
from optin_deploy.exporters.base import Form
from optin_deploy.exporters.passes.pooled import pooled
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.files.storage import sha256_json
from optin_deploy.network.axes import kept
from optin_deploy.network.examples import example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.sealed import store
from optin_deploy.network.unused import tidied
from optin_deploy.planning.plan import plan_of
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from support.tiny_models import tiny_batches, tiny_model

HEADS, NEURONS = (1, 3, 4), (17, 31, 50)
"""Units that stay in the three layers, in some order."""
Keep = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Tiny:
    """A model with its graph; shared between tests, and not to be changed."""

    model: Any
    """As it is: dense."""
    layout: Layout
    keep: Keep
    """Units that stay; empty: all."""

    @property
    def reference(self) -> Any:
        """The dense-shaped torch model in which all weights of the units that go are 0."""
        return zeroed(self.model, self.layout, self.keep)

    @property
    def network(self) -> Network:
        """Its graph, cut."""
        return cut(self.layout, self.keep) if self.keep else self.layout.structure.network

    @property
    def kept_parameters(self) -> int:
        """Of the graph's weights that are of the model."""
        gone = zeroed(ones(self.model), self.layout, self.keep)
        names = self.layout.structure.network.weights
        return sum(int(p.count_nonzero()) for name, p in gone.named_parameters() if name in names)


@cache
def tiny(name: str, *, no_heads: tuple[int, ...] = (1,), no_neurons: tuple[int, ...] = (2,)) -> Tiny:
    """A model of tiny_models by its name; the named layers lose all of a kind.

    Args: name: `dense NAME` loses nothing; `dynamo NAME` is read by torch's new exporter, which takes twenty times as
        long as TorchScript's.
    """
    how, _, name = f" {name}".rpartition(" ")
    model = tiny_model(name)
    if not name.endswith("+head"):
        drop_pooler(model, task_of("feature-extraction"))
    example = example_of(model)
    network = tidied(read_module(model, example.inputs, axes=example.axes, dynamo="dynamo" in how))
    layout = find(network, probes_of(network))
    return Tiny(model, layout, {} if "dense" in how else some_units(layout, no_heads, no_neurons))


def some_units(
    layout: Layout, no_heads: Collection[int] = (), no_neurons: Collection[int] = ()
) -> dict[str, list[int]]:
    """Another number of units in every layer, chosen at random; a classifier of its own stays whole."""
    rng, keep = np.random.default_rng(0), {}
    for kind, counts, none in (("heads", HEADS, no_heads), ("neurons", NEURONS, no_neurons)):
        groups = [group for group in layout.groups if group.kind == kind]
        for layer, (group, count) in enumerate(zip(groups, rng.permutation(counts), strict=False)):
            stay = 0 if layer in none else count
            keep[group.name] = sorted(rng.choice(group.units, stay, replace=False).tolist())
    return keep


def ones(model: Any) -> Any:
    """The same with all weights 1, to be counted."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(1)
    return found


def zeroed(model: Any, layout: Layout, keep: Keep) -> Any:
    """Independent of cutting and of the graph's run: only the dense forward of torch."""
    found, leaves = copy.deepcopy(model).eval(), layout.leaves(keep)
    named = dict(found.named_parameters())
    with torch.no_grad():
        for group in layout.groups:
            for each in group.slices if group.leaf in leaves else ():
                stay = torch.zeros(each.axis.size)
                stay[torch.from_numpy(kept(each.axis, leaves))] = 1
                rank = named[each.weight].dim()
                named[each.weight] *= stay.reshape([-1 if axis == each.position else 1 for axis in range(rank)])
    return found


def module_in(case: Tiny, folder: Path) -> Path:
    """Write the cut model as its class of transformers."""
    found = cut_and_tell(case.model, case.layout, case.keep)
    assert not found.why_graph
    return save(found.module, found.attributes, plan_of(case.layout, case.keep), folder)


def form_of(network: Network, path: Path, *, head: EmbeddingHead | None = None, **about: Any) -> Form:
    """Write a network as the stages before an export do."""
    whole = network if head is None else pooled(network, head)
    store(
        whole,
        path,
        sha256_json([{name: weight.tobytes().hex() for name, weight in whole.weights.items()}, head and head.digest]),
    )
    return Form(path, whole, **about)


def samples(model: Any) -> list[dict[str, np.ndarray]]:
    """Calibration data of int8."""
    return [{name: value.numpy() for name, value in batch.items()} for batch in tiny_batches(model)]
