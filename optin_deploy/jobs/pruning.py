"""Make a network of any kind smaller by what it computes on data: score, plan, compensate, cut and prove its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from optin_deploy.budget import Limits
from optin_deploy.curves import Curve
from optin_deploy.cutting.compensate import Compensation, compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import Proof, prove
from optin_deploy.data.feeds import Halves, check_runs
from optin_deploy.data.rows import Feeds
from optin_deploy.errors import BadInput
from optin_deploy.jobs.networks import Found
from optin_deploy.jobs.planning import given
from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import hash_of
from optin_deploy.network.run import Program
from optin_deploy.network_quality import NetworkJudge, readouts
from optin_deploy.planning.costs import Limit, costs_of, limits_within
from optin_deploy.planning.plan import NetworkPlan, Origin, plan_of
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.planning.widths import Choice, Keep, check_choice, choose
from optin_deploy.progress import Progress, Stage, silent, silent_stage
from optin_deploy.quality import Quality
from optin_deploy.scoring.hearing import token_weights
from optin_deploy.scoring.reading import Kind
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.storage import sha256_json
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find


@dataclass(frozen=True)
class Recipe:
    """How a network is made smaller."""

    limits: Limits = field(default_factory=Limits)
    """Of multiply-accumulates, parameters and bytes."""
    choice: Choice = field(default_factory=Choice)
    scoring: ScoreSettings = field(default_factory=ScoreSettings)
    compensation: bool = True
    output: str | None = None
    """Which output is compared; None: see `scoring.reading.reading_of`."""
    read_as: Kind | None = None
    """How it is compared; None: by what makes it."""


@dataclass(frozen=True, eq=False)
class PrunedNetwork:
    """A smaller network, and how it came to be."""

    network: Network
    dense: Network
    """What it was cut from, of the same shape as the given one, with the weights that were repaired."""
    plan: NetworkPlan
    scores: UnitScores
    compensation: Compensation | None
    proof: Proof
    quality: Quality | None
    """On rows that nothing learned from; None: there are none."""


@dataclass(frozen=True, eq=False)
class Ready:
    """A network with its data and what is asked; everything checked that can be without the work."""

    found: Found
    rows: Halves
    recipe: Recipe
    subject: Subject
    limits: tuple[Limit, ...]

    @cached_property
    def key(self) -> str:
        """Hash of all that scores depend on."""
        recipe, fingerprint = self.recipe, self.rows.calibration.fingerprint
        reading = asdict(self.subject.reading)
        how = [asdict(recipe.scoring), recipe.choice.kinds, reading]
        return sha256_json([self.subject.hash, fingerprint, *how])


def ready(found: Found, rows: Halves, recipe: Recipe) -> Ready:
    """Check that network, data and budget fit together.

    Args: found: the network with its groups, as `jobs.networks.find_in` returns it. rows: that teach, and that judge.
    Raises: BadInput, InfeasibleBudget.
    """
    subject = Subject.of(found.layout, output=recipe.output, kind=recipe.read_as)
    limits = tuple(limits_within(costs_of(found.layout, sizes_of(found, rows.calibration)), recipe.limits))
    check_choice(found.layout, limits, recipe.choice)
    check_runs(subject.program, rows.calibration)
    return Ready(found, rows, recipe, subject, limits)


def scored(
    asked: Ready, known: UnitScores | None = None, *, memory_budget: int | None = None, progress: Progress = silent
) -> UnitScores:
    """Score the units.

    Args: known: scores of an earlier run; they are returned if they were made of the same in the same way.
        memory_budget: bytes that scoring may take; None: most of what is free.
    Raises: BadInput, NonFiniteActivation: data and network do not fit.
    """
    if known is not None and known.provenance.get("key") == asked.key:
        return known
    recipe, batches = asked.recipe, asked.rows.calibration.batches
    how = {"kinds": recipe.choice.kinds, "memory_budget": memory_budget, "progress": progress}
    found = score_units(asked.subject, batches, recipe.scoring, **how)  # type: ignore[arg-type]
    return replace(found, provenance={**found.provenance, "key": asked.key})


Pick = Callable[[Sequence[Limit]], Keep]
"""What stays within more limits, beside those that hold anyway."""


def prune_network(
    asked: Ready, scores: UnitScores, *, chosen: Callable[[Pick], Keep] | None = None, stage: Stage = silent_stage
) -> PrunedNetwork:
    """Make a network smaller; the given one is untouched.

    Args: scores: what `scored` returns.
        chosen: picks what stays, for limits of its own such as time; None: within the recipe's.
    Raises: BadInput, NonFiniteActivation: data and network do not fit. NotProven: our fault.
    """
    found, rows, recipe, subject = asked.found, asked.rows, asked.recipe, asked.subject
    batches = rows.calibration.batches
    numbers = {name: values.numpy() for name, values in scores.scores.items()}
    by_curves = recipe.choice.allocation == "curves"
    weights = token_weights(subject, batches) if recipe.compensation or by_curves else None
    curves = None
    if by_curves:
        with stage("curves") as progress:
            curves = unit_curves(
                *(subject, scores.scores, batches),
                kinds=recipe.choice.kinds,
                token_weights=weights,
                progress=progress,
            )
    pick = partial(_kept, asked, numbers, curves)
    keep = pick(()) if chosen is None else chosen(pick)
    repaired = None
    if recipe.compensation:
        with stage("compensate") as progress:
            repaired = compensated(subject, keep, batches, token_weights=weights, progress=progress)
    with stage("cut and prove"):
        dense = found.network if repaired is None else repaired.network
        layout = found.layout if repaired is None else find(dense, found.probes)
        smaller = cut(layout, keep)
        proof = prove(layout, keep, smaller, found.probes)
    quality = None
    if rows.held_out is not None:
        with stage("judge"):
            quality = _quality(subject, smaller, rows.held_out)
    return PrunedNetwork(smaller, dense, _plan(asked, keep, numbers), scores, repaired, proof, quality)


def _kept(
    asked: Ready, scores: Mapping[str, np.ndarray], curves: Mapping[str, Curve] | None, more: Sequence[Limit]
) -> Keep:
    """What stays; by curves a branch that the stream goes around may go as a whole, where a cut can do that."""
    layout, limits, choice = asked.found.layout, (*asked.limits, *more), asked.recipe.choice
    if curves is None:
        return choose(layout, scores, limits, choice)
    keep = choose(layout, scores, limits, choice, curves=curves, emptying=bypassed(layout))
    if all(keep.values()):
        return keep
    try:
        cut(layout, keep)
    except BadInput:
        return choose(layout, scores, limits, choice, curves=curves)
    return keep


def sizes_of(found: Found, rows: Feeds) -> dict[Axis, int]:
    """Sizes of the free axes of the inputs for one of the widest rows; what follows from them is counted so too."""
    widest = rows.widest
    sizes: dict[Axis, int] = {}
    for port in found.network.inputs:
        for place, axis in enumerate(found.layout.structure.axes.get(port.name, ())):
            free = port.shape is not None and isinstance(port.shape[place], str)
            if free and axis.kind == "leaf":
                sizes[axis.root] = widest[port.name].shape[place] if place else 1
    return sizes


def _quality(subject: Subject, smaller: Network, rows: Feeds) -> Quality:
    judge = NetworkJudge(readouts(subject.program, subject.reading, rows), rows)
    return judge.of(readouts(Program(smaller), subject.reading, rows))


def _plan(asked: Ready, keep: Keep, scores: Mapping[str, np.ndarray]) -> NetworkPlan:
    recipe, layout = asked.recipe, asked.found.layout
    settings: dict[str, Any] = {"limits": given(recipe.limits), **asdict(recipe.choice)}
    origin = Origin(recipe.scoring.scorer, hash_of(scores))
    return plan_of(layout, keep, settings, origin, sizes=sizes_of(asked.found, asked.rows.calibration))
