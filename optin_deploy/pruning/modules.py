"""The library in one call: any torch module is made smaller by the graph that it is exported to, saved, and loaded."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.checkpoint import reloading, smaller
from optin_deploy.common.arguments import as_arguments, checked, number, whole
from optin_deploy.common.guard import check_module, working
from optin_deploy.common.validation import seed_of
from optin_deploy.cutting.attributes import Sizes
from optin_deploy.cutting.proof import Proof
from optin_deploy.cutting.torch import CutModule, cut_and_tell, tensors
from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Drawing, feeds_of
from optin_deploy.feeds.module_feeds import example_in
from optin_deploy.feeds.ports import fitted, takes
from optin_deploy.feeds.rows import Feeds
from optin_deploy.network.examples import Example, example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_torch import Traced, prepared, read_module
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import limits_within
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice, aligned
from optin_deploy.pruning import stored
from optin_deploy.pruning.networks import Found, find_in
from optin_deploy.pruning.pruning import CutResult, curves_of, make, pick, planned, ready_of, score, turned
from optin_deploy.pruning.tokens import check, merging
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.structure.find import find
from optin_deploy.structure.labels import KINDS, TOKENS

logger = logging.getLogger(__name__)
LIKE = 0.1
"""Most that a graph may differ from its module, of the largest output: 16 bits do not, another branch does."""


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A smaller module, and how it came to be."""

    model: nn.Module
    """Smaller module: of the given one's class if that can hold the result, else a `NetworkModule`."""
    network: Network = field(repr=False)
    """Its graph, which `network.write.write` stores as an ONNX file."""
    plan: NetworkPlan = field(repr=False)
    proof: Proof
    report: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the cut: MACs, parameters, parity, seconds."""
    attributes: Sizes = field(default_factory=dict)
    """Sizes beside the weights that were set in the module."""
    probes: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)
    """Inputs on which what is saved is compared with the graph."""
    preprocessor: Any = field(default=None, repr=False)
    """Tokenizer or processor, saved beside the weights of a transformers model."""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files that are saved unchanged beside them, by path in the folder."""

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write to a folder, whole or not at all, what `optin_deploy.load` reads.

        A model of a class of transformers is stored as that, and read again to prove it; where its class cannot hold
        it, which is logged, and of any other module, the graph is stored as model.onnx, with its plan.
        Returns: the folder.
        Raises: BadInput: the folder holds something else.
        """
        place = smaller.folder_of(folder)
        if not smaller.fits(self.model):
            return stored.save(self.network, self.plan, place)
        try:
            beside = {"preprocessor": self.preprocessor, "files": self.files}
            smaller.save(self.model, self.attributes, self.plan, place, **beside, about=self.report)
            why = reloading.differs(place, self.network, self.probes)
        except BadInput as err:
            why = str(err)
        if why:
            stored.save(self.network, self.plan, place)
            logger.warning("%s: %s is stored as a graph: %s", place, type(self.model).__name__, why)
        return place


@as_arguments
def prune(
    model: nn.Module,
    batches: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    size: int | None = None,
    align: int | Mapping[str, int] | None = None,
    allocation: str = "curves",
    units: Sequence[str] | None = None,
    tokens: float | None = None,
    drop_tokens: bool = False,
    settings: ScoreSettings | None = None,
    compensation: bool = True,
    seed: int = 0,
) -> PrunedModel:
    """Make a smaller copy of a trained model, without retraining; the input is untouched.

        pruned = optin_deploy.prune(model, batches, flops=0.6)
        pruned.save("smaller")
        model = optin_deploy.load("smaller")

    Args:
        model: a transformers model or any torch module, dense.
        batches: calibration inputs, a list, a generator or a DataLoader of batches: dicts of tensors, arrays or lists
            by the names of the model's inputs, or tuples in their order. Labels are left out. Multiply-accumulates are
            counted at the sizes of the widest row.
        flops: share of the dense MACs to keep, in (0, 1]; 0.6 if nothing is limited.
        params: share of the dense parameters to keep, in (0, 1].
        size: most bytes of all weights.
        align: neurons and channels in multiples of this, or a multiple for each kind, such as {"neurons": 16}; default:
            see `planning.widths.aligned`.
        allocation: where to cut: `curves`, `uniform` or `paper`; see `planning.widths.Choice`.
        units: kinds of units that may be cut, such as ("heads", "neurons", "qk-width", "v-width"); default: all but
            widths of heads, which no transformers class can hold.
        tokens: mean share of the tokens that stay behind the attention of a block, in (0, 1]: those that are alike are
            merged, and the widths get what is left of the limits; None: all stay.
        drop_tokens: tokens that go are dropped, not merged, as only those of texts can be.
        settings: how units are scored; default: `ScoreSettings(seed=seed)`.
        compensation: re-solve what is left in closed form.
        seed: of random projections, and of the rows that are taken.
    Raises: BadInput and its kinds; see errors.py.
    """
    limits, seed = Limits(flops, params, size), seed_of(seed)
    choice = Choice(
        Choice.kinds if units is None else _kinds(units),
        allocation=checked(allocation, str, "allocation") or "curves",
        drops=bool(checked(drop_tokens, bool, "drop_tokens")),
    )
    if isinstance(align, Mapping):
        align = {checked(kind, str, "align") or "": whole(many, f"align of {kind}") for kind, many in align.items()}
    elif align is not None:
        align = whole(align, "align")
    choice = choice.in_multiples(align)
    scoring = checked(settings, ScoreSettings, "settings") or ScoreSettings(seed=seed)
    compensation = bool(checked(compensation, bool, "compensation"))
    share = None if tokens is None else number(tokens, "tokens")
    check_module(model)
    started = time.perf_counter()
    with working(model):
        rows = feeds_of(model, batches, Drawing(held_out=0.0, seed=seed))
        example = example_for(model, rows.calibration)
        network = read_module(model, example.inputs, axes=example.axes)
        given, rows = rows.calibration, replace(rows, calibration=fitting(network, rows.calibration))
        check_read(model, network, given, rows.calibration)
        found = find_in(network)
        ready = turned(ready_of(found, rows, kinds=choice.kinds, seed=seed))
        choice = merging(ready, aligned(found.layout, choice, align), share)
        check(ready, limits, choice)
        scores = score(ready, scoring)
        curves = curves_of(ready, scores) if choice.allocation == "curves" else None
        within = limits_within(ready.costs_with(choice.merges), limits)
        keep = pick(ready, scores, within, choice, curves, emptying=not any(choice.merges))
        pruned = make(ready, planned(ready, keep, scores, asdict(limits), choice.merges), compensation=compensation)
        held = cut_like(model, pruned, ready.found, graph=bool(ready.turned))
    report = {
        **_counts(pruned.plan),
        "params": {"dense": smaller.count(model), "pruned": smaller.count(held.module)},
        "parity": {"masked_vs_rewritten": pruned.proof.masked},
        "compensation": compensation,
        "why_graph": held.why_graph,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if held.why_graph:
        logger.warning("%s", held.why_graph)
    return PrunedModel(held.module, pruned.network, pruned.plan, pruned.proof, report, held.attributes, found.probes)


def _kinds(units: Sequence[str]) -> tuple[str, ...]:
    """Raises: BadInput: no list of kinds that may be cut here."""
    listed = isinstance(units, (list, tuple)) and all(isinstance(kind, str) for kind in units)
    if not listed or not units or TOKENS in units:
        raise BadInput(f"units {units!r}: give a list of {', '.join(KINDS)}; tokens are merged by tokens=0.7.")
    return tuple(units)


def load(folder: str | PathLike[str]) -> Any:
    """Load a smaller model: of its transformers class, ready for `transformers.pipeline`, else its graph.

    Args: folder: what `PrunedModel.save` wrote, or the output folder of `optin-export`: its model/, else its
        model.onnx as a module that takes the inputs by name and returns a dict of outputs.
    Raises: BadInput, PlanMismatch: files are missing, damaged, or do not belong together.
    """
    place = smaller.folder_of(folder)
    home = smaller.home_in(place)
    return stored.load(place) if home is None and stored.is_stored(place) else reloading.load(home or place)


def fitting(network: Network, rows: Feeds) -> Feeds:
    """The rows in the types that a network takes; values that it cannot take are refused before the work.

    Raises: BadInput: names the batch and the input.
    """
    inputs = takes(network)
    batches = [{**batch, **fitted(inputs, batch, f"batch {number}")} for number, batch in enumerate(rows.batches)]
    return replace(rows, batches=tuple(batches))


def check_read(model: nn.Module, network: Network, given: Feeds, fits: Feeds) -> None:
    """Make sure that the graph computes what the module computes on all rows: a forward may decide by what it is given.

    Args: given: rows as the module takes them. fits: the same in the types of the network.
    Raises: BadInput: the first batch on which it does not.
    """
    program = Program(network)
    device = next((value.device for value in model.state_dict().values()), torch.device("cpu"))
    for place, (batch, fit) in enumerate(zip(given.batches, fits.batches, strict=True)):
        with prepared(model), torch.no_grad():
            values = {name: value.to(device) for name, value in batch.items()}
            wanted = Traced(model, tuple(values))(*values.values())
            outputs = program({port.name: fit[port.name] for port in network.inputs}).outputs.values()
        for mine, other in zip(outputs, wanted, strict=True):
            apart = float((mine.double() - other.cpu().double()).abs().nan_to_num().max())
            if apart > LIKE * float(other.double().abs().nan_to_num().max()):
                raise BadInput(
                    f"{type(model).__name__}: the graph that was read computes something else: on batch {place} it "
                    f"differs by {apart:.2g}. A forward that decides by values, as `if x.mean() > 0` does, has no one "
                    "graph: write it with torch.where, or give the part of the model without it."
                )


def cut_like(model: nn.Module, pruned: CutResult, found: Found, *, graph: bool = False) -> CutModule:
    """The module cut as its graph was: of the same class where that holds it.

    Args: found: the graph of the module, as it was read. graph: the class does not hold it.
    """
    if graph or any(pruned.plan.merges):
        what = "heads get narrower" if graph else "tokens are merged or dropped"
        why = f"{type(model).__name__} is given as a graph, in which {what}."
        return CutModule(NetworkModule(pruned.network).train(model.training), {}, why)
    repaired = with_weights_of(model, pruned.dense, found.network)
    if repaired is None:
        why = f"{type(model).__name__} is given as a graph: what was repaired is no parameter of it."
        return CutModule(NetworkModule(pruned.network).train(model.training), {}, why)
    return cut_and_tell(repaired, find(pruned.dense, found.probes), pruned.plan.keep, found.probes)


def with_weights_of(model: nn.Module, repaired: Network, before: Network) -> nn.Module | None:
    """A copy of a module with the weights that were repaired; None: one of them is no tensor of the module."""
    changed = {name: weight for name, weight in repaired.weights.items() if before.weights.get(name) is not weight}
    copied = copy.deepcopy(model)
    held = tensors(copied)
    if not set(changed) <= set(held):
        return None
    with torch.no_grad():
        for name, weight in changed.items():
            held[name].copy_(torch_tensor(weight))
    return copied


def example_for(model: nn.Module, rows: Feeds) -> Example:
    """Inputs to trace a module with, of its own rows; what transformers leaves free is free, whatever the rows are.

    So is what it does not ask for and is shaped like something that it does, such as the token types of GPT-2.
    """
    example = example_in(rows)
    try:
        known = example_of(model).axes if hasattr(model, "main_input_name") else {}
    except BadInput:
        known = {}
    shapes = {name: value.shape for name, value in example.inputs.items()}
    alike = {shapes[name]: axes for name, axes in known.items() if name in shapes}
    free = {name: known.get(name, alike.get(shapes[name], axes)) for name, axes in example.axes.items()}
    return Example(example.inputs, free)


def _counts(plan: NetworkPlan) -> dict[str, Any]:
    cost = plan.cost
    if cost is None:
        return {}
    macs = {"dense": cost.macs_dense, "pruned": cost.macs_pruned, "kept": cost.macs_pruned / max(1, cost.macs_dense)}
    return {"macs": macs}
