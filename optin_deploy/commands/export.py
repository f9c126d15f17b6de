"""`optin-export`: the whole job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.amounts import align_of
from optin_deploy.commands.job_file import job_text, read_job
from optin_deploy.commands.options import (
    BudgetInTime,
    Building,
    Engine,
    Making,
    Measuring,
    Model,
    Scoring,
    Writing,
)
from optin_deploy.commands.parsing import check_columns, echo, engine_options, refuse_idle, warn_if_bundled
from optin_deploy.commands.source import AllRows
from optin_deploy.commands.values import options
from optin_deploy.errors import CannotBuildHere
from optin_deploy.jobs.job import Job
from optin_deploy.reporting.terminal import print_report, stage_bar
from optin_deploy.tuning.settings import parse_tune

EXPORT_EXAMPLES = """
Examples:

    optin-export sentence-transformers/all-MiniLM-L6-v2 --calibration articles.jsonl

    optin-export ./my-bert --flops 0.4 --at batch=1,seq=128 --at batch=32,seq=128 --threads 2

    optin-export ./my-bert --calibration texts.jsonl --latency 4.0ms --at batch=1,seq=128

    optin-export ./my-vit --calibration photos/ --engine trt --prepare-only

    optin-export model.onnx --calibration texts.jsonl --tokenizer ./my-tokenizer --flops 0.6

    optin-export model.onnx --calibration inputs.npz --at batch=1 --at batch=8

    optin-export ./my-vit --calibration photos/ --samples 2048 --flops 0.25 --tune minutes=5

    optin-export --config my-bert-0.6/job.toml --flops 0.5   # the same job, with another budget
"""


@dataclass(frozen=True)
class Target:
    """The engine, how it is built, and where it is measured."""

    engine: Engine
    building: Building
    measuring: Measuring


@dataclass(frozen=True)
class TunedMaking(Making):
    """The same, and what is trained afterwards."""

    tune: Annotated[
        str | None,
        typer.Option(
            metavar="minutes=N",
            help="Tune what is left towards the dense outputs on the calibration rows, without labels, for so many "
            "minutes: minutes=5, or minutes=5,steps=1000,lr=2e-4,batch=32. [default: nothing is trained]",
        ),
    ] = None


@dataclass(frozen=True)
class Output(Writing):
    """The place of the result, how what is there is treated, and the file of options."""

    out: Annotated[Path | None, typer.Option(help="Output folder. [default: ./MODEL-BUDGET]")] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="JOB.toml",
            help="File with options by their names, as job.toml of an output folder; those given here win.",
            is_eager=True,
            callback=read_job,
        ),
    ] = None


@options
def export(
    ctx: typer.Context,
    model: Model,
    rows: AllRows,
    budget: BudgetInTime,
    making: TunedMaking,
    scoring: Scoring,
    target: Target,
    output: Output,
) -> None:
    """Prune MODEL end to end: score, cut, compensate, export, prove, measure, report."""
    check_columns(ctx, rows.calibration, making.evaluation)
    limits, scored = budget.limits(), scoring.settings()  # refused before anything heavy is imported
    judge = None if making.evaluation is None else str(making.evaluation.absolute())
    source = rows.source(model, evaluation=judge, drop_tokens=making.drop_tokens)
    chosen = engine_options(ctx, target.engine.engine)
    job = Job(
        source=source,
        limits=limits,
        engine=target.engine.engine,
        precision=target.engine.precision,
        align=align_of(making.align),
        allocation=making.allocation,
        tokens=making.tokens,
        scoring=scored,
        memory_budget=scoring.memory(),
        compensation=making.compensation,
        tuning=None if making.tune is None else parse_tune(making.tune),
        points=target.measuring.points(),
        threads=target.measuring.threads,
        table=budget.latency_table,
        pool=target.building.pool,
        options=chosen,
        dense=target.building.dense,
    )
    if not job.dense:
        refuse_idle(ctx, "at", "threads", why="with --no-dense nothing is measured")
    folder = output.out or Path(f"{named(source)}-{job.limits}")
    from optin_deploy.jobs.checked import checked_job, describe
    from optin_deploy.jobs.export import export_model
    from optin_deploy.jobs.workspace import Workspace

    if output.dry_run:
        Workspace.check(folder, source, force=output.force)
        asked = checked_job(job)
        name, _ = asked.target.file_names(asked.spec.precision or asked.target.precisions[0])
        echo(describe(asked.prepared, limits=job.limits, artifact=folder / name))
        return
    warn_if_bundled(rows.calibration)
    try:
        with Workspace.at_work(folder, source, force=output.force):
            report = export_model(job, folder, options=job_text(ctx), force=output.force, stage=stage_bar)
    except CannotBuildHere as err:
        if not target.building.prepare_only:
            raise
        typer.echo(str(err))
        return
    print_report(report, folder)


def named(source: Any) -> str:
    """What output folders are called after."""
    name = Path(source.model).resolve().name if Path(source.model).exists() else source.model.split("/")[-1]
    return Path(name).stem if source.is_file else name
