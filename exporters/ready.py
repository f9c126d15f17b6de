"""Load what a job needs, and refuse early what cannot be done; say what would be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters import check_precision, exporter
from exporters.base import Exporter, ExportSpec, output_names
from exporters.bench.measuring import Point, check_different, check_runs, check_threads, length_of
from exporters.bench.room import check_room, least_bytes
from exporters.bench.yardstick import DENSE, setting_of, yardstick
from exporters.building import int8_samples
from exporters.profiles import Profile
from exporters.tensorrt_plan import EngineOptions
from exporters.to_onnx import check_size
from optin_deploy.bench.stats import percentile
from optin_deploy.budget import Limits
from optin_deploy.cost.latency import LatencyTable, read_table
from optin_deploy.errors import BadInput
from optin_deploy.inputs import longest_text
from optin_deploy.judging import judged_samples
from optin_deploy.search import check_align, check_search, check_units, default_align
from optin_deploy.stages import Prepared, prepare
from optin_deploy.workspace import Source

CLEARLY = 1.2
"""A target so far above a quick measurement of the dense model is beyond its noise; the latency table judges others."""


def ready(
    source: Source,
    *,
    limits: Limits | None = None,
    engine: str = "onnx",
    precision: str | None = None,
    align: int | None = None,
    allocation: str = "curves",
    points: Sequence[Point] = (),
    threads: int = 0,
    table: Path | None = None,
    pool: str | None = None,
    options: EngineOptions | None = None,
) -> tuple[Exporter, ExportSpec, Prepared]:
    """Load what a job needs and refuse, before the long work and before anything is written, what cannot be done.

    Raises: BadInput and its kinds.
    """
    target, limits = exporter(engine), limits or Limits()
    precision = check_precision(target, precision)
    options = options or EngineOptions()
    target.check(options, pool)
    check_search(target.align if align is None else align, allocation)
    check_threads(threads)
    if threads:
        target.threads(threads)
    check_different(points)
    if table is not None and limits.time is None:
        raise BadInput(f"--latency-table {table} is for --latency, --speedup or --throughput: give one of them.")
    prepared = prepare(source)
    if not prepared.loaded.is_text and source.seq_len != Source.seq_len:
        raise BadInput(f"--seq-len {source.seq_len}: images have a size of their own, and no length in tokens.")
    align = default_align(prepared.layout, target.align) if align is None else align
    check_align(align, prepared.layout)
    within = limits.within(prepared.cost, prepared.params)
    check_units(within, prepared.layout, prepared.cost, align=align, allocation=allocation)
    if allocation == "curves":
        judged_samples(prepared.calibration.batches)  # enough of them
    output_names(prepared.loaded.model, pool)
    if target.reads_onnx:
        check_size(prepared.loaded.model, precision)
    for point in points:
        tokens = length_of(point, prepared.loaded.model, prepared.cost.tokens)
        _check_room(prepared, point.batch, tokens, precision, str(point))
        if target.has_profiles:
            _check_profiles(options.profiles, point.batch, tokens if prepared.loaded.is_text else None)
    for profile in options.profiles if target.has_profiles else ():
        longest = profile.up_to(longest_text(prepared.loaded.model.config)).seq[2]
        tokens = longest if prepared.loaded.is_text else prepared.cost.tokens
        _check_room(prepared, profile.batch[2], tokens, precision, f'--profile "{profile}"')
    samples = int8_samples(prepared.calibration.batches) if precision == "int8" else ()
    spec = ExportSpec(precision, pool, options, samples)
    if limits.time is not None:
        check_timeable(target, spec)
        how: dict[str, Any] = {"threads": threads, "align": align}
        known = None
        if table is not None:
            known = read_table(table, prepared.layout, setting_of(prepared, target, spec, points[0], **how))
        _check_needed(limits, prepared, target, spec, points[0], how, known)
    return target, spec, prepared


def check_measured(limits: Limits, points: Sequence[Point], *, dense: bool) -> None:
    """Refuse a time to plan for where nothing would be measured.

    Raises: BadInput.
    """
    if limits.time is not None and not (dense and points):
        raise BadInput(f"{limits.time} is measured beside the dense model: leave out --no-dense.")


def _check_room(prepared: Prepared, batch: int, tokens: int, precision: str, option: str) -> None:
    each = least_bytes(prepared.loaded.model, prepared.layout, tokens=tokens, precision=precision)
    check_room(each, option, batch)


def _check_needed(
    limits: Limits,
    prepared: Prepared,
    target: Exporter,
    spec: ExportSpec,
    point: Point,
    how: Mapping[str, Any],
    table: LatencyTable | None,
) -> None:
    """Refuse a time that the dense model keeps clearly: by its table, or measured here for a few seconds.

    Raises: InfeasibleBudget.
    """
    if limits.time is None or limits.time.option == "--speedup" or limits.budgets():
        return
    if table is not None:
        limits.time.check_needed(table.dense_ms, point.batch)
        return
    with yardstick(prepared, target, spec, point, **how) as yard:
        samples = yard.together((), blocks=2).ms[DENSE]
    dense_ms = percentile([ms for block in samples for ms in block], 50)
    limits.time.check_needed(CLEARLY * dense_ms, point.batch, told_ms=dense_ms)


def check_timeable(target: Exporter, spec: ExportSpec) -> None:
    """Refuse an engine whose times cannot be planned by on this machine.

    Raises: BadInput.
    """
    check_runs(target, spec.precision)
    if spec.precision == "int8":
        raise BadInput(
            "--precision int8 chooses for each model what stays in float, so that its time cannot be foretold from "
            "widths. Give --flops, and measure what comes out."
        )


def _check_profiles(profiles: Sequence[Profile], batch: int, tokens: int | None) -> None:
    if not any(profile.holds(batch, tokens) for profile in profiles):
        at = f"batch={batch}" + ("" if tokens is None else f",seq={tokens}")
        raise BadInput(
            f"the point to measure, {at}, lies outside of --profile {' and '.join(map(str, profiles))}. "
            "Give --at with a point inside, or wider profiles."
        )


def describe(prepared: Prepared, *, limits: Limits, artifact: Path) -> list[str]:
    """What a job would do, line by line."""
    layers = prepared.layout.layers
    budgets = [
        f"{budget}: {limit:,} of {cost.dense:,}"
        for budget, (cost, limit) in zip(limits.budgets(), limits.within(prepared.cost, prepared.params), strict=True)
    ]
    if limits.max_drop is not None:
        budgets.append(f"--max-drop {limits.max_drop:g}: the smallest model that loses no more points")
    if limits.time is not None:
        budgets.append(f"{limits.time}: planned by a latency table, then measured and corrected")
    model = f"{prepared.layout.model_class}, {prepared.loaded.task}, {len(layers)} layers"
    return [
        f"model        {prepared.source.model}: {model}",
        f"units        {sum(x.heads for x in layers)} heads, {sum(x.neurons for x in layers)} neurons",
        f"calibration  {len(prepared.calibration)} samples, {len(prepared.held_out)} held out",
        *(f"budget       {budget}" for budget in budgets),
        f"writes       {artifact}",
        "dry run: nothing was written",
    ]
