"""The main job behind `optin-export`: score, plan, rewrite, export, prove, measure, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from exporters import check_precision, exporter
from exporters.base import Artifact, Exporter, ExportSpec
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement, Report, to_markdown
from optin_deploy.bench.timing import measure_pair
from optin_deploy.cost.macs import ideal_speedup
from optin_deploy.errors import BadInput, CannotBuildHere, ParityFailure
from optin_deploy.inputs import example_inputs
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference
from optin_deploy.progress import Progress, Stage, silent, silent_stage
from optin_deploy.pruned import PrunedModel, load_pruned
from optin_deploy.quality import compare
from optin_deploy.rewrite.verify import main_output, relative_error
from optin_deploy.search import Budget
from optin_deploy.stages import Prepared, plan_stage, prepare, rewrite_stage, score_stage
from optin_deploy.storage import write_json, write_tensors, write_text
from optin_deploy.workspace import Source, Workspace

ENGINE_TOLERANCE = 1e-4
"""float32 engines against torch, relative to the largest output: fused kernels sum in another order."""
PARITY_POINTS = ((1, 1.0), (3, 0.4))
"""(batch, share of seq_len) at which engines are compared with torch: not the sizes that were traced."""
RECORDED = 8
"""Samples kept with their outputs, for parity on the target."""
OWN_FILES = ("model.safetensors", "plan.json", "layout.json", "optin.json")
"""What model/ holds besides config and tokenizer or processor."""


@dataclass(frozen=True)
class Point:
    """Where latency is measured."""

    batch: int = 1
    seq: int | None = None
    """Tokens; None = the calibration length. Images have their own size."""


@dataclass
class _Clock:
    """Seconds of each stage, by title."""

    stage: Stage
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, title: str) -> Iterator[Progress]:
        started = time.perf_counter()
        with self.stage(title) as progress:
            yield progress
        self.seconds[title] = round(time.perf_counter() - started, 2)


def export_model(
    source: Source,
    out: Path,
    *,
    flops: float = 0.6,
    engine: str = "onnx",
    precision: str | None = None,
    align: int = 16,
    allocation: str = "uniform",
    scorer: str = "sketch",
    compensation: bool = True,
    points: Sequence[Point] = (Point(),),
    threads: int = 0,
    pool: str | None = None,
    dense: bool = True,
    force: bool = False,
    stage: Stage = silent_stage,
) -> Report:
    """Prune a model end to end; everything it makes lies in `out`, finished stages are reused.

    Args:
        points: where dense and pruned are measured against each other; none if `dense` is False.
        threads: intra-op threads of the engine; 0 = its default.
        stage: draws progress.
    Raises: OptinError kinds. CannotBuildHere comes last, when all that can be written here is written.
    """
    target = exporter(engine)
    spec = ExportSpec(precision=check_precision(target, precision), pool=pool)
    budget = Budget(flops)
    clock = _Clock(stage)
    with clock("load"):
        prepared = prepare(source)
        budget.macs(prepared.cost)
        workspace = Workspace.claim(out, source, force=force)
    with clock("score") as progress:
        score_stage(workspace, prepared, scorer=scorer, seed=source.seed, progress=progress)
    with clock("plan"):
        plan = plan_stage(workspace, flops=flops, align=align, allocation=allocation)
    with clock("rewrite") as progress:
        pruned, _ = rewrite_stage(workspace, prepared, compensation=compensation, progress=progress)
    with clock("export"):
        built = build(workspace, target, spec, pruned.model, prepared.loaded.model if dense else None)
    parity = {"masked_vs_rewritten": pruned.report["parity"]["masked_vs_rewritten"]}
    with clock("check"):
        parity |= check_engine(built, pruned.model, prepared.loaded.model, seq_len=source.seq_len)
        quality = compare(prepared.loaded.model, pruned.model, prepared.held_out)
        record_samples(workspace, prepared, pruned.model)
    latency = []
    for point in points if dense and built.problem is None else ():
        with clock(f"measure batch {point.batch}") as progress:
            dense_path = built.dense.path if built.dense else Path(source.model)
            paths = (dense_path, built.pruned.path)
            latency.append(measure(built.engine, *paths, pruned, point, threads=threads, progress=progress))
    report = Report(
        quality=quality,
        params=pruned.report["params"],
        macs={
            "dense": plan.macs_dense,
            "pruned": plan.macs_pruned,
            "kept": plan.kept,
            "prunable_kept": plan.prunable_kept,
        },
        size_bytes=built.sizes(),
        parity=parity,
        latency=latency,
        heads=[len(kept) for kept in plan.heads],
        neurons=[len(kept) for kept in plan.neurons],
        environment=environment(),
        hashes={
            "plan": plan.hash,
            "layout": plan.layout_hash,
            "dense_weights": prepared.weights_sha256,
            **built.hashes(),
        },
        seconds=clock.seconds,
        settings={
            **asdict(source),
            "flops": flops,
            "engine": engine,
            "precision": spec.precision,
            "align": align,
            "allocation": allocation,
            "scorer": scorer,
            "compensation": compensation,
            "calibration_fingerprint": prepared.calibration.fingerprint,
        },
        notes=_notes(source, built),
    )
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", to_markdown(report))
    if built.problem is not None:
        raise built.problem
    return report


@dataclass(frozen=True)
class Built:
    """What an export left."""

    engine: Exporter
    """Runs the artifacts here: the asked engine, or the portable one where that cannot be built."""
    pruned: Artifact
    dense: Artifact | None
    """None: not asked for, or the engine runs the dense model's own folder."""
    problem: CannotBuildHere | None = None

    def artifacts(self) -> dict[str, Artifact]:
        """By name."""
        return {"pruned": self.pruned} | ({"dense": self.dense} if self.dense else {})

    def sizes(self) -> dict[str, int]:
        """Bytes of each artifact."""
        return {name: artifact.size_bytes for name, artifact in self.artifacts().items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of each artifact."""
        return {f"{name}_artifact": artifact.sha256 for name, artifact in self.artifacts().items()}


def build(
    workspace: Workspace, target: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None
) -> Built:
    """Export pruned and dense with the same exporter; where the engine cannot be built, its portable form."""
    for file in workspace.model_folder.iterdir():
        if file.name not in OWN_FILES:  # Optimum and others look for config and tokenizer beside the ONNX file
            shutil.copyfile(file, workspace.root / file.name)
    base = exporter(target.portable) if target.portable else target
    portable = _export_both(workspace, base, replace(spec, precision=None) if target.portable else spec, pruned, dense)
    if target.portable is None:
        return Built(target, *portable)
    try:
        return Built(target, *_export_both(workspace, target, spec, pruned, dense))
    except CannotBuildHere as problem:
        return Built(base, *portable, problem)


def _export_both(
    workspace: Workspace, target: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None
) -> tuple[Artifact, Artifact | None]:
    name, dense_name = target.file_names
    smaller = target.export(pruned, spec, workspace.root / name)
    if dense is None or dense_name is None:
        return smaller, None
    return smaller, target.export(dense, spec, workspace.root / dense_name)


def check_engine(built: Built, pruned: nn.Module, dense: nn.Module | None, *, seq_len: int) -> dict[str, float]:
    """Error of each artifact against its torch model, at sizes that were not traced, with padding.

    Raises: ParityFailure: above 1e-4 of the largest output.
    """
    errors = {}
    for name, artifact in built.artifacts().items():
        model = pruned if name == "pruned" or dense is None else dense
        with built.engine.open(artifact.path) as runtime, inference(model), torch.inference_mode():
            worst = 0.0
            for batch, share in PARITY_POINTS:
                inputs = example_inputs(model, batch=batch, seq_len=max(2, int(share * seq_len)), seed=batch)
                if "attention_mask" in inputs:
                    inputs["attention_mask"][-1, -1] = 0
                expected = main_output(model(**inputs)).numpy()
                found = runtime.run({k: v.numpy() for k, v in inputs.items()})
                worst = max(worst, relative_error(expected, found[artifact.outputs[0]]))
        if not worst <= ENGINE_TOLERANCE:
            raise ParityFailure(
                f"{artifact.path} differs from its torch model by {worst:.2e} (allowed: {ENGINE_TOLERANCE:.0e})."
            )
        errors[f"torch_vs_{artifact.engine}_{name}"] = worst
    return errors


def record_samples(workspace: Workspace, prepared: Prepared, pruned: nn.Module) -> None:
    """Keep 8 held-out inputs with the outputs of both models, for parity on the target."""
    batch = {name: rows[:RECORDED] for name, rows in prepared.held_out.batches[-1].items()}
    tensors = {f"input.{name}": rows for name, rows in batch.items()}
    for name, model in (("dense", prepared.loaded.model), ("pruned", pruned)):
        with inference(model), torch.inference_mode():
            tensors[f"{name}.output"] = main_output(model(**batch))
    write_tensors(workspace.root / "samples.safetensors", tensors)


def measure(
    target: Exporter,
    dense: Path,
    smaller: Path,
    pruned: PrunedModel,
    point: Point,
    *,
    threads: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Interleaved A/B timing of two artifacts of an engine on the same random inputs without padding."""
    seq_len = point.seq or pruned.plan.tokens
    feeds = {k: v.numpy() for k, v in example_inputs(pruned.model, batch=point.batch, seq_len=seq_len).items()}
    timing = measure_pair(
        lambda: target.open(dense, threads=threads),
        lambda: target.open(smaller, threads=threads),
        feeds,
        on_block=progress,
    )
    return Measurement(
        engine=target.engine,
        batch=point.batch,
        seq_len=seq_len,
        threads=threads,
        ideal=ideal_speedup(pruned.model, pruned.layout, pruned.plan, seq_len=seq_len),
        timing=timing,
    )


def build_folder(folder: Path, *, engine: str, precision: str | None, pool: str | None, dense: bool) -> Built:
    """Export the model in an output folder and prove the artifacts; the dense model is loaded from its source."""
    target = exporter(engine)
    spec = ExportSpec(check_precision(target, precision), pool)
    workspace = Workspace(folder)
    source = workspace.source()
    pruned = load_pruned(folder)
    original = load_dense(source.model, source.task).model if dense else None
    built = build(workspace, target, spec, pruned.model, original)
    check_engine(built, pruned.model, original, seq_len=source.seq_len)
    return built


def bench_folder(
    folder: Path, *, engine: str, points: Sequence[Point], threads: int, stage: Stage = silent_stage
) -> list[Measurement]:
    """Measure the artifacts in an output folder; raw samples go to measurements.json.

    Raises: BadInput: an artifact is missing.
    """
    target = exporter(engine)
    source = Workspace(folder).source()
    pruned = load_pruned(folder)
    name, dense_name = target.file_names
    dense = folder / dense_name if dense_name else Path(source.model)
    for path in (dense, folder / name):
        if not path.exists():
            raise BadInput(f"{path} does not exist. Make it with `optin build {folder} --engine {engine}`.")
    measured = []
    for point in points:
        with stage(f"measure batch {point.batch}") as progress:
            measured.append(measure(target, dense, folder / name, pruned, point, threads=threads, progress=progress))
    rows = [m.to_json() for m in measured]
    write_json(folder / "measurements.json", {"schema_version": 1, "latency": rows, "environment": environment()})
    return measured


def describe_job(
    source: Source, out: Path, *, flops: float, engine: str, precision: str | None, force: bool
) -> list[str]:
    """What `export_model` would do, after the same checks; writes nothing."""
    target = exporter(engine)
    chosen = check_precision(target, precision)
    budget = Budget(flops)
    prepared = prepare(source)
    limit = budget.macs(prepared.cost)
    Workspace.check(out, force=force)
    layers = prepared.layout.layers
    return [
        f"model        {source.model}: {prepared.layout.model_class}, {prepared.loaded.task}, {len(layers)} layers",
        f"units        {sum(x.heads for x in layers)} heads, {sum(x.neurons for x in layers)} neurons",
        f"calibration  {len(prepared.calibration)} samples, {len(prepared.held_out)} held out",
        f"budget       {limit / 1e9:.4f} of {prepared.cost.dense / 1e9:.4f} GMACs at {prepared.cost.tokens} tokens",
        f"engine       {engine} {chosen}: {out / target.file_names[0]}",
        "dry run: nothing was written",
    ]


def _notes(source: Source, built: Built) -> list[str]:
    notes = []
    if source.calibration is None:
        notes.append("Calibrated on the small bundled set: accuracy needs your own data (`--calibration FILE`).")
    if built.problem is not None:
        notes.append(f"The engine could not be built here. {built.problem}")
    return notes
