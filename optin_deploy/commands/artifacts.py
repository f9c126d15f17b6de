"""`optin build` and `bench`: engines, and what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from optin_deploy.commands.options import (
    At,
    Compatible,
    Dense,
    DeviceTime,
    DryRun,
    Engine,
    Folder,
    Force,
    Memory,
    Operators,
    Pool,
    Precision,
    PrepareOnly,
    ProfileOption,
    Protocol,
    Qps,
    Scenario,
    Seconds,
    SuiteFile,
    TargetLatency,
    Threads,
    TimingCache,
    Weights,
    Workspace_,
)
from optin_deploy.commands.parsing import (
    check_plan_options,
    echo,
    engine_options,
    load_of,
    refuse_idle,
    warn_of_disagreements,
    writing,
)
from optin_deploy.errors import BadInput
from optin_deploy.reporting.terminal import print_latency, print_table, stage_bar

BUILD_EXAMPLES = """
Examples:

    optin build work --engine onnx

    optin build work --engine trt
"""


@writing
def build(
    ctx: typer.Context,
    folder: Folder,
    engine: Engine = "onnx",
    precision: Precision = None,
    pool: Pool = None,
    dense: Dense = True,
    profile: ProfileOption = None,
    workspace: Workspace_ = None,
    timing_cache: TimingCache = None,
    compatible: Compatible = None,
    weights: Weights = "fixed",
    prepare_only: PrepareOnly = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Export the model in DIR to an engine, and prove that it computes the same."""
    from optin_deploy.jobs.export import build_folder

    check_plan_options(ctx, engine)
    options = engine_options(profile, workspace, timing_cache, compatible, weights)
    warn_of_disagreements(folder)
    with stage_bar("export"):
        built = build_folder(
            folder, engine=engine, precision=precision, pool=pool, options=options, dense=dense, dry_run=dry_run
        )
    if built is None:
        typer.echo(f"would export {folder / 'model'} to engine {engine}")
        return
    for pair in built.pairs:
        for artifact in pair.artifacts().values():
            size = f"{artifact.size_bytes / 2**20:.1f} MiB"
            typer.echo(f"{artifact.path}  {pair.precision}  {size}  sha256 {artifact.sha256[:12]}")
    if built.problem is not None and not prepare_only:
        raise built.problem
    if built.obstacle is not None:
        typer.echo(f"not run here: {built.obstacle}")


BENCH_EXAMPLES = """
Example:

    optin bench work --at batch=1,seq=128 --at batch=8,seq=128 --threads 2

    optin bench work --suite matrix.toml

    optin bench work --operators

    optin bench work --protocol mlperf --scenario server --qps 50 --target-latency 20

    optin bench work --engine trt --device-time
"""


@writing
def bench(
    ctx: typer.Context,
    folder: Folder,
    engine: Engine = "onnx",
    precision: Precision = None,
    at: At = None,
    threads: Threads = 0,
    suite: SuiteFile = None,
    memory: Memory = False,
    device_time: DeviceTime = False,
    operators: Operators = False,
    protocol: Protocol = "interleaved",
    scenario: Scenario = None,
    seconds: Seconds = None,
    qps: Qps = None,
    target_latency: TargetLatency = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Measure the dense and the pruned artifact in DIR against each other, interleaved, with confidence intervals."""
    from optin_deploy.jobs.bench import Bench, bench_folder
    from optin_deploy.jobs.suites import bench_suite, read_suite
    from optin_deploy.measuring.points import Point, parse_points

    warn_of_disagreements(folder)
    points = parse_points(at) or (Point(),)
    load = load_of(protocol, scenario, seconds, qps, target_latency)
    if load is not None:
        if suite is not None or memory or operators or device_time:
            raise BadInput(
                "--protocol mlperf stands alone: leave out --suite, --memory, --operators and --device-time."
            )
        _loadgen(folder, Bench(engine, precision, points, threads), load, dry_run=dry_run)
        return
    if operators and (engine != "onnx" or suite is not None):
        raise BadInput(f"--operators is ONNX Runtime's profiler: it is for --engine onnx, not {suite or engine}.")
    if device_time and suite is not None:
        raise BadInput(f"--device-time beside --suite: write `device_time = true` into {suite}.")
    if suite is not None:
        refuse_idle(
            ctx, "engine", "precision", "at", "threads", "memory", why=f"{suite} says what is measured, and how"
        )
        measured = bench_suite(folder, read_suite(suite), dry_run=dry_run, stage=stage_bar)
    else:
        bench = Bench(engine, precision, points, threads, memory, device_time)
        measured = bench_folder(folder, bench, dry_run=dry_run, stage=stage_bar)
    if dry_run:
        typer.echo(f"would measure {suite}" if suite else f"would measure {len(points)} points on engine {engine}")
        return
    print_latency(measured)
    if operators:
        _explain(folder, precision, points, threads)


def _loadgen(folder: Path, bench: Any, load: Any, *, dry_run: bool) -> None:
    from optin_deploy.jobs.loadgen_runs import FILE, LOGS, bench_loadgen
    from optin_deploy.measuring.loadgen import HEADER, compared_lines, run_rows

    found = bench_loadgen(folder, bench, load, dry_run=dry_run, stage=stage_bar)
    if found is None:
        typer.echo(f"would run LoadGen's {load.scenario} scenario four times on engine {bench.engine}")
        return
    print_table(HEADER, run_rows(found.runs), f"{load.scenario}, by LoadGen")
    echo([*compared_lines(found), f"Figures are in {folder / FILE}, LoadGen's logs in {folder / LOGS}."])


def _explain(folder: Path, precision: str | None, points: Sequence[Any], threads: int) -> None:
    from optin_deploy.jobs.operator_times import FILE, explain_folder
    from optin_deploy.measuring.diagnosis import LAYER_HEADER, OPERATOR_HEADER, explained, layer_rows, operator_rows

    for found in explain_folder(folder, points, precision=precision, threads=threads):
        title = f"{found.batch} x {found.seq_len}, by ONNX Runtime's profiler (in {folder / FILE})"
        print_table(LAYER_HEADER, layer_rows(found.dense, found.pruned, found.cut), title)
        print_table(OPERATOR_HEADER, operator_rows(found.dense, found.pruned))
        for line in explained(found.dense, found.pruned, found.cut):
            typer.echo(line)
