"""`optin build` and `bench`: engines, and what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.options import Building, Engine, Folder, Measuring, Writing
from optin_deploy.commands.parsing import echo, engine_options, refuse_idle, warn_of_disagreements, writing_to
from optin_deploy.commands.values import options
from optin_deploy.common.formatting import size
from optin_deploy.errors import BadInput
from optin_deploy.measuring.loadgen import HEADER, LoadSettings, compared_lines, run_rows
from optin_deploy.reporting.terminal import print_latency, print_table, stage_bar

of_loadgen = partial(typer.Option, rich_help_panel="MLCommons LoadGen")
BUILD_EXAMPLES = """
Examples:

    optin build work --engine onnx

    optin build work --engine trt
"""


@options
def build(ctx: typer.Context, folder: Folder, engine: Engine, building: Building, writing: Writing) -> None:
    """Export the model in DIR to an engine, and prove that it computes the same."""
    from optin_deploy.jobs.folder_build import FolderBuild
    from optin_deploy.reporting.artifact_table import artifact_table, artifact_warnings

    chosen, job = engine_options(ctx, engine.engine), FolderBuild(folder)
    with writing_to(folder, writing):
        warn_of_disagreements(folder)
        with stage_bar("export"):
            built = job.build(
                engine=engine.engine,
                precision=engine.precision,
                pool=building.pool,
                options=chosen,
                dense=building.dense,
                dry_run=writing.dry_run,
            )
    if built is None:
        typer.echo(f"would export {folder / 'model'} to engine {engine.engine}")
        return
    artifacts = [(each, pair.precision) for pair in built.pairs for each in pair.artifacts().values()]
    lines = [
        f"{each.path}  {of_type}  {size(each.size_bytes)}  sha256 {each.sha256[:12]}" for each, of_type in artifacts
    ]
    echo([*dict.fromkeys(lines)])  # an engine that runs the ONNX file builds no other
    if built.problem is not None and not building.prepare_only:
        raise built.problem
    rows, left_out = job.judge(built)
    if rows:
        print_table(*artifact_table(rows, []))
    echo([*artifact_warnings(rows), *left_out])
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


@dataclass(frozen=True)
class Besides:
    """What is measured beside the latency, or in place of it."""

    suite: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of lists: engines, precisions, threads, batch, seq. Every combination is measured."
        ),
    ] = None
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too, in fresh processes.")] = False
    device_time: Annotated[
        bool,
        typer.Option(
            "--device-time",
            help="Measure the time on the GPU too, without transfers, with and without a CUDA graph.",
        ),
    ] = False
    operators: Annotated[
        bool,
        typer.Option(
            "--operators", help="Profile by operator and by layer too, and say what holds the rest of the time."
        ),
    ] = False


@dataclass(frozen=True)
class Protocol:
    """Who says how it is measured."""

    protocol: Annotated[
        str, of_loadgen(help="interleaved (our own, with confidence intervals) or mlperf (LoadGen's scenarios).")
    ] = "interleaved"
    scenario: Annotated[str | None, of_loadgen(help="single-stream, offline or server. [default: single-stream]")] = (
        None
    )
    seconds: Annotated[
        float | None,
        of_loadgen(help="Least duration of each of the four runs; MLPerf's own rules ask for 600. [default: 10]"),
    ] = None
    qps: Annotated[float | None, of_loadgen(help="Server: queries a second, Poisson arrivals.")] = None
    target_latency: Annotated[
        float | None, of_loadgen(help="Server: milliseconds that 99% of the queries must keep.")
    ] = None

    def load(self) -> LoadSettings | None:
        """Return what LoadGen sends, checked; None means our own protocol."""
        asked = {"scenario": self.scenario, "seconds": self.seconds, "qps": self.qps}
        given = {k: v for k, v in {**asked, "target_latency_ms": self.target_latency}.items() if v is not None}
        if self.protocol not in ("interleaved", "mlperf"):
            raise BadInput(f"--protocol {self.protocol!r}: possible are interleaved, mlperf.")
        if self.protocol == "mlperf":
            return LoadSettings(**given)  # type: ignore[arg-type]  # a dict forgets which value is of which type
        if given:
            raise BadInput("--scenario, --seconds, --qps and --target-latency are LoadGen's: add --protocol mlperf.")
        return None


@options
def bench(
    ctx: typer.Context,
    folder: Folder,
    engine: Engine,
    measuring: Measuring,
    besides: Besides,
    protocol: Protocol,
    writing: Writing,
) -> None:
    """Measure the dense and the pruned artifact in DIR against each other, interleaved, with confidence intervals."""
    from optin_deploy.jobs.bench import BenchSettings

    with writing_to(folder, writing):
        warn_of_disagreements(folder)
        bench = BenchSettings(engine.engine, engine.precision, measuring.points(), measuring.threads)
        load = protocol.load()
        if load is None:
            _interleaved(ctx, folder, bench, besides, dry_run=writing.dry_run)
            return
        if besides != Besides():
            raise BadInput(
                "--protocol mlperf stands alone: leave out --suite, --memory, --operators and --device-time."
            )
        _loadgen(folder, bench, load, dry_run=writing.dry_run)


def _interleaved(ctx: typer.Context, folder: Path, bench: Any, besides: Besides, *, dry_run: bool) -> None:
    from optin_deploy.jobs.bench import bench_folder
    from optin_deploy.jobs.suites import read_suite

    suite, operators = besides.suite, besides.operators
    if operators and (bench.engine != "onnx" or suite is not None):
        raise BadInput(f"--operators is ONNX Runtime's profiler: it is for --engine onnx, not {suite or bench.engine}.")
    if besides.device_time and suite is not None:
        raise BadInput(f"--device-time beside --suite: write `device_time = true` into {suite}.")
    if suite is not None:
        refuse_idle(
            ctx, "engine", "precision", "at", "threads", "memory", why=f"{suite} says what is measured, and how"
        )
        measured = bench_folder(folder, *read_suite(suite).benches(), dry_run=dry_run, stage=stage_bar)
    else:
        bench = replace(bench, memory=besides.memory, device_time=besides.device_time)
        measured = bench_folder(folder, bench, dry_run=dry_run, stage=stage_bar)
    if dry_run:
        many = len(bench.points)
        typer.echo(f"would measure {suite}" if suite else f"would measure {many} points on engine {bench.engine}")
        return
    print_latency(measured)
    if operators:
        _explain(folder, bench.precision, bench.points, bench.threads)


def _loadgen(folder: Path, bench: Any, load: Any, *, dry_run: bool) -> None:
    from optin_deploy.jobs.loadgen_runs import FILE, LOGS, bench_loadgen

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
