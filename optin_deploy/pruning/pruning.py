"""Make a network of any kind smaller by what it computes on data: score, plan, compensate, cut and prove its graph."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.compensate import Compensation, compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import Proof
from optin_deploy.cutting.turning import turned as turned_network
from optin_deploy.cutting.tying import Ties
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.feeds import Halves, check_runs
from optin_deploy.files.storage import sha256_json
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import hash_of
from optin_deploy.network.run import Program
from optin_deploy.planning.costs import CostLimit
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.plan import NetworkPlan, Origin, plan_cost, plan_of
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.planning.widths import Choice, Keep, choose
from optin_deploy.pruning.networks import Found, cut_by
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.judges import check_kind
from optin_deploy.quality.quality import Asked
from optin_deploy.scoring.parts import Store, Worker
from optin_deploy.scoring.settings import Kind, ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.labels import DEFAULT_KINDS
from optin_deploy.structure.turning import KINDS as TURNED
from optin_deploy.structure.turning import turnables

log = logging.getLogger(__name__)

Curves = Mapping[str, Curve]
"""Error curves by name of group."""


@dataclass(frozen=True, eq=False)
class CutResult:
    """A smaller network, and how it came to be."""

    network: Network
    dense: Network
    """What it was cut from, of the same shape as the given one, with the weights that were repaired."""
    plan: NetworkPlan
    compensation: Compensation | None
    proof: Proof


@dataclass(frozen=True)
class ComparedOutput:
    """What is compared of a network's outputs, and as what; see `scoring.reading.reading_of`."""

    output: str | None = None
    kind: Kind | None = None
    head: EmbeddingHead | None = None
    """What makes embeddings of states; None means that of the reading."""


def ready_of(
    found: Found,
    rows: Halves,
    *,
    compared: ComparedOutput = ComparedOutput(),  # frozen
    kinds: tuple[str, ...] = DEFAULT_KINDS,
    names: tuple[str, ...] | None = None,
    strict: bool = False,
    metric: Asked | None = None,
    seed: int = 0,
) -> Ready:
    """Put a network and its data together.

    Raises: BadInput: they do not fit.
    """
    subject = Subject.make(found.layout, output=compared.output, kind=compared.kind)
    if compared.head is not None:
        head = compared.head
        subject = replace(subject, reading=replace(subject.reading, pooling=head.pooling, layers=head.layers))
    for half in (rows.calibration, rows.held_out):
        if half is not None and metric is None:
            check_kind(half, subject.reading)
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
    limits: Sequence[CostLimit],
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


def make(ready: Ready, plan: NetworkPlan, *, compensation: bool = True, progress: Progress = silent) -> CutResult:
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
    return CutResult(smaller, dense, plan, repaired, proof)


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
