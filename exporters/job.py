"""The main job behind `optin-export`: score, plan, rewrite, export, prove, measure, report; and its export alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters import check_precision, exporter
from exporters.base import ExportSpec, output_names
from exporters.bench.float32_dense import measure_beside_float32
from exporters.bench.measuring import Point, measure
from exporters.bench.time_budget import Round, judged, plan_in_time
from exporters.bench.yardstick import yardstick
from exporters.building import Built, build, int8_samples
from exporters.clock import Clock
from exporters.onnx_artifact import WITH_SHAPES
from exporters.proving import EngineModel, check_engine
from exporters.ready import check_measured, ready
from exporters.tensorrt_plan import EngineOptions
from exporters.to_onnx import check_size
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement, Report, to_markdown
from optin_deploy.budget import Limits, TimeTarget
from optin_deploy.errors import PlanMismatch, QualityLimit
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference, rows_of
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.pruned import PrunedModel, load_pruned, read_saved
from optin_deploy.quality import Quality
from optin_deploy.rewrite.verify import main_output
from optin_deploy.scoring import ScoreSettings
from optin_deploy.search import default_align
from optin_deploy.stage_memory import over_budget, resident_bytes
from optin_deploy.stages import Prepared, prepare, rewrite_stage, score_stage
from optin_deploy.storage import sha256_tensors, write_json, write_tensors, write_text
from optin_deploy.sweep import planned
from optin_deploy.workspace import Source, Workspace

log = logging.getLogger(__name__)

RECORDED = 8
"""Samples kept with their outputs, for parity on the target."""


def export_model(
    source: Source,
    out: Path,
    *,
    limits: Limits | None = None,
    engine: str = "onnx",
    precision: str | None = None,
    align: int | None = None,
    allocation: str = "curves",
    scoring: ScoreSettings | None = None,
    memory_budget: int | None = None,
    compensation: bool = True,
    points: Sequence[Point] = (Point(),),
    threads: int = 0,
    table: Path | None = None,
    pool: str | None = None,
    options: EngineOptions | None = None,
    dense: bool = True,
    force: bool = False,
    stage: Stage = silent_stage,
) -> Report:
    """Prune a model end to end; everything it makes lies in `out`, finished stages are reused.

    Args:
        limits: what may stay; default: 60% of the MACs.
        align: neurons in multiples of this; default: what the engine likes.
        scoring: how units are scored.
        memory_budget: bytes that scoring may take beyond the model; default: most of what is free. Of the other stages
            the report says which took more.
        points: where dense and pruned are measured against each other; none if `dense` is False.
        threads: intra-op threads of the engine; 0 = its default.
        table: latency table for `limits.time`; default: latency.json in `out`, measured if need be.
        options: how TensorRT builds its plan.
        stage: draws progress.
    Raises: OptinError kinds. CannotBuildHere comes last, when all that can be written here is written.
    """
    clock, limits = Clock(stage), limits or Limits()
    check_measured(limits, points, dense=dense)
    with clock("load"):
        target, spec, prepared = ready(
            source,
            limits=limits,
            engine=engine,
            precision=precision,
            align=align,
            allocation=allocation,
            points=points,
            threads=threads,
            table=table,
            pool=pool,
            options=options,
        )
        workspace = Workspace.claim(out, source, force=force)
    loaded_bytes = resident_bytes()
    scoring = replace(scoring or ScoreSettings(), seed=source.seed)
    with clock("score") as progress:
        score_stage(workspace, prepared, scoring, memory_budget=memory_budget, progress=progress)
    align = default_align(prepared.layout, target.align) if align is None else align
    how: dict[str, Any] = {"align": align, "allocation": allocation, "compensation": compensation}
    rounds: list[Round] = []
    if limits.time is None:
        planned(workspace, prepared, limits, **how, stage=clock)
    else:
        with yardstick(prepared, target, spec, points[0], threads=threads, align=align, home=workspace.root) as yard:
            rounds = plan_in_time(
                workspace, limits, yard, table, allocation=allocation, compensation=compensation, stage=clock
            )
    with clock("rewrite") as progress:
        pruned, _ = rewrite_stage(workspace, prepared, compensation=compensation, progress=progress)
    with clock("export"):
        built = build(workspace, target, spec, pruned.model, prepared.loaded.model if dense else None)
    with clock("check"):
        samples = spec.calibration
        parity = check_engine(built, pruned.model, prepared.loaded.model, seq_len=source.seq_len, samples=samples)
        quality = _quality(prepared, pruned.model, built)
        saved, _, _ = read_saved(workspace.model_folder)
        record_samples(workspace, prepared, pruned.model, saved.weights_sha256)
    asked = built.pairs[-1]
    measured_at = points if dense and built.obstacle is None else ()
    latency = measure(
        asked.engine,
        asked.dense.path if asked.dense else Path(source.model),
        asked.pruned.path,
        pruned,
        measured_at,
        precision=asked.precision,
        threads=threads,
        task=source.task,
        stage=clock,
    )
    latency += measure_beside_float32(built, pruned, source, measured_at, threads=threads, stage=clock)
    settings = {
        **asdict(limits),
        "engine": engine,
        "precision": spec.precision,
        "scoring": asdict(scoring),
        **how,
        "rounds": [asdict(each) for each in rounds],
        "onnx_shapes": WITH_SHAPES,
    }
    verdict = None if limits.time is None else judged(limits.time, latency[0])
    report = _report(prepared, pruned, built, quality, parity, latency, clock, settings)
    report = replace(report, notes=(*report.notes, *_over_budget(report.memory, loaded_bytes, memory_budget)))
    if verdict is not None:
        report = replace(report, notes=(*report.notes, verdict.sentence))
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", to_markdown(report))
    if built.problem is not None:
        raise built.problem
    if verdict is not None:
        verdict.check()
    if limits.max_drop is not None and not quality.holds(limits.max_drop):  # the engine's own precision costs more
        raise QualityLimit(
            f"--max-drop {limits.max_drop:g}: the model held it, but {engine} in {asked.precision} does not "
            f"({quality}). Allow more, or use a higher --precision. The artifacts are written."
        )
    return report


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
    """Export the model in an output folder and prove the artifacts; the dense model is loaded from its source.

    Args: dry_run: only check that it could be done; returns None.
    """
    target = exporter(engine)
    precision = check_precision(target, precision)
    options = options or EngineOptions()
    target.check(options, pool)
    workspace = Workspace(folder)
    source = workspace.source()
    pruned = load_pruned(folder)
    output_names(pruned.model, pool)
    if target.reads_onnx:
        check_size(pruned.model, precision)
    original = load_dense(source.model, source.task).model if dense else None
    if original is not None and sha256_tensors(original.state_dict()) != pruned.report.get("dense_weights"):
        raise PlanMismatch(
            f"{folder}/model was not cut from {source.model}. Run `optin rewrite {folder}` first, or give --no-dense."
        )
    if dry_run:
        return None
    samples = int8_samples(prepare(source).calibration.batches) if precision == "int8" else ()
    spec = ExportSpec(precision, pool, options, samples)
    built = build(workspace, target, spec, pruned.model, original)
    check_engine(built, pruned.model, original, seq_len=source.seq_len, samples=samples)
    return built


def _quality(prepared: Prepared, pruned: nn.Module, built: Built) -> Quality:
    """Of the asked engine's own outputs where it runs here in any shape, else of the torch model's."""
    pair, judge = built.pairs[-1], prepared.judge
    if built.obstacle is not None or pair.pruned.shapes:
        return judge.of(pruned)
    with pair.engine.open(pair.pruned.path, precision=pair.precision) as runtime:
        shipped = EngineModel(runtime, pair.pruned.outputs[0]).eval()
        return judge.of(shipped)


def _report(
    prepared: Prepared,
    pruned: PrunedModel,
    built: Built,
    quality: Quality,
    parity: Mapping[str, float],
    latency: Sequence[Measurement],
    clock: Clock,
    settings: Mapping[str, Any],
) -> Report:
    plan, source = pruned.plan, prepared.source
    weights = {"plan": plan.hash, "layout": plan.layout_hash, "dense_weights": prepared.weights_sha256}
    macs = {"dense": plan.macs_dense, "pruned": plan.macs_pruned}
    return Report(
        quality=quality,
        params=pruned.report["params"],
        macs={**macs, "kept": plan.kept, "prunable_kept": plan.prunable_kept},
        size_bytes=built.sizes(),
        parity={**pruned.report["parity"], **parity},
        latency=latency,
        heads=[len(kept) for kept in plan.heads],
        neurons=[len(kept) for kept in plan.neurons],
        environment=environment(),
        hashes={**weights, **built.hashes()},
        seconds=clock.seconds,
        memory=clock.memory.peaks,
        settings={**asdict(source), **settings, "calibration_fingerprint": prepared.calibration.fingerprint},
        notes=_notes(source, built, settings, quality),
    )


def record_samples(workspace: Workspace, prepared: Prepared, pruned: nn.Module, weights_sha256: str) -> None:
    """Keep 8 held-out inputs with the outputs of both models, for parity on the target.

    Args: weights_sha256: of model/, noted beside them.
    """
    largest = max(prepared.held_out.batches, key=rows_of)
    batch = {name: rows[:RECORDED] for name, rows in largest.items()}
    tensors = {f"input.{name}": rows for name, rows in batch.items()}
    for name, model in (("dense", prepared.loaded.model), ("pruned", pruned)):
        with inference(model), torch.inference_mode():
            tensors[f"{name}.output"] = main_output(model(**batch))
    write_tensors(workspace.root / "samples.safetensors", tensors, {"model": weights_sha256})


def _notes(source: Source, built: Built, settings: Mapping[str, Any], quality: Quality) -> list[str]:
    notes = []
    if settings["max_drop"] is not None:
        notes.append(
            f"The budget was chosen by `--max-drop {settings['max_drop']:g}` on the rows that quality is told of; one "
            f"of the {quality.samples} rows is {100 / quality.samples:.2f} points."
        )
    if settings["rounds"]:
        told = ", ".join(f"{each['measured_ms']:.3g}" for each in settings["rounds"])
        target = TimeTarget(**settings["time"])
        notes.append(f"Planned for `{target}` by a latency table; plans that were measured took {told} ms.")
    if source.calibration is None:
        notes.append("Calibrated on the small bundled set: accuracy needs your own data (`--calibration FILE`).")
    if built.problem is not None:
        notes.append(f"The engine could not be built here. {built.problem}")
    elif built.obstacle is not None:
        notes.append(f"{built.pairs[-1].pruned.path.name} was built but not run here: {built.obstacle}.")
    return notes


def _over_budget(memory: Mapping[str, int], before: int, budget: int | None) -> list[str]:
    """The sentence for stages that took more than `--memory-budget` beyond the loaded model, if there were any."""
    over = over_budget(memory, before, budget)
    if budget is None or not over:
        return []
    told = ", ".join(f"{title} {size / 2**20:.0f} MiB" for title, size in over.items())
    sentence = (
        f"--memory-budget {budget / 2**20:.0f}MiB bounds scoring; these stages took more beyond the model: {told}."
    )
    log.warning(sentence)
    return [sentence]
