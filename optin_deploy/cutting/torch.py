"""Cut a torch module by the groups of its graph: smaller parameters under the same names, attributes that follow.

The same class is given back where a run proves that it computes what the masked network computes; else the cut graph.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from optin_deploy.cutting.attributes import Candidate, Sizes, candidates, followers, scope, search, sure, write
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.proof import TOLERANCE, difference, prove
from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, kept, touched
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_torch import FAILURES, Traced, prepared
from optin_deploy.network.run import Program
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.keep import checked

ROUNDING = 1e-4
"""Most that a module and its graph may differ, as a part of the largest output; more, and they are not the same."""
FLOAT_TOLERANCE = 1e-5
"""What counts as rounding in a module that does not run in float64."""

Keep = Mapping[str, Sequence[int]]
Indices = tuple[np.ndarray | None, ...]
Probes = Sequence[Mapping[str, Tensor]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutModule:
    """A smaller module."""

    module: nn.Module
    """Smaller module of the given one's class, or a `NetworkModule`."""
    attributes: Sizes
    """Sizes beside the weights that were set, by module and attribute."""
    why_graph: str = ""
    """Why the class cannot hold it; empty if it can."""


def cut_module(module: nn.Module, layout: Layout, keep: Keep, probes: Probes | None = None) -> nn.Module:
    """Return a smaller module; the given one is untouched, and parameters that stay whole are shared with it.

    Args:
        layout: what `find` finds in the graph that was read from this module, whose weights have its parameters' names.
        keep: kept units by name of group; a group that is not named stays whole.
        probes: inputs by name, on which the result is proven; None: made for the network.
    Returns: a module of the same class; a `NetworkModule` where no class holds the result, which is logged.
    Raises:
        BadInput: a group or unit is unknown, or the layout was not read from this module.
        NotProven: not even the cut graph computes what the masked network computes.
    """
    found = cut_and_tell(module, layout, keep, probes)
    if found.why_graph:
        logger.warning("%s", found.why_graph)
    return found.module


def cut_and_tell(module: nn.Module, layout: Layout, keep: Keep, probes: Probes | None = None) -> CutModule:
    """Do what `cut_module` does; also tell which attributes were set, or why the graph is returned instead."""
    keep = {name: units for name, units in checked(layout, keep).items() if len(units) < layout.by_name[name].units}
    probes = probes or probes_of(layout.structure.network)
    trials = SmallerCopies(module, layout, probes)
    chosen, why = trials.assign(keep)
    if not why:
        smaller, attributes = trials.made(module, keep, chosen)
        return CutModule(smaller, attributes)
    trained = {name for name, value in trials.tensors.items() if isinstance(value, nn.Parameter)}
    smaller_graph = cut(layout, keep)
    prove(layout, keep, smaller_graph, probes)
    graph = NetworkModule(smaller_graph, trained=trained).to(trials.device).train(module.training)
    return CutModule(graph, {}, f"{type(module).__name__} is given as a graph: {why}.")


class _CannotHold(Exception):
    """Says why parameters alone cannot be what a plan keeps."""


