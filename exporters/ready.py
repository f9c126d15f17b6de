"""Load what a job needs, and refuse early what cannot be done; say what would be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporters import check_precision, exporter
from exporters.base import Exporter, ExportSpec, output_names
from exporters.bench.measuring import Point, check_runs, check_threads, length_of
from exporters.bench.yardstick import setting_of
from exporters.building import int8_samples
from exporters.profiles import Profile
from exporters.tensorrt_plan import EngineOptions
from exporters.to_onnx import check_size
from optin_deploy.budget import Limits
from optin_deploy.cost.latency import read_table
from optin_deploy.errors import BadInput
from optin_deploy.search import check_search
from optin_deploy.stages import Prepared, prepare
from optin_deploy.workspace import Source


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
    target = exporter(engine)
    precision = check_precision(target, precision)
    options = options or EngineOptions()
    target.check(options)
    check_search(target.align if align is None else align, allocation)
    check_threads(threads)
    prepared = prepare(source)
    (limits or Limits()).within(prepared.cost, prepared.params)
    output_names(prepared.loaded.model, pool)
    if target.reads_onnx:
        check_size(prepared.loaded.model, precision)
    for point in points:
        tokens = length_of(point, prepared.loaded.model, prepared.cost.tokens)
        if target.has_profiles:
            _check_profiles(options.profiles, point.batch, tokens if prepared.loaded.is_text else None)
    samples = int8_samples(prepared.calibration.batches) if precision == "int8" else ()
    spec = ExportSpec(precision, pool, options, samples)
    timed = limits is not None and limits.time is not None
    if timed:
        check_timeable(target, spec)
    if table is not None:
        if not timed:
            raise BadInput(f"--latency-table {table} is for --latency, --speedup or --throughput: give one of them.")
        align = target.align if align is None else align
        read_table(table, prepared.layout, setting_of(prepared, target, spec, points[0], threads=threads, align=align))
    return target, spec, prepared


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
