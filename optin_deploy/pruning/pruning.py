"""Make a network of any kind smaller by what it computes on data: score, plan, compensate, cut and prove its graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.compensate import Compensation, compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import Proof
from optin_deploy.cutting.tokens import merged
from optin_deploy.cutting.turning import turned as turned_network
from optin_deploy.cutting.tying import Ties
from optin_deploy.data.class_maps import ClassMap
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.feeds.feeds import Halves, check_runs
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.rows import Feeds
from optin_deploy.files.storage import sha256_json
from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import hash_of
from optin_deploy.network.run import Program
from optin_deploy.network.shapes import shapes_of
from optin_deploy.planning.costs import Costs, Limit, costs_of
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.plan import NetworkPlan, Origin, plan_cost, plan_of
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.planning.widths import DEFAULT_KINDS, Choice, Keep, choose
from optin_deploy.pruning.networks import Found, costs_merging, cut_by
from optin_deploy.quality.outputs import Metric, NetworkJudge, readouts
from optin_deploy.quality.quality import Quality
from optin_deploy.quality.segmentation import SegmentationJudge
from optin_deploy.scoring.hearing import TokenWeights, token_weights
from optin_deploy.scoring.parts import Store, Worker
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.tokens import TokenStream, token_stream
from optin_deploy.structure.turning import KINDS as TURNED
from optin_deploy.structure.turning import turnables

log = logging.getLogger(__name__)

T = TypeVar("T")
Curves = Mapping[str, Curve]
"""Error curves by name of group."""


@dataclass(frozen=True, eq=False)
class Ready:
    """A network with the data that it is made smaller by; checked to fit together."""

    found: Found
    rows: Halves
    subject: Subject
    kinds: tuple[str, ...] = DEFAULT_KINDS
    """Kinds of the groups that may be cut."""
    names: tuple[str, ...] | None = None
    """Names of the classes, in their order."""
    strict: bool = False
    """Labels that the network does not know are refused, not left out."""
    metric: Metric | None = None
    """What is measured besides what fits the output."""
    seed: int = 0
    """Seed of random directions."""
    turned: tuple[str, ...] = ()
    """Names of the groups whose widths are turned: they stay from the front."""
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def network(self) -> Network:
        """The network before anything is cut."""
        return self.found.network

    @property
    def layout(self) -> Layout:
        """What can be cut in it."""
        return self.found.layout

    @cached_property
    def sizes(self) -> dict[Axis, int]:
        """Sizes of the free axes for one of the widest calibration rows, for which multiply-accumulates are counted."""
        return sizes_of(self.found, self.rows.calibration)

    @cached_property
    def costs(self) -> Costs:
        """What any plan costs."""
        return costs_of(self.layout, self.sizes)

    def costs_with(self, merges: tuple[int, ...]) -> Costs:
        """What any plan costs that merges so many tokens in each block; what it is compared with merges none.

        Raises: BadInput: they cannot be merged.
        """
        if not any(merges):
            return self.costs
        sizes = partial(sizes_of, rows=self.rows.calibration)
        return self.kept(("costs", merges), lambda: costs_merging(self.found, self.merging(merges), self.costs, sizes))

    def merging(self, merges: tuple[int, ...]) -> Network:
        """The network, with so many tokens merged in each block.

        Raises: BadInput: they cannot be merged.
        """

        def made() -> Network:
            used = {(block, count > 0) for block, count in enumerate(merges) if count}
            known = self.kept("proven merges", list[set[tuple[int, bool]]])
            proven = any(used <= some for some in known)
            network = merged(self.layout, merges, self.found.probes, self.stream, proven=proven)
            known += [] if proven else [used]
            return network

        return self.kept(("network", merges), made)

    @cached_property
    def stream(self) -> TokenStream:
        """Its tokens.

        Raises: BadInput: there are none that can be merged or dropped.
        """
        return token_stream(self.layout)

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """What is made once."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    @cached_property
    def key(self) -> str:
        """Hash of all that scores, curves and repairs depend on beside their own settings."""
        # What is not there counts as it did before it could be.
        reading = {name: value for name, value in asdict(self.subject.reading).items() if value is not None}
        return sha256_json([self.subject.hash, self.rows.calibration.fingerprint, reading, sorted(self.kinds)])

    @cached_property
    def judge(self) -> NetworkJudge | SegmentationJudge:
        """Compares cut networks with this one on rows that nothing learned from.

        Raises: BadInput: no such rows, or labels by which the network is no better than guessing.
        """
        if self.rows.held_out is None:
            raise BadInput("there are no rows that judge: give --eval, or more calibration rows.")
        dense = readouts(self.subject.program, self.subject.reading, self.rows.held_out)
        if any(isinstance(label, ClassMap) for label in self.rows.held_out.labels):
            return SegmentationJudge(dense, self.rows.held_out, strict=self.strict)
        return NetworkJudge(dense, self.rows.held_out, names=self.names, metric=self.metric, strict=self.strict)

    def token_weights(self, progress: Progress = silent) -> TokenWeights | None:
        """What each calibration token counts in curves and repairs: the same for every plan, measured once."""
        if "token weights" not in self._kept:
            self._kept["token weights"] = token_weights(
                self.subject, self.rows.calibration.batches, seed=self.seed, progress=progress
            )
        found: TokenWeights | None = self._kept["token weights"]
        return found

    def know_token_weights(self, weights: TokenWeights | None) -> None:
        """Take what calibration tokens count from elsewhere."""
        self._kept["token weights"] = weights

    def quality_of(self, smaller: Network) -> Quality:
        """What a cut network is worth on the rows that judge."""
        assert self.rows.held_out is not None, "asked for a judge before"
        return self.judge.of(readouts(Program(smaller), self.subject.reading, self.rows.held_out))


