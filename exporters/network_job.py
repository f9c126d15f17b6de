"""`optin-export` of what is cut in its graph: make it smaller by data, write it, prove it, measure it, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from exporters import exporter
from exporters.base import Exporter
from exporters.bench.measuring import check_threads, time_pair
from exporters.bench.network_time import Yardstick, table_at, within_time
from exporters.bench.time_budget import Round, judged
from exporters.clock import Clock
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement, Report, to_markdown
from optin_deploy.data.feeds import Drawing, Halves, Preparation, read_feeds, read_judging
from optin_deploy.data.ports import takes
from optin_deploy.data.rows import Feeds, rows_of
from optin_deploy.errors import BadInput
from optin_deploy.jobs.networks import Found, find_in, is_file
from optin_deploy.jobs.pruning import Pick, PrunedNetwork, Ready, Recipe, prune_network, ready, scored, sizes_of
from optin_deploy.jobs.rewriting import compare, file_bytes
from optin_deploy.jobs.stored import marked
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.write import data_path, write
from optin_deploy.ownership import Record
from optin_deploy.planning.costs import costs_of
from optin_deploy.planning.plan import PlanCost
from optin_deploy.planning.widths import Keep
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.storage import scratch_folder, sha256_file, write_json, write_tensors, write_text

DENSE, PRUNED, SCORES = "dense.onnx", "model.onnx", "scores.safetensors"
LATENCY = "latency.json"
NAMES = (DENSE, PRUNED, SCORES, LATENCY, "plan.json", "samples.safetensors", "report.json", "report.md")
"""What the output folder holds; weights of more than 2 GiB lie beside the ONNX files."""
RECORDED = 8
"""Rows kept with the outputs of both networks, for checks elsewhere."""
ENGINES = ("onnx", "openvino")
"""Those that run an ONNX file as it is."""


@dataclass(frozen=True)
class Request:
    """What is asked of one job."""

    source: str
    """An ONNX file, or folder or hub id of a transformers model."""
    calibration: Path | None
    """None: the small bundled set."""
    evaluation: Path | None = None
    """Rows that judge; None: held-out calibration rows."""
    preparation: Preparation = field(default_factory=Preparation)
    drawing: Drawing = field(default_factory=Drawing)
    recipe: Recipe = field(default_factory=Recipe)
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of free axes, by their names in the file, where it takes only some sizes."""
    engine: str = "onnx"
    batches: tuple[int, ...] = (1,)
    """Rows at once, where both networks are measured."""
    threads: int = 0
    memory_budget: int | None = None
    """Bytes that scoring may take; None: most of what is free."""


def export_network(
    request: Request, out: Path, *, force: bool = False, dry_run: bool = False, stage: Stage = silent_stage
) -> Report | None:
    """Do all of it; what is made lies in `out`. Finished scores are reused.

    Args: dry_run: check what can be checked, and return None.
    Raises: OptinError kinds: see errors.py.
    """
    target, clock, record = _target(request), Clock(stage), Record(out)
    record.reserve((*NAMES, *(data_path(Path(name)).name for name in (DENSE, PRUNED))), force=force, dry_run=dry_run)
    with clock("load"):
        found = find_in(request.source, sizes=request.sizes)
        asked = ready(found, _rows(found.network, request), request.recipe)
        _check_batches(found.network, request.batches)
    if dry_run:
        return None
    out.mkdir(parents=True, exist_ok=True)
    record.begin()
    with clock("score") as progress:
        scores = scored(asked, _known(out), memory_budget=request.memory_budget, progress=progress)
        scores.write(out / SCORES)
    target_time, rounds = request.recipe.limits.time, list[Round]()
    write(found.network, out / DENSE)

    def in_time(pick: Pick) -> Keep:
        assert target_time is not None
        yard = _yardstick(target, request, asked, out)
        with clock("profile") as progress:
            table = table_at(out / LATENCY, yard, request.recipe.choice, progress=progress)
        keep, tried = within_time(target_time, table, yard, pick, stage=clock)
        rounds.extend(tried)
        return keep

    pruned = prune_network(asked, scores, chosen=None if target_time is None else in_time, stage=clock)
    with clock("export"):
        errors = _written(found, pruned, out)
        _record_samples(found, pruned, asked.rows, out)
    measured = _measured(target, request, pruned, asked.rows.calibration, out, clock)
    report = _report(request, found, pruned, asked.rows, errors, measured, clock, out)
    verdict = None if target_time is None else judged(target_time, measured[0])
    if verdict is not None:
        told = ", ".join(f"{each.measured_ms:.3g}" for each in rounds)
        note = f"Planned for `{target_time}` by a latency table; plans that were measured took {told} ms."
        report = replace(report, notes=(*report.notes, note, verdict.sentence))
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.md", to_markdown(report))
    if verdict is not None:
        verdict.check()
    return report


