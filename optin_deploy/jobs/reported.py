"""What a finished job reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from optin_deploy.checkpoint.smaller import MANIFEST, read_saved
from optin_deploy.common.environment import environment
from optin_deploy.jobs.building import Built
from optin_deploy.jobs.checked import CheckedJob
from optin_deploy.jobs.clock import Clock
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.stages import StoredCut
from optin_deploy.jobs.time_rounds import Round
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.planning.plan import PlanCost, describe_merges
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.report import Report, tuned_lines

MUCH_BELOW = 0.9
"""A plan that keeps less than this part of its budget is told of."""


def report_of(
    asked: CheckedJob,
    made: StoredCut,
    built: Built,
    quality: Quality,
    parity: Mapping[str, float],
    latency: Sequence[Measurement],
    clock: Clock,
    folder: Path,
) -> Report:
    """Return the report of a job, without its notes."""
    plan, ready, job = made.plan, asked.prepared.ready, asked.job
    cost = plan.cost
    assert cost is not None, "plans of jobs tell what they cost"
    kept = {group.name: len(plan.keep.get(group.name, range(group.units))) for group in ready.layout.groups}
    groups = [
        {"name": group.name, "kind": group.kind, "kept": kept[group.name], "units": group.units}
        for group in ready.layout.groups
    ]
    settings = {
        **asdict(job.source),
        **asdict(job.limits),
        "engine": job.engine,
        "precision": asked.spec.precision,
        "scoring": {**asdict(job.scoring), "seed": job.source.seed},
        **asdict(asked.choice),
        "compensation": job.compensation,
        "counted_at": cost.inputs,
        "calibration_fingerprint": ready.rows.calibration.fingerprint,
    }
    return Report(
        quality=quality,
        params=_params(folder, cost),
        macs=_macs(asked.prepared, cost, plan.merges),
        size_bytes=built.sizes(),
        parity=parity,
        latency=latency,
        heads=[kept[group.name] for group in ready.layout.groups if group.kind in ("heads", "groups")],
        neurons=[kept[group.name] for group in ready.layout.groups if group.kind == "neurons"],
        groups=groups,
        environment=environment(),
        hashes={"plan": plan.hash, "network": plan.network or "", **built.hashes()},
        seconds=clock.seconds,
        memory=clock.memory.peaks,
        settings=settings,
        tuned=made.tuned,
    )


def _far_below(asked: CheckedJob, made: StoredCut) -> list[str]:
    """Say so if much less stays than may."""
    cost, share, choice = made.plan.cost, asked.job.limits.flops, asked.choice
    kinds = {group.kind for group in asked.prepared.ready.layout.groups if group.kind in choice.kinds}
    given = [f"{kind} in multiples of {choice.multiple(kind)}" for kind in sorted(kinds) if choice.multiple(kind) > 1]
    if cost is None or share is None or not given or cost.macs_pruned > MUCH_BELOW * share * cost.macs_dense:
        return []
    return [f"Less stays than the {share:.0%} of the MACs that may: {', '.join(given)} alone; `--align 1` keeps more."]


def _params(folder: Path, cost: PlanCost) -> dict[str, int]:
    """Parameters of the transformers model in model/, else entries of the tensors that the graph reads."""
    if (folder / MANIFEST).is_file():
        return asdict(read_saved(folder)[0].params)
    return {"dense": cost.weights_dense, "pruned": cost.weights_pruned}


def _macs(prepared: Prepared, cost: PlanCost, merges: tuple[int, ...]) -> dict[str, float]:
    """Multiply-accumulates, what part of them stays, and what part of those that any group could lose."""
    macs = prepared.ready.costs_with(merges).macs
    fixed = macs.total({group.name: 0 for group in prepared.ready.layout.groups})
    dense, pruned = cost.macs_dense, cost.macs_pruned
    return {
        "dense": dense,
        "pruned": pruned,
        "kept": pruned / max(1, dense),
        "prunable_kept": (pruned - fixed) / max(1, dense - fixed),
    }


def notes_of(asked: CheckedJob, made: StoredCut, built: Built, rounds: Sequence[Round], quality: Quality) -> list[str]:
    """Return the sentences that people should read beside the figures."""
    notes, job = [], asked.job
    if job.limits.max_drop is not None:
        notes.append(
            f"The budget was chosen by `--max-drop {job.limits.max_drop:g}` on the rows that quality is told of"
            + (
                "."
                if quality.metric == "mean_iou"
                else f"; one of the {quality.samples} rows is {100 / quality.samples:.2f} points."
            )
        )
    notes += _far_below(asked, made)
    if made.tuned is not None:
        notes += tuned_lines(made.tuned)
    if rounds:
        times = ", ".join(f"{each.measured_ms:.3g}" for each in rounds)
        notes.append(f"Planned for `{job.limits.time}` by a latency table; plans that were measured took {times} ms.")
    if job.source.calibration is None:
        notes.append("Calibrated on the small bundled set: accuracy needs your own data (`--calibration FILE`).")
    if not job.compensation:
        notes.append("Nothing was compensated (--no-compensation).")
    elif made.skipped:
        reasons = "; ".join(made.skipped)
        notes.append(f"{sum(made.skipped.values())} products could not be repaired: {reasons}.")
    if any(made.plan.merges):
        notes.append(f"{describe_merges(made.plan.merges, of_text=made.plan.of_text)}.")
    if made.why_graph:
        notes.append(f"There is no `model/`: {made.why_graph}. `optin_deploy.load` gives the graph as a torch module.")
    if built.problem is not None:
        notes.append(f"The engine could not be built here. {built.problem}")
    elif built.obstacle is not None:
        notes.append(f"{built.pairs[-1].pruned.path.name} was built but not run here: {built.obstacle}.")
    return notes
