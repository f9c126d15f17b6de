"""Measure dense and pruned artifacts of an engine against each other, at chosen batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from optin_deploy.checkpoint.config import longest_in
from optin_deploy.common.environment import environment
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import BadInput
from optin_deploy.exporters import check_precision, exporter
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.files.storage import read_json, write_json
from optin_deploy.jobs.origin import check_origin
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.artifact_inputs import Input, make_feeds, network_inputs, settled, with_sizes
from optin_deploy.measuring.artifacts import Opening, check_built, check_runs, check_threads, device_exporter, time_pair
from optin_deploy.measuring.device_time import DeviceOpener, DeviceTime, measure_device_time
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point, check_different, point_name
from optin_deploy.measuring.room import check_room, least_bytes
from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.planning.costs import costs_of
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.networks import find_in
from optin_deploy.reporting.findings import StoredMeasurements
from optin_deploy.runtimes.base import Feeds
from optin_deploy.structure.groups import Layout

DEFAULT_SEQ = 128
"""Tokens where neither the user nor a plan says how many."""
SAME = ("platform", "cpu_model", "cores_physical", "cores_logical", "cpus_available", "python", "versions")
"""What must be the same of an environment for rows to stand in one file."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What both networks take, and what each costs at any size of it."""

    network: Network
    """The dense one."""
    plan: NetworkPlan
    layout_of: Callable[[], Layout]
    """Finds what can be cut in the dense network; called where a point has another length than the plan."""
    longest: int | None = None
    """Tokens that the table of positions holds; None: not known."""

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Inputs with their names, types and shapes."""
        return with_sizes(network_inputs(self.network), self.plan)

    @cached_property
    def layout(self) -> Layout:
        """What can be cut in the dense network."""
        return self.layout_of()

    def settled(self, point: Point) -> Point:
        """The point with its length; None where no input has one.

        Raises: BadInput: longer than the table of positions, or a size that fixed shapes do not have.
        """
        found = settled(Path(self.network.source), self.inputs, point, DEFAULT_SEQ)
        if found.seq is not None and self.longest is not None and found.seq > self.longest:
            raise BadInput(f"{point}: possible are 1 to {self.longest} tokens for this model.")
        return found

    def feeds(self, point: Point) -> Feeds:
        """Random inputs without padding, as engines take them."""
        return make_feeds(self.inputs, self.settled(point))

    def ideal(self, point: Point) -> float:
        """Dense over pruned multiply-accumulates of one sample: the speed-up if time were these."""
        cost, seq = self.plan.cost, self.settled(point).seq
        usual = set[int]().union(*(each.lengths for each in self.inputs))
        if cost is not None and seq in (None, *usual):
            return cost.macs_dense / max(1, cost.macs_pruned)
        macs = costs_of(self.layout, sizes_at(self.layout, self.feeds(replace(point, batch=1)))).macs
        widths = {**macs.whole, **{name: len(units) for name, units in self.plan.keep.items()}}
        return macs.dense / max(1, macs.total(widths))


def sizes_at(layout: Layout, feeds: Mapping[str, np.ndarray]) -> dict[Axis, int]:
    """Sizes of the free axes of the inputs, as these have them."""
    return {
        axis.root: value.shape[place]
        for name, value in feeds.items()
        for place, axis in enumerate(layout.structure.axes.get(name, ()))
        if axis.kind == "leaf"
    }


def measure(
    dense: Opening,
    smaller: Opening,
    inputs: Inputs,
    points: Sequence[Point],
    *,
    beside: str = "",
    stage: Stage = silent_stage,
) -> list[Measurement]:
    """Interleaved A/B timing of two artifacts at each point, on the same random inputs without padding.

    Args: beside: what the dense model is, for the titles. stage: draws progress, one stage a point.
    """
    measured = []
    for point in map(inputs.settled, points):
        title = f"measure {point_name(point.batch, point.seq)}{beside}"
        measured.append(
            Measurement(
                engine=smaller.target.engine,
                batch=point.batch,
                seq_len=point.seq,
                threads=smaller.target.threads(smaller.threads),
                ideal=inputs.ideal(point),
                timing=time_pair(dense, smaller, inputs.feeds(point), title=title, stage=stage),
                precision=check_precision(smaller.target, smaller.precision),
                dense_engine=dense.target.engine,
                dense_precision=dense.precision,
            )
        )
    return measured


@dataclass(frozen=True)
class BenchSettings:
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
class BenchCase:
    """The same, with everything found and checked."""

    bench: BenchSettings
    precision: str
    """The asked one, or the engine's default."""
    dense: Opening
    smaller: Opening
    inputs: Inputs

    @property
    def threads(self) -> int:
        """What the asked threads come to."""
        return self.smaller.target.threads(self.bench.threads)


