"""Measure dense and pruned artifacts of an engine against each other, at chosen batch sizes and lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from exporters import ENGINES, check_precision, exporter
from exporters.base import DeviceExporter, Exporter
from exporters.bench.room import check_room, least_bytes
from exporters.onnx_artifact import data_path
from exporters.origin import check_origin
from optin_deploy.bench.device_time import DeviceTime, measure_device_time
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import Measurement, point_name
from optin_deploy.bench.timing import PairTiming, measure_pair
from optin_deploy.cost.macs import ideal_speedup
from optin_deploy.errors import BadInput
from optin_deploy.inputs import check_seq_len, example_inputs, input_names
from optin_deploy.ownership import Record
from optin_deploy.processors import available_cpus
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.pruned import PrunedModel, load_pruned
from optin_deploy.runtimes.base import Feeds, Runtime
from optin_deploy.storage import write_json
from optin_deploy.validation import STORED, whole_number
from optin_deploy.workspace import Workspace

log = logging.getLogger(__name__)
AT_HINT = "Give positive whole numbers such as batch=8,seq=128."


@dataclass(frozen=True)
class Point:
    """Where latency is measured."""

    __pydantic_config__ = STORED

    batch: int = 1
    seq: int | None = None
    """Tokens; None = the calibration length. Images have their own size."""

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("seq", self.seq)):
            if value is not None:
                whole_number(value, f"--at {name}=", 1, hint=AT_HINT)

    def __str__(self) -> str:
        """As it is typed."""
        return f"--at batch={self.batch}" + ("" if self.seq is None else f",seq={self.seq}")


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
        feeds = example_feeds(pruned.model, point.batch, seq_len)
        at = (point.batch, point.seq or pruned.plan.tokens)
        timing = time_pair(
            target, dense, smaller, feeds, at=at, precision=precision, threads=threads, task=task, stage=stage
        )
        measured.append(
            Measurement(
                engine=target.engine,
                batch=point.batch,
                seq_len=seq_len,
                threads=target.threads(threads),
                ideal=ideal_speedup(pruned.model, pruned.layout, pruned.plan, seq_len=seq_len),
                timing=timing,
                precision=precision,
            )
        )
    return measured


def time_pair(
    target: Exporter,
    first: Path,
    second: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    at: tuple[int, int | None],
    precision: str | None,
    threads: int,
    task: str | None = None,
    stage: Stage = silent_stage,
) -> PairTiming:
    """Interleaved A/B timing of two artifacts of an engine on the same feeds, as one stage.

    Args: first: stands as `dense` in the result, second as `pruned`. at: batch and length, for the title.
        precision: None: the artifact's own. task: of `first`, where the engine runs a dense transformers folder.
    """
    return timed(
        lambda: target.open(first, precision=precision, threads=threads, task=task),
        lambda: target.open(second, precision=precision, threads=threads),
        feeds,
        title=f"measure {point_name(*at)}",
        stage=stage,
    )


def timed(
    dense: Callable[[], Runtime], pruned: Callable[[], Runtime], feeds: Feeds, *, title: str, stage: Stage
) -> PairTiming:
    """Interleaved A/B timing of what two functions open, as one stage."""
    with stage(title) as progress:
        return measure_pair(dense, pruned, feeds, on_block=progress)


def example_feeds(model: nn.Module, batch: int, seq_len: int) -> Feeds:
    """Random inputs without padding, as engines take them."""
    return {name: values.numpy() for name, values in example_inputs(model, batch=batch, seq_len=seq_len).items()}


def length_of(point: Point, model: nn.Module, tokens: int) -> int:
    """Tokens a sample at a point; images have the model's own number.

    Raises: BadInput: longer than the position table, or a length for images.
    """
    if point.seq is None:
        return tokens
    if input_names(model) == ("pixel_values",):
        raise BadInput(f"{point}: images have a size of their own, and no length in tokens. Leave seq out.")
    check_seq_len(model.config, point.seq, f"--at batch={point.batch},seq=")
    return point.seq


def parse_point(text: str) -> Point:
    """Read `batch=8,seq=128`.

    Raises: BadInput: says which part is wrong.
    """
    values: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("batch", "seq"):
            raise BadInput(f"--at {text!r}: {name!r} is not known; possible are batch and seq. {AT_HINT}")
        if name in values:
            raise BadInput(f"--at {text!r}: {name} is given twice. {AT_HINT} For two points, give --at twice.")
        try:
            values[name] = int(value)
        except ValueError as err:
            raise BadInput(f"--at {text!r}: {value!r} is no whole number. {AT_HINT}") from err
    return Point(**values)


def parse_points(texts: Sequence[str] | None) -> tuple[Point, ...]:
    """Every `--at`; none where none is given.

    Raises: BadInput: one cannot be read, or is there twice.
    """
    points = tuple(map(parse_point, texts or ()))
    check_different(points)
    return points


def check_different(points: Sequence[Point]) -> None:
    """Refuse a point that is given twice: it would be measured twice.

    Raises: BadInput.
    """
    twice = next((point for point in points if points.count(point) > 1), None)
    if twice is not None:
        raise BadInput(f"{twice} is given twice. Give each point once.")


@dataclass(frozen=True)
class Bench:
    """How an output folder is measured."""

    engine: str
    precision: str | None
    points: tuple[Point, ...]
    threads: int = 0
    """0 = the engine's default."""
    memory: bool = False
    """Measure peak memory too, in processes of their own."""
    device_time: bool = False
    """Measure the time on the device too, without transfers."""


