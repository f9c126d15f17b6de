"""The main job behind `optin-export`: score, plan, rewrite, export, prove, measure, report; and its export alone."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import QualityLimit
from optin_deploy.files.names import JOB
from optin_deploy.files.storage import write_json, write_text
from optin_deploy.jobs.artifact_quality import artifact_qualities, quality_of
from optin_deploy.jobs.bench import measure
from optin_deploy.jobs.building import Built, build, forms_in
from optin_deploy.jobs.checked import CheckedJob, checked_job
from optin_deploy.jobs.clock import Clock
from optin_deploy.jobs.float32_dense import measure_beside_float32
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.profiling import read_table, table_at
from optin_deploy.jobs.proving import check_engine
from optin_deploy.jobs.reported import notes_of, report_of
from optin_deploy.jobs.samples import record_samples
from optin_deploy.jobs.stage_memory import over_budget, resident_bytes
from optin_deploy.jobs.stages import StoredCut, dense_stage, rewrite_stage, score_stage
from optin_deploy.jobs.sweep import measure_curves, planned
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.time_rounds import Round, TimeVerdict, verdict_on
from optin_deploy.jobs.tune_stage import tune_stage
from optin_deploy.jobs.width_timer import inputs_of, width_timer
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.artifacts import Opening
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.artifact_table import artifact_warnings
from optin_deploy.reporting.report import Report, to_markdown

log = logging.getLogger(__name__)

LATENCY = "latency.json"
"""The latency table of an output folder."""


def export_model(
    job: Job, out: Path, *, options: str | None = None, force: bool = False, stage: Stage = silent_stage
) -> Report:
    """Prune a network end to end; everything it makes lies in `out`, finished stages are reused.

    Args: options: text of job.toml, which is written once the folder is this job's; None: there is none. stage: draws
        progress.
    Raises: OptinError kinds. CannotBuildHere comes last, when all that can be written here is written.
    """
    clock, limits = Clock(stage), job.limits
    with clock("load"):
        asked = checked_job(job, out)
        workspace = Workspace.claim(out, job.source, force=force)
        if options is not None:
            write_text(out / JOB, options)
    prepared, loaded_bytes = asked.prepared, resident_bytes()
    with clock("score") as progress:
        dense_stage(workspace, prepared)
        budget = job.memory_budget
        score_stage(workspace, prepared, job.scoring, memory_budget=budget, progress=progress)
    planner, rounds = Planner(workspace, prepared, asked.choice), list[Round]()
    if limits.time is None:
        planned(planner, limits, compensation=job.compensation, stage=clock)
    else:
        rounds = _plan_in_time(asked, planner, clock)
    with clock("rewrite") as progress:
        made = rewrite_stage(workspace, prepared, compensation=job.compensation, tuning=job.tuning, progress=progress)
    if job.tuning is not None:
        with clock("tune") as progress:
            made = tune_stage(workspace, prepared, made, job.tuning, progress=progress)
    with clock("export"):
        forms = forms_in(workspace, asked.spec.head, dense=job.dense)
        built = build(workspace, asked.target, asked.spec, forms)
    with clock("check"):
        parity = check_engine(built, forms, prepared.ready.rows.calibration.batches)
        quality = quality_of(prepared, made.network, built)
        artifacts, left_out = artifact_qualities(prepared, made.network, built, quality)
        record_samples(workspace, prepared, made.network)
    latency = _measured(asked, built, made, clock)
    verdict = None if limits.time is None else verdict_on(limits.time, latency[0])
    parity = {"masked_vs_rewritten": made.error, **parity}
    notes = [*notes_of(asked, made, built, rounds, quality), *artifact_warnings(artifacts), *left_out]
    notes += _over_budget(clock, loaded_bytes, budget)
    report = report_of(asked, made, built, quality, parity, latency, clock, workspace.model_folder)
    if verdict is not None:
        tried = [asdict(each) for each in rounds]
        report = replace(report, settings={**report.settings, "rounds": tried})
        notes.append(verdict.sentence)
    report = replace(report, notes=notes, artifacts=artifacts)
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", to_markdown(report))
    _last_word(job, built, quality, verdict)
    return report


def _plan_in_time(asked: CheckedJob, planner: Planner, clock: Clock) -> list[Round]:
    """Write the plan whose time was measured, and what was tried on the way."""
    job, workspace = asked.job, planner.workspace
    measure_curves(planner, clock)
    with width_timer(asked.prepared, asked.target, asked.spec, job.points[0], threads=job.threads) as yard:
        if job.table is not None:
            table = read_table(job.table, yard, asked.choice)
        else:
            with clock("profile") as progress:
                table = table_at(workspace.root / LATENCY, yard, asked.choice, progress=progress)
        plan, rounds = Planning(planner, yard, job.limits, job.compensation, clock).within(table)
    plan.write(workspace.root / "plan.json")
    return rounds


def _measured(asked: CheckedJob, built: Built, made: StoredCut, clock: Clock) -> list[Measurement]:
    """Dense against pruned at all points, where the engine runs here."""
    job, pair = asked.job, built.pairs[-1] if built.pairs else None
    if pair is None or built.obstacle is not None or not job.dense:
        return []
    inputs = replace(inputs_of(asked.prepared), plan=made.plan)
    path = pair.dense.path if pair.dense else Path(job.source.model)
    dense = Opening(pair.engine, path, pair.precision, job.threads, job.source.task)
    smaller = Opening(pair.engine, pair.pruned.path, pair.precision, job.threads)
    found = measure(dense, smaller, inputs, job.points, stage=clock)
    return found + measure_beside_float32(built, inputs, job.source, job.points, threads=job.threads, stage=clock)


def _over_budget(clock: Clock, before: int, budget: int | None) -> list[str]:
    """The sentence for stages that took more than `--memory-budget` beyond the loaded model, if there were any."""
    over = over_budget(clock.memory.peaks, before, budget)
    if budget is None or not over:
        return []
    listed = ", ".join(f"{title} {size / 2**20:.0f} MiB" for title, size in over.items())
    sentence = (
        f"--memory-budget {budget / 2**20:.0f}MiB bounds scoring; these stages took more beyond the model: {listed}."
    )
    log.warning(sentence)
    return [sentence]


def _last_word(job: Job, built: Built, quality: Quality, verdict: TimeVerdict | None) -> None:
    """Raise what was found wrong, when all that can be written is written."""
    if built.problem is not None:
        raise built.problem
    if verdict is not None:
        verdict.check()
    drop = job.limits.max_drop
    if drop is not None and not quality.holds(drop):  # the engine's own precision costs more
        raise QualityLimit(
            f"--max-drop {drop:g}: the model held it, but {job.engine} in {built.pairs[-1].precision} does not "
            f"({quality}). Allow more, or use a higher --precision. The artifacts are written."
        )
