"""The main job behind `optin-export`: score, plan, rewrite, export, prove, measure, report; and its export alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from optin_deploy.checkpoint.smaller import MANIFEST, read_saved
from optin_deploy.common.environment import environment
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import QualityLimit
from optin_deploy.exporters import check_precision, exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.exporters.passes.pooled import check_pool
from optin_deploy.exporters.tensorrt_plan import EngineOptions
from optin_deploy.exporters.to_onnx import check_size
from optin_deploy.feeds.pooling import POOLED, pooling_in
from optin_deploy.feeds.rows import MASK, Feeds, rows_of
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.files.storage import read_tensors, write_json, write_tensors, write_text
from optin_deploy.jobs.bench import inputs_in, measure
from optin_deploy.jobs.building import Built, build, check_free_sizes, forms_in, int8_samples
from optin_deploy.jobs.clock import Clock
from optin_deploy.jobs.float32_dense import measure_beside_float32
from optin_deploy.jobs.origin import check_origin
from optin_deploy.jobs.profiling import read_table, table_at
from optin_deploy.jobs.proving import check_engine
from optin_deploy.jobs.request import Asked, Request, ready
from optin_deploy.jobs.stage_memory import over_budget, resident_bytes
from optin_deploy.jobs.stages import Planner, Prepared, Rewritten, dense_stage, prepare, rewrite_stage, score_stage
from optin_deploy.jobs.sweep import measure_curves, planned
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.time_rounds import LastWord, Round, judged
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.jobs.yardstick import inputs_of, yardstick
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.network.sealed import finished
from optin_deploy.network.unused import tidied
from optin_deploy.planning.plan import PlanCost, told_merges
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.report import Report, to_markdown
from optin_deploy.scoring.losses import Readout

log = logging.getLogger(__name__)

INPUT = "input."
"""Start of the names of recorded inputs."""
RECORDED = 8
"""Samples kept with their outputs, for parity on the target."""
LATENCY = "latency.json"
"""The latency table of an output folder."""


def export_model(request: Request, out: Path, *, force: bool = False, stage: Stage = silent_stage) -> Report:
    """Prune a network end to end; everything it makes lies in `out`, finished stages are reused.

    Args: stage: draws progress.
    Raises: OptinError kinds. CannotBuildHere comes last, when all that can be written here is written.
    """
    clock, limits = Clock(stage), request.limits
    with clock("load"):
        asked = ready(request, out)
        workspace = Workspace.claim(out, request.source, force=force)
    prepared, loaded_bytes = asked.prepared, resident_bytes()
    with clock("score") as progress:
        dense_stage(workspace, prepared)
        budget = request.memory_budget
        score_stage(workspace, prepared, request.scoring, memory_budget=budget, progress=progress)
    planner, rounds = Planner(workspace, prepared, asked.choice), list[Round]()
    if limits.time is None:
        planned(planner, limits, compensation=request.compensation, stage=clock)
    else:
        rounds = _plan_in_time(asked, planner, clock)
    with clock("rewrite") as progress:
        made = rewrite_stage(workspace, prepared, compensation=request.compensation, progress=progress)
    with clock("export"):
        forms = forms_in(workspace, request.pool, dense=request.dense)
        built = build(workspace, asked.target, asked.spec, forms)
    with clock("check"):
        parity = check_engine(built, forms, prepared.ready.rows.calibration.batches)
        quality = _quality(prepared, made.network, built)
        record_samples(workspace, prepared, made.network)
    latency = _measured(asked, built, made, clock)
    verdict = None if limits.time is None else judged(limits.time, latency[0])
    parity = {"masked_vs_rewritten": made.error, **parity}
    notes = [*_notes(asked, made, built, rounds, quality), *_over_budget(clock, loaded_bytes, budget)]
    report = _report(asked, made, built, quality, parity, latency, clock, workspace.model_folder)
    if verdict is not None:
        tried = [asdict(each) for each in rounds]
        report = replace(report, settings={**report.settings, "rounds": tried})
        notes.append(verdict.sentence)
    report = replace(report, notes=notes)
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", to_markdown(report))
    _last_word(request, built, quality, verdict)
    return report


def _plan_in_time(asked: Asked, planner: Planner, clock: Clock) -> list[Round]:
    """Write the plan whose time was measured, and what was tried on the way."""
    request, workspace = asked.request, planner.workspace
    measure_curves(planner, clock)
    with yardstick(asked.prepared, asked.target, asked.spec, request.points[0], threads=request.threads) as yard:
        if request.table is not None:
            table = read_table(request.table, yard, asked.choice)
        else:
            with clock("profile") as progress:
                table = table_at(workspace.root / LATENCY, yard, asked.choice, progress=progress)
        plan, rounds = Planning(planner, yard, request.limits, request.compensation, clock).within(table)
    plan.write(workspace.root / "plan.json")
    return rounds


def _measured(asked: Asked, built: Built, made: Rewritten, clock: Clock) -> list[Measurement]:
    """Dense against pruned at all points, where the engine runs here."""
    request, pair = asked.request, built.pairs[-1] if built.pairs else None
    if pair is None or built.obstacle is not None or not request.dense:
        return []
    inputs = replace(inputs_of(asked.prepared), plan=made.plan)
    how: dict[str, Any] = {"threads": request.threads, "stage": clock}
    dense = pair.dense.path if pair.dense else Path(request.source.model)
    found = measure(
        *(pair.engine, dense, pair.pruned.path, inputs, request.points),
        precision=pair.precision,
        task=request.source.task,
        **how,
    )
    return found + measure_beside_float32(built, inputs, request.source, request.points, **how)


def build_folder(
    folder: Path,
    *,
    engine: str,
    precision: str | None = None,
    pool: str | None = None,
    options: EngineOptions | None = None,
    dense: bool = True,
    dry_run: bool = False,
) -> Built | None:
    """Export the networks in an output folder and prove the artifacts.

    Args: dry_run: only check that it could be done; returns None.
    """
    target = exporter(engine)
    precision = check_precision(target, precision)
    options = options or EngineOptions()
    target.check(options, pool)
    workspace = Workspace(folder)
    workspace.read_plan()
    path = workspace.root / PRUNED
    network = read_file(path)
    check_origin(path, "pruned")
    if pool is not None:
        check_pool(tidied(network, without=POOLED), pool, pooling_in(workspace.model_folder))
    if target.has_profiles:
        check_free_sizes(network, engine)
    if target.reads_onnx:
        check_size(network, precision)
    samples = _int8_samples(workspace) if precision == "int8" else ()
    if dense and finished(folder / DENSE) is None:
        prepared = prepare(workspace.source(), folder)
        if not dry_run:
            dense_stage(workspace, prepared)
    if dry_run:
        return None
    spec = ExportSpec(precision, pool, options, samples, of_module=not target.reads_onnx)
    forms = forms_in(workspace, pool, dense=dense)
    built = build(workspace, target, spec, forms)
    check_engine(built, forms, [recorded(workspace)])
    return built


def _int8_samples(workspace: Workspace) -> Sequence[Any]:
    """Calibration rows of a job; they and the dense network must be there."""
    ready = prepare(workspace.source(), workspace.root).ready
    return int8_samples(ready.rows.calibration.batches, [port.name for port in ready.network.inputs])


def recorded(workspace: Workspace) -> dict[str, torch.Tensor]:
    """The inputs in samples.safetensors; where a stage before them was the last, random ones."""
    path = workspace.root / "samples.safetensors"
    if path.is_file():
        tensors = read_tensors(path, f"Write it with `optin-export MODEL --out {workspace.root}`.")
        return {name.removeprefix(INPUT): value for name, value in tensors.items() if name.startswith(INPUT)}
    inputs = inputs_in(workspace)
    return {name: torch.from_numpy(value) for name, value in inputs.feeds(Point(RECORDED)).items()}


def _quality(prepared: Prepared, smaller: Network, built: Built) -> Quality:
    """Of the asked engine's own outputs where it runs here in any shape, else of our own run."""
    pair, ready = built.pairs[-1] if built.pairs else None, prepared.ready
    if pair is None or built.obstacle is not None or pair.pruned.shapes:
        return ready.quality_of(smaller)
    held_out, reading = ready.rows.held_out, ready.subject.reading
    assert held_out is not None, "rows that judge were asked for"
    names = [port.name for port in smaller.inputs]

    def readouts(rows: Feeds) -> Any:
        with pair.engine.open(pair.pruned.path, precision=pair.precision) as runtime:
            for batch in rows.batches:
                found = runtime.run({name: batch[name].numpy() for name in names})
                values = {name: torch.from_numpy(value) for name, value in found.items()}
                mask = batch.get(MASK)
                readout: Readout = reading.read(values, mask if mask is not None and mask.dim() == 2 else None)
                yield readout

    return ready.judge.of(readouts(held_out))