class SmallerCopies:
    """Smaller copies of a module, compared with the masked network; in float64 where the module runs in it."""

    def __init__(self, module: nn.Module, layout: Layout, probes: Probes) -> None:
        """Raises: BadInput: the module does not compute what the layout's network computes."""
        self.module, self.layout, self.probes = module, layout, probes
        self.tensors = tensors(module)
        self.device = next((value.device for value in self.tensors.values()), torch.device("cpu"))
        self._dtype: torch.dtype | None
        self._plain: bool
        for self._dtype, self._plain in ((torch.float64, False), (torch.float64, True), (None, True)):
            self._start()
            why = self.attempt({}, ())
            if not why:
                # What casts inside of the module and rounded constants of the graph make of the dense outputs.
                self._tolerance = 10 * self._worst + (TOLERANCE if self._dtype else FLOAT_TOLERANCE)
                return
        raise BadInput(
            f"The layout was not found in the graph of this {type(module).__name__}: {why}. Read it and find again. "
            "A forward that decides by values, as `if x.mean() > 0` does, has no one graph."
        )

    def _start(self) -> None:
        self._program = Program(self.layout.structure.network, device=self.device, dtype=self._dtype)
        self._source, self._tolerance = copied(self.module, dtype=self._dtype), ROUNDING
        self._masked: tuple[Keep, int, list[Tensor]] | None = None

    def parts(self, keep: Keep) -> list[tuple[str, Keep]]:
        """Parts of a plan that no attribute concerns together, each with the class of a module that holds one.

        Groups belong together where the module that holds all weights of one is of a class inside of another's.
        """
        found: list[tuple[list[str], dict[str, Sequence[int]]]] = []
        scopes = {name: scope(self.layout.by_name[name], self.tensors) or [""] for name in keep}
        for name in sorted(keep, key=lambda name: scopes[name][0].count(".")):
            classes = [type(self.module.get_submodule(path)).__name__ for path in scopes[name]]
            joined = [each for each in found if classes[0] in each[0]]
            rest = [each for each in found if classes[0] not in each[0]]
            part = {key: units for _, other in joined for key, units in other.items()}
            found = [*rest, ([inner for known, _ in joined for inner in known] + classes, {**part, name: keep[name]})]
        return [(classes[0], part) for classes, part in found]

    def assign(self, keep: Keep) -> tuple[Sequence[Candidate], str]:
        """Return attributes with which a plan is proven on all probes, or why there are none."""
        try:
            chosen = list(sure(self._candidates(keep)))
        except _CannotHold as err:
            return (), str(err)
        if not self.attempt(keep, chosen):
            return chosen, ""
        chosen = []
        for name, part in self.parts(keep):
            found, why = self._search(part)
            if why:
                return (), f"{name} cannot hold what is kept of {next(iter(part))} ({why})"
            chosen += found
        return chosen, self.attempt(keep, chosen)

    def _search(self, keep: Keep) -> tuple[Sequence[Candidate], str]:
        """Find attributes for a part of a plan, with one probe."""
        every = self._candidates(keep)
        plain = [each for each in every if "." not in each[0].attribute]
        found, why = search(lambda chosen: self.attempt(keep, chosen, self.probes[:1]), plain)
        if why and len(plain) < len(every):
            found, why = search(lambda chosen: self.attempt(keep, chosen, self.probes[:1]), every)
        return found, why

    def _candidates(self, keep: Keep) -> list[list[Candidate]]:
        groups = [self.layout.by_name[name] for name in keep]
        sizes = {leaf: len(units) for leaf, units in with_shared(self.layout, keep).items()}
        known = followers(self.module, self._shapes(self._indices(keep)))
        return candidates(self.module, self.layout, groups, self.tensors, sizes, known)

    def attempt(self, keep: Keep, chosen: Sequence[Candidate], probes: Probes | None = None) -> str:
        """Return why a copy does not compute what the masked network computes; empty if it does."""
        probes = probes or self.probes
        try:
            smaller, _ = self.made(self._source, keep, chosen)
            found = self._outputs(smaller, probes)
        except _CannotHold as err:
            return str(err)
        except FAILURES as err:
            return f"{type(err).__name__}: {(str(err).splitlines() or [''])[0]}"
        expected = self._expected(keep, probes)
        if len(found) != len(expected):
            return "it has other outputs"
        self._worst = max(difference(*pair) for pair in zip(found, expected, strict=True))
        return "" if self._worst <= self._tolerance else f"it differs by {self._worst:.1e} of the largest output"

    def made(self, source: nn.Module, keep: Keep, chosen: Sequence[Candidate]) -> tuple[nn.Module, Sizes]:
        """Return a copy of a module that holds what is kept, and the attributes that were set in it."""
        cuts = self._indices(keep)
        smaller = copied(source, cuts)
        attributes = followers(self.module, self._shapes(cuts))
        for each in chosen:
            attributes |= each.values
        return smaller, write(smaller, attributes)

    def _indices(self, keep: Keep) -> dict[str, Indices]:
        """Kept entries of each axis of the parameters and buffers that are cut."""
        leaves = with_shared(self.layout, keep)
        found: dict[str, Indices] = {}
        for use in self.layout.structure.uses:
            if use.weight in self.tensors:
                index = tuple(kept(axis, leaves) if touched(axis, leaves) else None for axis in use.axes)
                known = found.setdefault(use.weight, index)
                if [_key(each) for each in known] != [_key(each) for each in index]:
                    raise _CannotHold(f"{use.weight} is read in several places, and each keeps other entries of it")
        return {name: index for name, index in found.items() if any(each is not None for each in index)}

    def _shapes(self, cuts: Mapping[str, Indices]) -> dict[str, list[int]]:
        return {
            name: [n if index is None else len(index) for n, index in zip(self.tensors[name].shape, each, strict=True)]
            for name, each in cuts.items()
        }

    def _expected(self, keep: Keep, probes: Probes) -> list[Tensor]:
        """Outputs of the masked network; the last ones are remembered."""
        if self._masked is None or self._masked[0] is not keep or self._masked[1] != len(probes):
            places = {place: mask.to(self._dtype) for place, mask in masks(self.layout, keep).items()}
            with torch.no_grad():
                runs = [self._program(feeds, masks=places).outputs.values() for feeds in probes]
            self._masked = keep, len(probes), [value for outputs in runs for value in outputs]
        return self._masked[2]

    def _outputs(self, module: nn.Module, probes: Probes) -> list[Tensor]:
        found: list[Tensor] = []
        with prepared(module, plain=self._plain), torch.no_grad():
            for feeds in probes:
                real = {name for name, value in feeds.items() if value.is_floating_point()}
                values = [v.to(self.device, self._dtype if name in real else None) for name, v in feeds.items()]
                found += Traced(module, tuple(feeds))(*values)
        return found


