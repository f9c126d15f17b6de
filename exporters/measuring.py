"""Measure dense and pruned artifacts of an engine against each other, at chosen batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from exporters import check_precision, exporter
from exporters.base import Exporter
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement
from optin_deploy.bench.timing import measure_pair
from optin_deploy.cost.macs import ideal_speedup
from optin_deploy.errors import BadInput
from optin_deploy.inputs import check_seq_len, example_inputs, input_names
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.pruned import PrunedModel, load_pruned
from optin_deploy.storage import write_json
from optin_deploy.workspace import Workspace


@dataclass(frozen=True)
class Point:
    """Where latency is measured."""

    batch: int = 1
    seq: int | None = None
    """Tokens; None = the calibration length. Images have their own size."""


def measure(
    target: Exporter,
    dense: Path,
    smaller: Path,
    pruned: PrunedModel,
    points: Sequence[Point],
    *,
    precision: str,
    threads: int = 0,
    task: str | None = None,
    stage: Stage = silent_stage,
) -> list[Measurement]:
    """Interleaved A/B timing of two artifacts of an engine at each point, on the same random inputs without padding.

    Args: task: of the dense model, where the engine runs its own folder. stage: draws progress, one stage a point.
    """
    measured = []
    for point in points:
        seq_len = length_of(point, pruned.model, pruned.plan.tokens)
        feeds = {k: v.numpy() for k, v in example_inputs(pruned.model, batch=point.batch, seq_len=seq_len).items()}
        with stage(f"measure {point.batch} x {point.seq or pruned.plan.tokens}") as progress:
            timing = measure_pair(
                lambda: target.open(dense, precision=precision, threads=threads, task=task),
                lambda: target.open(smaller, precision=precision, threads=threads),
                feeds,
                on_block=progress,
            )
        measured.append(
            Measurement(
                engine=target.engine,
                batch=point.batch,
                seq_len=seq_len,
                threads=threads,
                ideal=ideal_speedup(pruned.model, pruned.layout, pruned.plan, seq_len=seq_len),
                timing=timing,
                precision=precision,
            )
        )
    return measured


def length_of(point: Point, model: nn.Module, tokens: int) -> int:
    """Tokens a sample at a point; images have the model's own number.

    Raises: BadInput: longer than the position table.
    """
    if input_names(model) == ("pixel_values",) or point.seq is None:
        return tokens
    check_seq_len(model.config, point.seq)
    return point.seq


def parse_point(text: str) -> Point:
    """Read `batch=8,seq=128`.

    Raises: BadInput.
    """
    try:
        values = {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}
        if not values or set(values) - {"batch", "seq"} or min(values.values()) < 1:
            raise ValueError(text)
    except ValueError as err:
        raise BadInput(f"--at {text!r}: give positive numbers such as batch=8,seq=128.") from err
    return Point(**values)


def bench_folder(
    folder: Path,
    *,
    engine: str,
    precision: str | None = None,
    points: Sequence[Point],
    threads: int = 0,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> list[Measurement]:
    """Measure the artifacts in an output folder; raw samples go to measurements.json.

    Args: dry_run: only check that it could be done.
    Raises: BadInput: an artifact is missing.
    """
    target = exporter(engine)
    source = Workspace(folder).source()
    pruned = load_pruned(folder)
    precision = check_precision(target, precision)
    name, dense_name = target.file_names(precision)
    dense = folder / dense_name if dense_name else Path(source.model)
    obstacle = target.obstacle(precision)
    if obstacle is not None:
        raise BadInput(f"{engine} in {precision} does not run on this machine: {obstacle}.")
    for path in (dense, folder / name) if dense_name else (folder / name,):
        if not path.exists():
            remedy = f"optin build {folder} --engine {engine} --precision {precision}"
            raise BadInput(f"{path} does not exist. Make it with `{remedy}`.")
    for point in points:
        length_of(point, pruned.model, pruned.plan.tokens)
    check_threads(threads)
    if dry_run:
        return []
    measured = measure(
        target,
        dense,
        folder / name,
        pruned,
        points,
        precision=precision,
        threads=threads,
        task=source.task,
        stage=stage,
    )
    rows = [m.to_json() for m in measured]
    write_json(folder / "measurements.json", {"schema_version": 2, "latency": rows, "environment": environment()})
    return measured


def check_threads(threads: int) -> None:
    """Refuse a negative number of threads.

    Raises: BadInput.
    """
    if threads < 0:
        raise BadInput(f"--threads {threads}: give 0 (the engine's default) or a positive number.")
