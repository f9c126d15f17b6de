"""`optin profile`: what the widths of groups take on an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.amounts import align_of
from optin_deploy.commands.options import Engine, EngineAlign, Model, OfEngine, ProfileSizes, Threads, Writing
from optin_deploy.commands.parsing import engine_options
from optin_deploy.commands.source import RowOptions
from optin_deploy.commands.values import options
from optin_deploy.common.validation import whole_number
from optin_deploy.jobs.job import Job
from optin_deploy.measuring.points import Point, parse_point
from optin_deploy.reporting.terminal import print_table, stage_bar

PROFILE_EXAMPLES = """
Examples:

    optin profile ./my-bert --at batch=1,seq=128 --threads 2 --out latency.json

    optin profile ./my-bert --engine openvino --check 20
"""

MOST_PLANS = 1000
"""Most plans of --check; each takes half a minute."""


@dataclass(frozen=True)
class Table:
    """How the table is measured."""

    at: Annotated[str, typer.Option(help="The size of input.")] = str(Point()).removeprefix("--at ")
    threads: Threads = Job.threads
    align: EngineAlign = None
    profile: ProfileSizes = None
    engine_option: OfEngine = None
    check: Annotated[int, typer.Option(help="Random plans to measure, to see how wrong the table is.")] = 0


@options
def profile(
    ctx: typer.Context,
    model: Model,
    rows: RowOptions,
    engine: Engine,
    table: Table,
    writing: Writing,
    out: Annotated[Path | None, typer.Option(help="File. [default: ./MODEL-ENGINE-latency.json]")] = None,
) -> None:
    """Measure a latency table of MODEL on an engine, for optin-export --latency, --speedup and --throughput."""
    from optin_deploy.jobs.profiling import profile_model
    from optin_deploy.planning.latency import TABLE_HEADER, held_out_line, table_rows

    chosen = engine_options(ctx, engine.engine)
    whole_number(table.check, "--check", 0, MOST_PLANS, "Each plan is a model that is measured.")
    source = rows.source(model)
    path = out or Path(f"{Path(source.model).name}-{engine.engine}-latency.json")
    job = Job(
        source=source,
        engine=engine.engine,
        precision=engine.precision,
        align=align_of(table.align),
        points=(parse_point(table.at),),
        threads=table.threads,
        options=chosen,
    )
    force, dry_run = writing.force, writing.dry_run
    found = profile_model(job, path, check=table.check, force=force, dry_run=dry_run, stage=stage_bar)
    if found is None:
        typer.echo(f"would measure {model} on engine {engine.engine} and write {path}")
        return
    title = f"{found.dense_ns / 10**6:.3g} ms dense; milliseconds that a group saves"
    print_table(TABLE_HEADER, table_rows(found), title)
    if found.held_out:
        typer.echo(held_out_line(found))
    typer.echo(f"Wrote {path}")
