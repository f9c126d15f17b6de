"""`optin plan`, `sweep` and `rewrite`: what to keep, and the smaller model.

Of the output folder of a job, or, with --magnitude or an ONNX file, of any network (`commands.networks`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.amounts import align_of
from optin_deploy.commands.networks import CutOfNetwork, PlanOfNetwork, plan_network, rewrite_network
from optin_deploy.commands.options import BudgetOptions, Compensation, Folder, FolderOrFile, Making, Writing
from optin_deploy.commands.parsing import echo, given, refuse_idle, writing_to
from optin_deploy.commands.values import options
from optin_deploy.errors import BadInput
from optin_deploy.jobs.job import Job
from optin_deploy.planning.budget import Limits, parse_shares
from optin_deploy.reporting.terminal import print_plan, print_table, stage_bar
from optin_deploy.structure.labels import TOKENS

PLAN_EXAMPLES = """
Examples:

    optin plan work --flops 0.5 --align 64

    optin plan work --params 0.6 --size 60MiB

    optin plan work --max-drop 1.0 --eval labelled.jsonl

    optin plan work --allocation uniform   # equal widths in all layers

    optin plan model.onnx --magnitude --flops 0.7 --out plan.json   # any network, without data
"""
OF_JOBS = ("max_drop", "evaluation", "compensation", "tokens", "drop_tokens")
"""Options of `plan` that only the output folder of a job has a use for."""
OF_NETWORKS = ("units", "out", "shape")
"""Those that it has none for."""


@options
def plan(
    ctx: typer.Context,
    folder: FolderOrFile,
    budget: BudgetOptions,
    making: Making,
    network: PlanOfNetwork,
    writing: Writing,
) -> None:
    """Choose what to keep under a budget; writes plan.json from the scores in DIR.

    With --magnitude, of an ONNX file or a model without scores; writes --out.
    """
    if network.magnitude:
        refuse_idle(ctx, *OF_JOBS, why="a plan by --magnitude is made without data")
        allocation = making.allocation if given(ctx, "allocation") else None
        plan_network(str(folder), budget.limits(), network, align=making.align, allocation=allocation, writing=writing)
        return
    if folder.suffix.lower() == ".onnx":
        raise BadInput(
            f"{folder}: an ONNX file has no scores of its own. Add --magnitude: norms of weights need no data."
        )
    refuse_idle(ctx, *OF_NETWORKS, why="they are for --magnitude")
    limits = budget.limits()
    with writing_to(folder, writing):
        _plan_job(ctx, folder, limits, making, writing)


def _plan_job(ctx: typer.Context, folder: Path, limits: Limits, making: Making, writing: Writing) -> None:
    """Plan from the scores of a job."""
    from optin_deploy.jobs.checked import describe
    from optin_deploy.jobs.sweep import planned

    if making.evaluation is not None and limits.max_drop is None:
        raise BadInput("--eval judges models for --max-drop, which is not given. `optin sweep` takes --eval too.")
    if limits.max_drop is None:
        refuse_idle(ctx, "compensation", why="a plan is made without it; `optin rewrite` takes it, and --max-drop")
    planner = planner_of(folder, making, limits)
    if writing.dry_run:
        echo(describe(planner.prepared, limits=limits, artifact=folder / "plan.json"))
        return
    found, best = planned(planner, limits, compensation=making.compensation, stage=stage_bar)
    print_plan(found, planner.prepared.ready.layout.units)
    if best is not None:
        typer.echo(str(best.quality))
    typer.echo(f"Wrote {folder / 'plan.json'}. Next: optin rewrite {folder}")


def planner_of(folder: Path, making: Making, limits: Any = None) -> Any:
    """What plans for the scores in an output folder; what is impossible is refused before the long work."""
    from optin_deploy.exporters.base import ExporterDefaults
    from optin_deploy.jobs.planner import Planner
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.jobs.workspace import Workspace
    from optin_deploy.planning.widths import Choice, aligned
    from optin_deploy.pruning.tokens import check, merging
    from optin_deploy.quality.held_out import judged_samples

    workspace = Workspace(folder)
    workspace.read_scores()
    source, asked = workspace.source(), align_of(making.align)
    if making.evaluation is not None:
        source = replace(source, evaluation=str(making.evaluation.absolute()))
    prepared = prepare(source, folder)
    drops = making.drop_tokens or (source.drop_tokens and (making.tokens is not None or TOKENS in source.units))
    usual = Choice(source.units, align=ExporterDefaults.align, allocation=making.allocation, drops=drops)
    ready = prepared.ready
    choice = merging(ready, aligned(ready.layout, usual.in_multiples(asked), asked), making.tokens)
    workspace.scores_of(ready.layout)
    check(ready, limits or Limits(flops=1.0), choice)
    if making.allocation == "curves":
        judged_samples(ready.rows.calibration.batches)
    return Planner(workspace, prepared, choice)


SWEEP_EXAMPLES = """
Examples:

    optin sweep work

    optin sweep work --eval labelled.jsonl --flops 0.8,0.6,0.4