@dataclass(frozen=True, eq=False)
class Case:
    """The same, with everything found and checked."""

    bench: Bench
    target: Exporter
    precision: str
    """The asked one, or the engine's default."""
    dense: Path
    smaller: Path
    pruned: PrunedModel
    task: str | None

    @property
    def threads(self) -> int:
        """What the asked threads come to."""
        return self.target.threads(self.bench.threads)


def bench_folder(
    folder: Path, bench: Bench, *, dry_run: bool = False, stage: Stage = silent_stage
) -> list[Measurement]:
    """Measure the artifacts in an output folder; raw samples go to measurements.json.

    Args: dry_run: only check that it could be done.
    Raises: BadInput: an artifact is missing.
    """
    case = checked(folder, bench)
    if dry_run:
        return []
    measured = bench_rows(case, stage=stage)
    keep(folder, measured)
    return measured


def checked(folder: Path, bench: Bench) -> Case:
    """Find what is measured.

    Raises: BadInput: an artifact is missing, the engine does not run here, or it cannot be measured so or there.
    """
    target = exporter(bench.engine)
    if bench.device_time:
        device_exporter(target)
    source = Workspace(folder).source()
    pruned = load_pruned(folder)
    precision = check_precision(target, bench.precision)
    name, dense_name = target.file_names(precision)
    dense = folder / dense_name if dense_name else Path(source.model)
    check_runs(target, precision)
    for path, role in ((dense, "dense"), (folder / name, "pruned")) if dense_name else ((folder / name, "pruned"),):
        check_built(path, bench.engine, precision)
        if path.is_file():
            check_origin(path, role)
    for point in bench.points:
        tokens = length_of(point, pruned.model, pruned.plan.tokens)
        each = least_bytes(pruned.model, pruned.layout, tokens=tokens, precision=precision)
        check_room(each, str(point), point.batch)
    check_different(bench.points)
    check_threads(bench.threads)
    target.threads(bench.threads)
    return Case(bench, target, precision, dense, folder / name, pruned, source.task)


def bench_rows(case: Case, *, stage: Stage = silent_stage) -> list[Measurement]:
    """Measure a case at all its points."""
    measured = measure(
        case.target,
        case.dense,
        case.smaller,
        case.pruned,
        case.bench.points,
        precision=case.precision,
        threads=case.bench.threads,
        task=case.task,
        stage=stage,
    )
    if case.bench.device_time:
        measured = [replace(each, device_time=_device_time(case, each, stage)) for each in measured]
    return [replace(each, peak_bytes=_peaks(case, each, stage)) for each in measured] if case.bench.memory else measured


def _device_time(case: Case, at: Measurement, stage: Stage) -> DeviceTime:
    target = device_exporter(case.target)
    return measure_device_time(
        lambda cuda_graph: target.open_device(case.dense, precision=at.precision, cuda_graph=cuda_graph),
        lambda cuda_graph: target.open_device(case.smaller, precision=at.precision, cuda_graph=cuda_graph),
        example_feeds(case.pruned.model, at.batch, at.seq_len or 1),
        stage=stage,
    )


def _peaks(case: Case, at: Measurement, stage: Stage) -> dict[str, int]:
    from exporters.bench.peak_memory import peak_of

    feeds = example_feeds(case.pruned.model, at.batch, at.seq_len or 1)
    found = {}
    for name, path, task in (("dense", case.dense, case.task), ("pruned", case.smaller, None)):
        with stage(f"memory {name}"):
            found[name] = peak_of(path, feeds, engine=at.engine, precision=at.precision, threads=at.threads, task=task)
    return found


def keep(folder: Path, measured: Sequence[Measurement]) -> None:
    """Write measurements.json, raw samples and environment included."""
    rows = [m.to_json() for m in measured]
    write_json(folder / "measurements.json", {"schema_version": 2, "latency": rows, "environment": environment()})


def device_exporter(target: Exporter) -> DeviceExporter:
    """The same exporter, as one that opens artifacts for the time on the device.

    Raises: BadInput: its engine cannot launch without transfers; names those that can.
    """
    if not isinstance(target, DeviceExporter):
        able = ", ".join(name for name in ENGINES if isinstance(exporter(name), DeviceExporter))
        raise BadInput(f"engine {target.engine} cannot be timed on the device alone; --device-time is for {able}.")
    return target


def check_runs(target: Exporter, precision: str | None) -> None:
    """Refuse an engine that this machine cannot run.

    Raises: BadInput: says why.
    """
    obstacle = target.obstacle(precision)
    if obstacle is not None:
        named = f"{target.engine} in {precision}" if precision else target.engine
        raise BadInput(f"{named} does not run on this machine: {obstacle}.")


def check_built(path: Path, engine: str, precision: str) -> None:
    """Refuse an output folder that lacks an artifact; warn if what is there is not what was written.

    Raises: BadInput: says how it is made.
    """
    remedy = f"optin build {path.parent} --engine {engine} --precision {precision}"
    if not path.exists():
        raise BadInput(f"{path} does not exist. Make it with `{remedy}`.")
    record = Record.above(path)
    for file in (path, data_path(path)):
        if record is not None and file.is_file() and not record.strangers(file) and not record.owns(file):
            log.warning("%s was changed after it was written; make it again with `%s`", file, remedy)


def check_threads(threads: int) -> None:
    """Refuse more threads than can run at the same time, or a negative number.

    Raises: BadInput.
    """
    most = available_cpus()
    told = "This process may use 1 CPU" if most == 1 else f"This process may use {most} CPUs"
    whole_number(threads, "--threads", 0, most, f"{told}; 0 is the engine's default.")
