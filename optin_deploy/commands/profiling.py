"""`optin profile`: what the widths of groups take on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.data import Preprocessor, Tokenizer, source_of
from optin_deploy.commands.networks import Shape
from optin_deploy.commands.options import (
    Calibration,
    DryRun,
    Engine,
    EngineAlign,
    Force,
    Model,
    Precision,
    ProfileOption,
    Seed,
    SeqLen,
    Task,
    Threads,
)
from optin_deploy.commands.parsing import check_plan_options, engine_options
from optin_deploy.reporting.terminal import print_table, stage_bar

PROFILE_EXAMPLES = """
Examples:

    optin profile ./my-bert --at batch=1,seq=128 --threads 2 --out latency.json

    optin profile ./my-bert --engine openvino --check 20
"""

MOST_PLANS = 1000
"""Of --check; half a minute each."""


def profile(
    ctx: typer.Context,
    model: Model,
    task: Task = None,
    calibration: Calibration = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    preprocessor: Preprocessor = None,
    shape: Shape = None,
    engine: Engine = "onnx",
    precision: Precision = None,
    at: Annotated[str, typer.Option(help="The size of input.")] = "batch=1",
    threads: Threads = 0,
    align: EngineAlign = None,
    profile_sizes: ProfileOption = None,
    check: Annotated[int, typer.Option(help="Random plans to measure, to see how wrong the table is.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File. [default: ./MODEL-ENGINE-latency.json]")] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Measure a latency table of MODEL on an engine, for optin-export --latency, --speedup and --throughput."""
    from optin_deploy.common.validation import whole_number
    from optin_deploy.jobs.profiling import profile_model
    from optin_deploy.jobs.request import Request
    from optin_deploy.measuring.points import parse_point
    from optin_deploy.planning.latency import TABLE_HEADER, held_out_line, table_rows

    check_plan_options(ctx, engine)
    whole_number(check, "--check", 0, MOST_PLANS, "Each plan is a model that is measured.")
    source = source_of(ctx.params)
    path = out or Path(f"{Path(source.model).name}-{engine}-latency.json")
    request = Request(
        source=source,
        engine=engine,
        precision=precision,
        align=align,
        points=(parse_point(at),),
        threads=threads,
        options=engine_options(profile_sizes, None, None, None, "fixed"),
    )
    table = profile_model(request, path, check=check, force=force, dry_run=dry_run, stage=stage_bar)
    if table is None:
        typer.echo(f"would measure {model} on engine {engine} and write {path}")
        return
    title = f"{table.dense_ns / 10**6:.3g} ms dense; milliseconds that a group saves"
    print_table(TABLE_HEADER, table_rows(table), title)
    if table.held_out:
        typer.echo(held_out_line(table))
    typer.echo(f"Wrote {path}")