@dataclass(frozen=True, eq=False)
class Cut:
    """A smaller network, and how it came to be."""

    network: Network
    dense: Network
    """What it was cut from, of the same shape as the given one, with the weights that were repaired."""
    plan: NetworkPlan
    compensation: Compensation | None
    proof: Proof


def ready_of(
    found: Found,
    rows: Halves,
    *,
    output: str | None = None,
    read_as: Any = None,
    pooling: str | None = None,
    kinds: tuple[str, ...] = DEFAULT_KINDS,
    names: tuple[str, ...] | None = None,
    strict: bool = False,
    metric: Metric | None = None,
    seed: int = 0,
) -> Ready:
    """Put a network and its data together.

    Args: output, read_as: what is compared, and as what; see `scoring.reading.reading_of`. pooling: of embeddings.
    Raises: BadInput: they do not fit.
    """
    subject = Subject.of(found.layout, output=output, kind=read_as)
    if pooling is not None:
        subject = replace(subject, reading=replace(subject.reading, pooling=pooling))
    check_runs(subject.program, rows.calibration)
    return Ready(found, rows, subject, kinds, names, strict, metric, seed)


def turned(ready: Ready, stored: Network | None = None) -> Ready:
    """Turn the widths of heads that may be cut, so that a few of their entries hold most; see `cutting.turning`.

    Args: stored: the network with these widths turned, if that was done before.
    Returns: the same where there is nothing to turn.
    Raises: NotProven: our fault.
    """
    some = (group for group in ready.layout.groups if group.kind in TURNED and group.kind in ready.kinds)
    widths, skipped = turnables(ready.layout.structure, some)
    if skipped:
        why, count = "; ".join(sorted(set(skipped.values()))), len(skipped)
        log.warning("the widths of %d groups of heads may be cut, but not be turned before: %s.", count, why)
    if not widths:
        return ready
    subject, probes = ready.subject, ready.found.probes
    network = stored or turned_network(subject, ready.rows.calibration.batches, widths, probes)
    found = Found(find(network, probes), probes)
    program = Program(network, device=subject.program.device, dtype=subject.program.dtype)
    subject = replace(subject, layout=found.layout, program=program)
    return replace(ready, found=found, subject=subject, turned=tuple(each.group.name for each in widths))


def score(
    ready: Ready,
    settings: ScoreSettings,
    *,
    memory_budget: int | None = None,
    store: Store | None = None,
    worker: Worker | None = None,
    progress: Progress = silent,
) -> UnitScores:
    """Score the units; see `scoring.unit_job.score_units`.

    Raises: BadInput, NonFiniteActivation: data and network do not fit. PartsLeft: others are at it.
    """
    found = score_units(
        ready.subject,
        ready.rows.calibration.batches,
        settings,
        kinds=ready.kinds,
        memory_budget=memory_budget,
        store=store,
        worker=worker,
        progress=progress,
    )
    return replace(found, provenance={**found.provenance, "key": score_key(ready, settings)})


def score_key(ready: Ready, settings: ScoreSettings) -> str:
    """Hash of all that scores depend on."""
    return sha256_json([ready.key, asdict(settings)])