def bench_folder(
    folder: Path, *benches: BenchSettings, dry_run: bool = False, stage: Stage = silent_stage
) -> list[Measurement]:
    """Measure the artifacts in an output folder in every case; measurements.json grows with each, by raw samples too.

    Args: dry_run: only check that it could be done.
    Raises: BadInput: an artifact is missing, or a case is impossible; before anything is measured.
    """
    cases = [checked(folder, bench) for bench in benches]
    measured: list[Measurement] = []
    for case in cases if not dry_run else ():
        measured += bench_rows(case, stage=stage)
        write_measurements(folder, measured)
    return measured


def checked(folder: Path, bench: BenchSettings) -> BenchCase:
    """Find what is measured.

    Raises: BadInput: an artifact is missing, the engine does not run here, or it cannot be measured so or there.
    """
    target = exporter(bench.engine)
    if bench.device_time:
        device_exporter(target)
    workspace = Workspace(folder)
    source, inputs = workspace.source(), inputs_in(workspace)
    precision = check_precision(target, bench.precision)
    name, dense_name = target.file_names(precision, folder)
    dense = folder / dense_name if dense_name else Path(source.model)
    check_runs(target, precision)
    for path, role in ((dense, "dense"), (folder / name, "pruned")) if dense_name else ((folder / name, "pruned"),):
        check_built(path, bench.engine, precision)
        if path.is_file():
            check_origin(path, role)
    for point in bench.points:
        check_room(
            least_bytes(inputs.network, inputs.feeds(replace(point, batch=1)), precision), str(point), point.batch
        )
    check_different(bench.points)
    check_threads(bench.threads)
    target.threads(bench.threads)
    opened = partial(Opening, target, precision=precision, threads=bench.threads)
    return BenchCase(bench, precision, opened(dense, task=source.task), opened(folder / name), inputs)


def inputs_in(workspace: Workspace) -> Inputs:
    """What the networks in an output folder take.

    Raises: BadInput: a file is missing or damaged.
    """
    path = workspace.root / DENSE if (workspace.root / DENSE).is_file() else workspace.root / PRUNED
    plan = workspace.read_plan()
    return Inputs(read_file(path), plan, lambda: find_in(path).layout, longest_in(workspace.model_folder))


def bench_rows(case: BenchCase, *, stage: Stage = silent_stage) -> list[Measurement]:
    """Measure a case at all its points."""
    measured = measure(case.dense, case.smaller, case.inputs, case.bench.points, stage=stage)
    if case.bench.device_time:
        measured = [replace(each, device_time=_device_time(case, each, stage)) for each in measured]
    return [replace(each, peak_bytes=_peaks(case, each, stage)) for each in measured] if case.bench.memory else measured


def _device_time(case: BenchCase, at: Measurement, stage: Stage) -> DeviceTime:
    def opener(one: Opening) -> DeviceOpener:
        target = device_exporter(one.target)
        return lambda graph: target.open_device(one.path, precision=one.precision, cuda_graph=graph, task=one.task)

    feeds = case.inputs.feeds(Point(at.batch, at.seq_len))
    return measure_device_time(opener(case.dense), opener(case.smaller), feeds, stage=stage)


def _peaks(case: BenchCase, at: Measurement, stage: Stage) -> dict[str, int]:
    from optin_deploy.measuring.peak_memory import peak_of

    feeds = case.inputs.feeds(Point(at.batch, at.seq_len))
    found = {}
    asked = {"engine": at.engine, "precision": at.precision}
    for name, one in (("dense", case.dense), ("pruned", case.smaller)):
        with stage(f"memory {name}"):
            found[name] = peak_of(one.path, feeds, **asked, threads=at.threads, task=one.task)
    return found


def write_measurements(folder: Path, measured: Sequence[Measurement]) -> None:
    """Write measurements.json, raw samples and environment included; what was measured here in other cases stays."""
    path, rows, here = folder / "measurements.json", [m.to_json() for m in measured], environment()
    again = {_case(row) for row in rows}
    older = [row for row in _measured_before(path, here) if _case(row) not in again]
    write_json(
        path, {"schema_version": StoredMeasurements.schema_version, "latency": older + rows, "environment": here}
    )


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured: a later row of the same case takes its place."""
    return tuple(row.get(name) for name in ("engine", "precision", "batch", "seq_len", "threads"))


def _measured_before(path: Path, here: Mapping[str, object]) -> list[dict[str, Any]]:
    """The rows of an earlier measurements.json; none if it is damaged, or of another machine or other packages."""
    try:
        data = read_json(path, "", ours=True)
        found = StoredMeasurements.from_json(data)
    except BadInput:
        return []
    if data["schema_version"] != StoredMeasurements.schema_version:
        return []
    alike = all(found.environment.get(name) == here[name] for name in SAME)
    rows: list[dict[str, Any]] = data["latency"]
    return rows if alike else []