def _report(
    asked: Asked,
    made: Rewritten,
    built: Built,
    quality: Quality,
    parity: Mapping[str, float],
    latency: Sequence[Measurement],
    clock: Clock,
    folder: Path,
) -> Report:
    plan, ready, request = made.plan, asked.prepared.ready, asked.request
    cost = plan.cost
    assert cost is not None, "plans of jobs tell what they cost"
    kept = {group.name: len(plan.keep.get(group.name, range(group.units))) for group in ready.layout.groups}
    groups = [
        {"name": group.name, "kind": group.kind, "kept": kept[group.name], "units": group.units}
        for group in ready.layout.groups
    ]
    settings = {
        **asdict(request.source),
        **asdict(request.limits),
        "engine": request.engine,
        "precision": asked.spec.precision,
        "scoring": {**asdict(request.scoring), "seed": request.source.seed},
        **asdict(asked.choice),
        "compensation": request.compensation,
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
    )


def _params(folder: Path, cost: PlanCost) -> dict[str, int]:
    """Parameters of the transformers model in model/, else entries of the tensors that the graph reads."""
    if (folder / MANIFEST).is_file():
        return asdict(read_saved(folder)[0].params)
    return {"dense": cost.weights_dense, "pruned": cost.weights_pruned}


def _macs(prepared: Prepared, cost: PlanCost, merges: tuple[int, ...]) -> dict[str, float]:
    """Multiply-accumulates, what part of them stays, and what part of those that any group could lose."""
    macs = prepared.ready.costs_with(merges).macs
    fixed = macs.of({group.name: 0 for group in prepared.ready.layout.groups})
    dense, pruned = cost.macs_dense, cost.macs_pruned
    return {
        "dense": dense,
        "pruned": pruned,
        "kept": pruned / max(1, dense),
        "prunable_kept": (pruned - fixed) / max(1, dense - fixed),
    }