"""


@options
def sweep(
    folder: Folder,
    making: Making,
    writing: Writing,
    flops: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Shares of the dense MACs. [default: 0.9,0.8,...,0.3]")
    ] = None,
) -> None:
    """Make a model at each of many budgets and judge it; writes sweep.csv, sweep.png and sweep.json.

    Models that sweep.json already holds are not made again.
    """
    shares = parse_shares(flops)
    from optin_deploy.jobs.sweep import HEADER, check_shares
    from optin_deploy.jobs.sweep import sweep as sweep_folder

    with writing_to(folder, writing):
        planner = planner_of(folder, making)
        if writing.dry_run:
            shares = check_shares(planner, shares)
            typer.echo(f"would make and judge {len(shares)} models on {len(planner.prepared.ready.rows.held_out)} rows")
            return
        points = sweep_folder(planner, shares, compensation=making.compensation, stage=stage_bar)
    print_table(HEADER, [point.row for point in points])
    made = (folder / "sweep.csv", folder / "sweep.png")
    typer.echo(f"Wrote {' and '.join(str(path) for path in made if path.is_file())}.")


REWRITE_EXAMPLES = """
Examples:

    optin rewrite work

    optin rewrite model.onnx --plan plan.json --out smaller.onnx
"""


@options
def rewrite(
    ctx: typer.Context,
    folder: FolderOrFile,
    network: CutOfNetwork,
    writing: Writing,
    compensation: Compensation = Job.compensation,
) -> None:
    """Cut and compensate by the plan in DIR; writes model.onnx, and model/ where a transformers class holds the result.

    An ONNX file is cut by --plan without compensation, proven to compute what the masked network does, and written.
    """
    if network.plan is not None or folder.suffix.lower() == ".onnx":
        refuse_idle(ctx, "compensation", why="an ONNX file is cut without it")
        rewrite_network(folder, network, writing)
        return
    refuse_idle(ctx, "out", "shape", why="they are for ONNX files, with --plan")
    with writing_to(folder, writing):
        _rewrite_job(folder, compensation=compensation, dry_run=writing.dry_run)


def _rewrite_job(folder: Path, *, compensation: bool, dry_run: bool) -> None:
    """Rewrite by the plan of a job."""
    from optin_deploy.files.names import PRUNED
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.jobs.stages import rewrite_stage
    from optin_deploy.jobs.workspace import Workspace
    from optin_deploy.pruning.pruning import check_plan

    workspace = Workspace(folder)
    chosen = workspace.read_plan()
    prepared = prepare(workspace.source(), folder)
    check_plan(prepared.ready, chosen)
    if dry_run:
        print_plan(chosen, prepared.ready.layout.units)
        return
    with stage_bar("rewrite") as progress:
        made = rewrite_stage(workspace, prepared, compensation=compensation, progress=progress)
    cost = chosen.cost
    parameters = "" if cost is None else f": {cost.weights_dense:,} -> {cost.weights_pruned:,} parameters"
    typer.echo(
        f"{'Found finished' if made.reused else 'Wrote'} {folder / PRUNED}{parameters}. Next: optin build {folder}"
    )