def with_shared(layout: Layout, keep: Keep) -> dict[Axis, np.ndarray]:
    """Kept entries by leaf, also of what layers share and take parts of, where all of them take the same part."""
    leaves = layout.leaves(keep)
    structure = layout.structure
    parts: dict[Axis, list[np.ndarray]] = {}
    for tap in structure.taps:
        source = structure.axes[structure.network.nodes[tap.node].inputs[tap.place]][tap.position]
        if source.kind == "leaf":
            parts.setdefault(source.root, []).append(kept(tap.axis, leaves))
    for source, taken in parts.items():
        if len(taken[0]) < source.size and all(np.array_equal(each, taken[0]) for each in taken):
            leaves.setdefault(source, taken[0])
    return leaves


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; those with several names under each."""
    parameters, buffers = (
        dict(found(remove_duplicate=False)) for found in (module.named_parameters, module.named_buffers)
    )
    return {**parameters, **buffers}


def copied(
    module: nn.Module, cuts: Mapping[str, Indices] | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a copy that shares parameters and buffers but those that are cut, or that become another real type.

    Args: cuts: kept entries along each axis, by name of a parameter or buffer; None: all.
    """
    cuts = cuts or {}
    memo: dict[int, object] = {}
    for name, tensor in sorted(tensors(module).items(), key=lambda item: item[0] not in cuts):
        if id(tensor) in memo:
            continue
        value = tensor.detach().to(dtype) if dtype and tensor.is_floating_point() else tensor
        for axis, index in enumerate(cuts.get(name, ())):
            if index is not None:
                value = value.detach().index_select(axis, torch.from_numpy(index).to(value.device))
        if isinstance(tensor, nn.Parameter) and value is not tensor:
            value = nn.Parameter(value, tensor.requires_grad)
        memo[id(tensor)] = value
    return copy.deepcopy(module, memo)


def _key(index: np.ndarray | None) -> bytes | None:
    return None if index is None else index.tobytes()