def _yardstick(target: Exporter, request: Request, asked: Ready, out: Path) -> Yardstick:
    """The engine with rows of the first batch size."""
    batch = request.batches[0]
    feeds = _feeds(asked.found.network, asked.rows.calibration, batch)
    return Yardstick(asked.found.layout, target, feeds, batch, request.threads, out / DENSE)


def _target(request: Request) -> Exporter:
    if request.engine not in ENGINES:
        raise BadInput(
            f"--engine {request.engine} does not run what is cut in its graph yet; possible are {', '.join(ENGINES)}."
        )
    target = exporter(request.engine)
    check_threads(request.threads)
    target.threads(request.threads)
    return target


def _rows(network: Network, request: Request) -> Halves:
    drawing, preparation = request.drawing, request.preparation
    if not is_file(request.source):  # tokenizer and image processor lie in the model's folder
        preparation = replace(
            preparation,
            tokenizer=preparation.tokenizer or request.source,
            preprocessor=preparation.preprocessor
            or (None if preparation.pixels or preparation.image_size else request.source),
        )
    if request.evaluation is None:
        return read_feeds(network, request.calibration, preparation, drawing)
    found = read_feeds(network, request.calibration, preparation, Drawing(drawing.samples, 0.0, drawing.seed))
    judging = read_judging(network, request.evaluation, found.calibration, preparation)
    return Halves(found.calibration, judging)


def _known(out: Path) -> UnitScores | None:
    """Scores of an earlier run."""
    try:
        return UnitScores.read(out / SCORES)
    except BadInput:
        return None  # absent, or damaged: made again


def _check_batches(network: Network, batches: Sequence[int]) -> None:
    """Raises: BadInput: a network of a fixed number of rows cannot run at others."""
    rows = takes(network).rows
    wrong = [batch for batch in batches if rows is not None and batch != rows]
    if wrong:
        raise BadInput(f"--at batch={wrong[0]}: {network.source} takes {rows} rows at once and no others.")


def _written(found: Found, pruned: PrunedNetwork, out: Path) -> dict[str, float]:
    """Write both networks, and the plan by which the smaller one is known; returns errors of ONNX Runtime."""
    smaller = marked(pruned.network, pruned.plan)
    errors = {"masked_vs_cut": pruned.proof.masked}
    with scratch_folder(out / PRUNED) as folder:
        write(smaller, folder / PRUNED)
        error = compare(smaller, found.network, folder / PRUNED, out / DENSE, found.probes)
    if error is not None:
        errors["onnxruntime"] = error
    write(smaller, out / PRUNED)
    pruned.plan.write(out / "plan.json")
    return errors


def _record_samples(found: Found, pruned: PrunedNetwork, rows: Halves, out: Path) -> None:
    """Keep some rows that judged with the outputs of both networks, for checks elsewhere."""
    feeds = rows.held_out or rows.calibration
    batch = {name: value if name in feeds.shared else value[:RECORDED] for name, value in feeds.batches[0].items()}
    tensors = {f"input.{name}": value.contiguous() for name, value in batch.items()}
    for name, network in (("dense", found.network), ("pruned", pruned.network)):
        with torch.inference_mode():
            outputs = Program(network)({port.name: batch[port.name] for port in network.inputs}).outputs
        tensors.update({f"{name}.{output}": value.contiguous() for output, value in outputs.items()})
    write_tensors(out / "samples.safetensors", tensors, {"network": pruned.plan.network or ""})


