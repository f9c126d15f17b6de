"""Measure dense and pruned artifacts of an engine against each other, at chosen batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters import exporter
from exporters.base import Exporter
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement
from optin_deploy.bench.timing import measure_pair
from optin_deploy.cost.macs import ideal_speedup
from optin_deploy.errors import BadInput
from optin_deploy.inputs import example_inputs
from optin_deploy.progress import Progress, Stage, silent, silent_stage
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
