"""Load what a job needs, and refuse early what cannot be done; say what would be done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.exporters import check_precision, exporter
from optin_deploy.exporters.base import Exporter, ExportSpec
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.passes.pooled import head_of
from optin_deploy.exporters.to_onnx import check_size
from optin_deploy.jobs.building import check_free_sizes, int8_samples
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.width_timer import DENSE, check_timeable, inputs_of, width_timer
from optin_deploy.measuring.artifacts import check_threads
from optin_deploy.measuring.points import Point, check_different
from optin_deploy.measuring.room import check_room, least_bytes
from optin_deploy.measuring.stats import percentile
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import limits_within
from optin_deploy.planning.latency import LatencyTable
from optin_deploy.planning.widths import Choice, aligned
from optin_deploy.pruning.tokens import check, merging
from optin_deploy.quality.held_out import judged_samples
from optin_deploy.structure.labels import TOKENS
from optin_deploy.tuning import label_free

CLEARLY = 1.2
"""A target so far above a quick measurement of the dense model is beyond its noise; the latency table judges others."""


@dataclass(frozen=True, eq=False)
class CheckedJob:
    """The same, with everything loaded and checked."""

    job: Job
    target: Exporter
    spec: ExportSpec
    prepared: Prepared
    choice: Choice


def checked_job(job: Job, home: Path | None = None) -> CheckedJob:
    """Load what a job needs and refuse, before the long work and before anything is written, what cannot be done.

    Args: home: the output folder, where an earlier run may have left the exported network.
    Raises: BadInput and its kinds.
    """
    target = exporter(job.engine)
    precision = check_precision(target, job.precision)
    options = target.options.checked(job.options)
    _check_options(job, target, options)
    source = job.source
    choice = Choice(source.units, align=target.align, allocation=job.allocation, drops=source.drop_tokens)
    choice = choice.in_multiples(job.align)
    prepared = prepare(source, home)
    if job.tuning is not None:
        label_free.check(prepared.ready, job.tuning)
    choice = _fitted(choice, job, prepared)
    head = None if job.pool is None else head_of(prepared.ready.network, job.pool, prepared.dense.head)
    if target.reads_onnx:
        check_size(prepared.ready.network, precision)
    if options.sizes():
        check_free_sizes(prepared.ready.network, job.engine)
    _check_points(job, options, prepared, precision)
    names = [port.name for port in prepared.ready.network.inputs]
    samples = int8_samples(prepared.ready.rows.calibration.batches, names) if precision == "int8" else ()
    spec = ExportSpec(precision, head, options, samples, of_module=not target.reads_onnx)
    checked = CheckedJob(job, target, spec, prepared, choice)
    if job.limits.time is not None:
        check_timeable(target, spec)
        _check_needed(checked)
    return checked


def _check_options(job: Job, target: Exporter, options: EngineOptions) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises: BadInput.
    """
    time, source = job.limits.time, job.source
    target.check(options, job.pool)
    check_threads(job.threads)
    if job.threads:
        target.threads(job.threads)
    check_different(job.points)
    if time is not None and not target.reads_onnx and (job.tokens is not None or TOKENS in source.units):
        raise BadInput(
            f"engine {job.engine} runs what merges tokens as a graph, and the dense model as its class: a time of "
            "both does not tell what merging saves. Plan for an engine that reads graphs, such as --engine onnx."
        )
    if time is not None and not (job.dense and job.points):
        raise BadInput(f"{time} is measured beside the dense model: leave out --no-dense.")
    if job.table is not None and time is None:
        raise BadInput(f"--latency-table {job.table} is for --latency, --speedup or --throughput: give one of them.")


def _fitted(choice: Choice, job: Job, prepared: Prepared) -> Choice:
    """Return how widths are chosen in this network, checked against it.

    Raises: BadInput, InfeasibleBudget.
    """
    ready = prepared.ready
    choice = merging(ready, aligned(ready.layout, choice, job.align), job.tokens)
    check(ready, job.limits, choice)
    if choice.allocation == "curves":
        judged_samples(ready.rows.calibration.batches)  # enough of them
    return choice


def _check_points(job: Job, options: EngineOptions, prepared: Prepared, precision: str) -> None:
    """Refuse points and profiles that the network does not take, or that no memory would hold.

    Raises: BadInput.
    """
    network, inputs, profiles = prepared.ready.network, inputs_of(prepared), options.sizes()
    for point in job.points:
        settled = inputs.settled(point)
        room = least_bytes(network, inputs.feeds(replace(settled, batch=1)), precision)
        check_room(room, str(point), point.batch)
        if profiles and not any(profile.holds(settled.batch, settled.seq) for profile in profiles):
            raise BadInput(
                f"the point to measure, {str(settled).removeprefix('--at ')}, lies outside of --profile "
                f"{' and '.join(map(str, profiles))}. Give --at with a point inside, or wider profiles."
            )
    for profile in profiles:
        longest = profile.up_to(prepared.dense.longest).seq[2]
        seq = longest if inputs.settled(Point()).seq is not None else None
        room = least_bytes(network, inputs.feeds(Point(1, seq)), precision)
        check_room(room, f'--profile "{profile}"', profile.batch[2])


def _check_needed(asked: CheckedJob) -> None:
    """Refuse a time that the dense network keeps clearly: by its table, or measured here for a few seconds.

    Raises: InfeasibleBudget. BadInput: the table is of another network or setting.
    """
    job, limits = asked.job, asked.job.limits
    if job.table is not None:
        table = LatencyTable.read(job.table)
        table.check(asked.prepared.ready.layout)
    assert limits.time is not None, "there is a time to plan for"
    if limits.time.option == "--speedup" or limits.budgets():
        return
    point = job.points[0]
    if job.table is not None:
        limits.time.check_needed(table.dense_ns / 10**6, point.batch)
        return
    with width_timer(asked.prepared, asked.target, asked.spec, point, threads=job.threads) as yard:
        samples = yard.together((), blocks=2).ms[DENSE]
    dense_ms = percentile([ms for block in samples for ms in block], 50)
    limits.time.check_needed(CLEARLY * dense_ms, point.batch, shown_ms=dense_ms)


def describe(prepared: Prepared, *, limits: Limits, artifact: Path) -> list[str]:
    """What a job would do, line by line."""
    ready = prepared.ready
    budgets = [
        f"{limit.asked}: {limit.most:,} of {limit.resource.dense:,}" for limit in limits_within(ready.costs, limits)
    ]
    if limits.max_drop is not None:
        budgets.append(f"--max-drop {limits.max_drop:g}: the smallest model that loses no more points")
    if limits.time is not None:
        budgets.append(f"{limits.time}: planned by a latency table, then measured and corrected")
    units: dict[str, int] = {}
    for group in ready.layout.groups:
        if group.kind in ready.kinds:
            units[group.kind] = units.get(group.kind, 0) + group.units
    loaded = prepared.dense.loaded
    what = "ONNX file" if loaded is None else f"{type(loaded.model).__name__}, {loaded.task.name}"
    held_out = 0 if ready.rows.held_out is None else len(ready.rows.held_out)
    return [
        f"model        {prepared.source.model}: {what}, {len(ready.layout.groups)} groups",
        f"units        {', '.join(f'{count} {kind}' for kind, count in units.items())}",
        f"compared     {ready.subject.reading.output} as {ready.subject.reading.kind}",
        f"calibration  {len(ready.rows.calibration)} samples, {held_out} held out",
        *(f"budget       {budget}" for budget in budgets),
        f"writes       {artifact}",
        "dry run: nothing was written",
    ]
