"""Inspect and cut networks of any kind: what `optin inspect`, `optin rewrite` and `import optin_deploy` offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optin_deploy.common.validation import INT32
from optin_deploy.cutting.graph import cut as cut_graph
from optin_deploy.cutting.proof import Proof, prove
from optin_deploy.cutting.tokens import merged
from optin_deploy.errors import BadInput
from optin_deploy.feeds.module_feeds import module_feeds
from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.probe import Given, probes_of
from optin_deploy.network.read import read
from optin_deploy.planning.costs import Costs, costs_of
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.structure.find import carried, find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.tokens import token_stream

Inputs = Mapping[str, Tensor]
Plan = NetworkPlan | Mapping[str, Sequence[int]] | str | PathLike[str]
"""A plan, kept units by name of group, or the path of a plan.json."""


@dataclass(frozen=True, eq=False)
class Found:
    """A network and what can be cut in it."""

    layout: Layout
    probes: tuple[Inputs, ...]
    """Inputs of two sizes, with which it was found and a cut is proven."""

    @property
    def network(self) -> Network:
        """The network whose groups were found."""
        return self.layout.structure.network


def find_in(x: Any, inputs: Any = None, sizes: Mapping[str, int] | None = None) -> Found:
    """Read a network and find its groups; see `inspect`."""
    inputs = _named(x, inputs)
    network = network_of(x, inputs)
    known = {port.name for port in network.inputs}
    tensors = (
        {} if isinstance(x, nn.Module) else {name: value for name, value in (inputs or {}).items() if name in known}
    )
    probes = probes_of(network, given=Given(sizes or {}, tensors))
    return Found(find(network, probes), tuple(probes))


def _named(x: Any, inputs: Any) -> Inputs | None:
    """Example inputs by name, of a module also from a tuple in the order of its forward or from its only input.

    Raises: BadInput: they are of another kind, or do not fit the forward.
    """
    if inputs is None or isinstance(inputs, Mapping):
        return inputs
    if isinstance(x, nn.Module):
        return module_feeds(x, [inputs], most=INT32).batches[0]
    raise BadInput(f"inputs is a {type(inputs).__name__}; give a dict of tensors by the names of the network's inputs.")


def network_of(x: Any, inputs: Inputs | None = None) -> Network:
    """Read whatever holds a network: also a folder or a hub id of a transformers model.

    Raises: BadInput: see `network.read.read`.
    """
    if isinstance(x, str | PathLike) and not is_file(x):
        from optin_deploy.checkpoint.loading import load_model

        return read(load_model(str(x))[0], inputs)
    return read(x, inputs)


def is_file(x: str | PathLike[str]) -> bool:
    """Is this the path of an ONNX file, as far as the name tells, or of any other file?"""
    return Path(x).suffix.lower() == ".onnx" or Path(x).is_file()


def inspect(x: Any, inputs: Any = None, *, sizes: Mapping[str, int] | None = None) -> Layout:
    """Find what can be cut in a network.

    Args:
        x: path of an .onnx file, folder or hub id of a transformers model, a torch module, `onnx.ModelProto`,
            `onnx_ir.Model`.
        inputs: example inputs by name, of a module also a tuple in the order of its forward or its only input; a
            module that is no transformers model needs them.
        sizes: of free axes by the names that an ONNX file gives them, where it takes only some sizes.
    Returns: a layout; `layout.groups` have a name, a kind, units and where they lie, `layout.frozen` say why not.
    Raises: BadInput: it cannot be read.
    """
    return find_in(x, inputs, sizes).layout


def cut(x: Any, plan: Plan, inputs: Any = None, *, sizes: Mapping[str, int] | None = None) -> Any:
    """Cut a network by a plan, and prove in float64 that the result computes what the masked network does.

    Args: x, inputs, sizes: as `inspect`. plan: a plan, kept units by name of group, or the path of a plan.json.
    Returns: a torch module for a torch module, else a `Network`, which `network.write.write` stores; `x` is untouched.
    Raises: BadInput, PlanMismatch: the plan does not fit. NotProven: a fault of ours.
    """
    found = find_in(x, inputs, sizes)
    chosen = as_plan(plan, found.layout)
    if isinstance(x, nn.Module) and not any(chosen.merges):
        from optin_deploy.cutting.torch import cut_module

        return cut_module(x, found.layout, chosen.keep, found.probes)
    smaller, _ = cut_by(found, chosen)
    return NetworkModule(smaller).train(x.training) if isinstance(x, nn.Module) else smaller


def cut_by(found: Found, plan: NetworkPlan) -> tuple[Network, Proof]:
    """Cut a network by a plan that fits it, prove the cut, and merge tokens in what is left.

    Raises: BadInput: a group cannot lose all of its units, or tokens cannot be merged. NotProven.
    """
    smaller = cut_graph(found.layout, plan.keep)
    proof = prove(found.layout, plan.keep, smaller, found.probes)
    if any(plan.merges):
        smaller = merged(find(smaller, found.probes), plan.merges, found.probes, token_stream(found.layout))
    return smaller, proof


def costs_merging(
    found: Found, merging: Network, costs: Costs, sizes: Callable[[Found], Mapping[Axis, int]] = lambda _: {}
) -> Costs:
    """Return what plans cost of a network that merges tokens; what they are compared with merges none.

    Args: merging: the network of `found`, with its tokens merged. costs: of plans that merge none. sizes: finds sizes
        of axes other than the probe's.
    """
    layout = carried(found.layout, find(merging, found.probes).structure)
    counted = costs_of(layout, sizes(Found(layout, found.probes)))
    return replace(costs, macs=replace(counted.macs, base=costs.macs.dense))


def as_plan(plan: Plan, layout: Layout) -> NetworkPlan:
    """Return a plan that was checked against a layout.

    Raises: BadInput, PlanMismatch.
    """
    if isinstance(plan, str | PathLike):
        plan = NetworkPlan.read(Path(plan))
    if not isinstance(plan, NetworkPlan):
        if not isinstance(plan, Mapping):
            raise BadInput(f"plan is a {type(plan).__name__}; give a NetworkPlan, a dict of kept units, or a path.")
        return plan_of(layout, plan)
    plan.check(layout)
    return plan