def record_samples(
    workspace: Workspace,
    prepared: Prepared,
    smaller: Network,
    *,
    dense: Network | None = None,
    output: str | None = None,
) -> None:
    """Keep 8 inputs that judge with the outputs of both networks, for parity on the target.

    Args: dense, output: the dense network, and what is compared; None: those of the job.
    """
    rows = prepared.ready.rows.held_out or prepared.ready.rows.calibration
    most = max(rows.batches, key=lambda batch: min(rows_of(batch), RECORDED))  # the last one may be short
    batch = {name: value if name in rows.shared else value[:RECORDED] for name, value in most.items()}
    networks = {"dense": dense or prepared.ready.network, "pruned": smaller}
    names = [port.name for port in smaller.inputs]
    tensors = {f"{INPUT}{name}": batch[name].contiguous() for name in names}
    for role, network in networks.items():
        with torch.inference_mode():
            outputs = Program(network)({name: batch[name] for name in names}).outputs
        tensors |= {f"{role}.{name}": value.contiguous() for name, value in outputs.items()}
    known = finished(workspace.root / PRUNED)
    assert known is not None, "the rewrite stage wrote it"
    output = output or prepared.ready.subject.reading.output
    write_tensors(workspace.root / "samples.safetensors", tensors, {"model": known.key, "output": output})


def _notes(asked: Asked, made: Rewritten, built: Built, rounds: Sequence[Round], quality: Quality) -> list[str]:
    notes, request = [], asked.request
    if request.limits.max_drop is not None:
        notes.append(
            f"The budget was chosen by `--max-drop {request.limits.max_drop:g}` on the rows that quality is told of"
            + (
                "."
                if quality.metric == "mean_iou"
                else f"; one of the {quality.samples} rows is {100 / quality.samples:.2f} points."
            )
        )
    if rounds:
        told = ", ".join(f"{each.measured_ms:.3g}" for each in rounds)
        notes.append(
            f"Planned for `{request.limits.time}` by a latency table; plans that were measured took {told} ms."
        )
    if request.source.calibration is None:
        notes.append("Calibrated on the small bundled set: accuracy needs your own data (`--calibration FILE`).")
    if not request.compensation:
        notes.append("Nothing was compensated (--no-compensation).")
    elif made.skipped:
        told = "; ".join(made.skipped)
        notes.append(f"{sum(made.skipped.values())} products could not be repaired: {told}.")
    if any(made.plan.merges):
        notes.append(f"{told_merges(made.plan.merges, of_text=made.plan.of_text)}.")
    if made.why_graph:
        notes.append(f"There is no `model/`: {made.why_graph}. `optin_deploy.load` gives the graph as a torch module.")
    if built.problem is not None:
        notes.append(f"The engine could not be built here. {built.problem}")
    elif built.obstacle is not None:
        notes.append(f"{built.pairs[-1].pruned.path.name} was built but not run here: {built.obstacle}.")
    return notes


def _over_budget(clock: Clock, before: int, budget: int | None) -> list[str]:
    """The sentence for stages that took more than `--memory-budget` beyond the loaded model, if there were any."""
    over = over_budget(clock.memory.peaks, before, budget)
    if budget is None or not over:
        return []
    told = ", ".join(f"{title} {size / 2**20:.0f} MiB" for title, size in over.items())
    sentence = (
        f"--memory-budget {budget / 2**20:.0f}MiB bounds scoring; these stages took more beyond the model: {told}."
    )
    log.warning(sentence)
    return [sentence]


def _last_word(request: Request, built: Built, quality: Quality, verdict: LastWord | None) -> None:
    """Raise what was found wrong, when all that can be written is written."""
    if built.problem is not None:
        raise built.problem
    if verdict is not None:
        verdict.check()
    drop = request.limits.max_drop
    if drop is not None and not quality.holds(drop):  # the engine's own precision costs more
        raise QualityLimit(
            f"--max-drop {drop:g}: the model held it, but {request.engine} in {built.pairs[-1].precision} does not "
            f"({quality}). Allow more, or use a higher --precision. The artifacts are written."
        )