def curves_of(ready: Ready, scores: UnitScores, progress: Progress = silent) -> Curves:
    """Measure what each group loses as it gets narrower.

    Raises: BadInput: too few samples.
    """
    units = ready.layout.units
    fronts = {name: torch.arange(units[name], 0, -1, dtype=torch.float64) for name in ready.turned}
    return unit_curves(
        ready.subject,
        {**scores.scores, **fronts},  # turned widths stay from the front
        ready.rows.calibration.batches,
        kinds=ready.kinds,
        token_weights=ready.token_weights(),
        progress=progress,
    )


def pick(
    ready: Ready,
    scores: UnitScores,
    limits: Sequence[Limit],
    choice: Choice,
    curves: Curves | None = None,
    *,
    emptying: bool = True,
) -> Keep:
    """Choose what stays; by curves a branch that the stream goes around may go as a whole, where a cut can do that.

    Args: emptying: False: no branch goes as a whole.
    Raises: BadInput, InfeasibleBudget.
    """
    layout, numbers = ready.layout, {name: values.numpy() for name, values in scores.scores.items()}
    if choice.allocation != "curves" or not emptying:
        return choose(layout, numbers, limits, choice, curves=curves)
    keep = choose(layout, numbers, limits, choice, curves=curves, emptying=bypassed(layout))
    if all(keep.values()):
        return keep
    try:
        cut(layout, keep)
    except BadInput:
        return choose(layout, numbers, limits, choice, curves=curves)
    return keep


def planned(
    ready: Ready, keep: Keep, scores: UnitScores, settings: Mapping[str, Any], merges: tuple[int, ...] = ()
) -> NetworkPlan:
    """Write down what stays, what that costs, and how it was chosen."""
    numbers: dict[str, np.ndarray] = {name: values.numpy() for name, values in scores.scores.items()}
    origin = Origin(str(scores.provenance.get("scorer")), hash_of(numbers))
    costs = ready.costs_with(merges)
    return plan_of(ready.layout, keep, settings, origin, sizes=ready.sizes, merges=merges, costs=costs)


def check_plan(ready: Ready, plan: NetworkPlan) -> None:
    """Make sure that a plan fits the network, and costs what it says.

    Raises: BadInput, PlanMismatch.
    """
    plan.check(ready.layout)
    if plan.cost not in (None, plan_cost(ready.layout, ready.costs_with(plan.merges), plan.keep, ready.sizes)):
        raise PlanMismatch(
            "the plan costs another amount than it says: it was edited. Make it with `optin plan DIR`, or leave out "
            "its `cost`."
        )


def make(ready: Ready, plan: NetworkPlan, *, compensation: bool = True, progress: Progress = silent) -> Cut:
    """Repair the weights around a cut, cut, and prove that the result computes what the masked network does.

    Raises: BadInput, NonFiniteActivation: data and network do not fit. NotProven: our fault.
    """
    found, keep, repaired = ready.found, plan.keep, None
    if compensation:
        merges = any(plan.merges) and min(plan.merges) >= 0  # one that is dropped is not tied to another
        repaired = compensated(
            ready.subject,
            keep,
            ready.rows.calibration.batches,
            token_weights=ready.token_weights(),
            ties=Ties(ready.layout, ready.stream, plan.merges, keep) if merges else None,
            progress=progress,
        )
    dense = found.network if repaired is None else repaired.network
    smaller, proof = cut_by(found if repaired is None else Found(find(dense, found.probes), found.probes), plan)
    return Cut(smaller, dense, plan, repaired, proof)


def sizes_of(found: Found, rows: Feeds) -> dict[Axis, int]:
    """Sizes of all axes for one of the widest rows, where they differ from the probe's: also of what follows from the
    inputs' sizes, such as pictures behind a convolution with a stride."""
    widest, network, one = rows.widest, found.network, takes(found.network).rows or 1
    feeds = {port.name: widest[port.name] for port in network.inputs}
    shapes = shapes_of(network, {name: x if name in rows.shared else x[:one] for name, x in feeds.items()})
    sizes: dict[Axis, int] = {}
    for name, axes in found.layout.structure.axes.items():
        for axis, size in zip(axes, shapes.shape(name) or (), strict=False):
            if axis.kind == "leaf" and axis.size != size:
                sizes.setdefault(axis.root, size)
    return sizes


def emptiable(layout: Layout) -> frozenset[str]:
    """Names of the groups that may lose all their units, all of them at once; none where no cut can do that."""
    names = bypassed(layout)
    try:
        cut(layout, dict.fromkeys(names, ()))
    except BadInput:
        return frozenset()
    return names


def emptied(keep: Mapping[str, Collection[int]]) -> list[str]:
    """Names of the groups that lose all their units."""
    return [name for name, units in keep.items() if not units]