def _measured(
    target: Exporter, request: Request, pruned: PrunedNetwork, rows: Feeds, out: Path, clock: Stage
) -> list[Measurement]:
    """Time both files by turns on calibration rows."""
    cost = pruned.plan.cost
    assert cost is not None
    found = []
    for batch in request.batches:
        feeds = _feeds(pruned.network, rows, batch)
        length = next((value.shape[1] for value in feeds.values() if value.ndim == 2), None)
        timing = time_pair(
            target,
            out / DENSE,
            out / PRUNED,
            feeds,
            at=(batch, length),
            precision=None,
            threads=request.threads,
            stage=clock,
        )
        ideal = cost.macs_dense / max(1, cost.macs_pruned)
        found.append(Measurement(request.engine, batch, length, target.threads(request.threads), ideal, timing))
    return found


def _feeds(network: Network, rows: Feeds, count: int) -> dict[str, np.ndarray]:
    """So many rows of the widest batch, from its start again where it has fewer."""
    widest = rows.widest
    places = torch.arange(count) % rows_of(widest)
    some = {name: value if name in rows.shared else value[places] for name, value in widest.items()}
    return {port.name: some[port.name].numpy() for port in network.inputs}


def _report(
    request: Request,
    found: Found,
    pruned: PrunedNetwork,
    rows: Halves,
    errors: Mapping[str, float],
    latency: Sequence[Measurement],
    clock: Clock,
    out: Path,
) -> Report:
    plan, cost = pruned.plan, pruned.plan.cost
    assert cost is not None
    assert pruned.quality is not None
    files = {"dense": out / DENSE, "pruned": out / PRUNED}
    kept = {group.name: len(plan.keep.get(group.name, range(group.units))) for group in found.layout.groups}
    return Report(
        quality=pruned.quality,
        params={"dense": cost.weights_dense, "pruned": cost.weights_pruned},
        macs=_shares(found, rows.calibration, cost),
        size_bytes={name: file_bytes(path) for name, path in files.items()},
        parity=errors,
        latency=latency,
        heads=(),
        neurons=(),
        groups=[
            {"name": group.name, "kind": group.kind, "kept": kept[group.name], "units": group.units}
            for group in found.layout.groups
        ],
        environment=environment(),
        hashes={
            "plan": plan.hash,
            "network": plan.network or "",
            **{path.name: sha256_file(path) for path in files.values()},
        },
        seconds=clock.seconds,
        memory=clock.memory.peaks,
        settings={
            "source": request.source,
            "engine": request.engine,
            "recipe": asdict(request.recipe),
            "calibration_fingerprint": rows.calibration.fingerprint,
        },
        notes=_notes(pruned),
    )


def _shares(found: Found, rows: Feeds, cost: PlanCost) -> dict[str, float]:
    """Multiply-accumulates, what part of them stays, and what part of those that any group could lose."""
    costs = costs_of(found.layout, sizes_of(found, rows)).macs
    fixed = costs.of({group.name: 0 for group in found.layout.groups})
    dense, pruned = cost.macs_dense, cost.macs_pruned
    return {
        "dense": dense,
        "pruned": pruned,
        "kept": pruned / max(1, dense),
        "prunable_kept": (pruned - fixed) / max(1, dense - fixed),
    }


def _notes(pruned: PrunedNetwork) -> list[str]:
    """What was not done, in sentences."""
    if pruned.compensation is None:
        return ["Nothing was compensated (--no-compensation)."]
    skipped = pruned.compensation.skipped
    reasons = dict.fromkeys(each.why for each in skipped)
    return [f"{len(skipped)} products could not be repaired: {'; '.join(reasons)}."] if skipped else []
