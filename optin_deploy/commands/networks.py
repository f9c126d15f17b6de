"""`optin inspect`, and `optin plan` and `optin rewrite` of ONNX files: networks of any kind, found in their graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.amounts import align_of
from optin_deploy.commands.options import Writing
from optin_deploy.commands.parsing import echo
from optin_deploy.commands.source import Shape, Units, kinds_of, of_network, sizes_of
from optin_deploy.commands.values import options
from optin_deploy.common.extras import require
from optin_deploy.common.formatting import si, size
from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import free_name
from optin_deploy.planning.budget import Limits
from optin_deploy.reporting.terminal import print_table, stage_bar, warn

INSPECT_EXAMPLES = """
Examples:

    optin inspect model.onnx

    optin inspect ./my-bert --json

    optin inspect model.onnx --picture network.png --shape height=64 --shape width=320
"""


@dataclass(frozen=True)
class PlanOfNetwork:
    """How a plan is made without data."""

    magnitude: Annotated[
        bool, of_network("--magnitude", help="Score units by the norms of their weights; no data.")
    ] = False
    units: Units = None
    out: Annotated[Path | None, of_network(metavar="PLAN.json", help="File.")] = None
    shape: Shape = None


@dataclass(frozen=True)
class CutOfNetwork:
    """How an ONNX file is cut."""

    plan: Annotated[Path | None, of_network(metavar="PLAN.json", help="What stays.")] = None
    out: Annotated[Path | None, of_network(metavar="SMALLER.onnx", help="File.")] = None
    shape: Shape = None


@options
def inspect(
    network: Annotated[
        str, typer.Argument(metavar="MODEL|FILE.onnx", help="ONNX file, or folder or hub id of a transformers model.")
    ],
    writing: Writing,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"groups": [...], "frozen": [...]}.')] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the network: its blocks with their groups.")
    ] = None,
    shape: Shape = None,
) -> None:
    """Say what can be cut in a network, what that costs, and what stays whole and why; no data is needed."""
    from optin_deploy.pruning.networks import inspect as find
    from optin_deploy.reporting.network_picture import draw, is_ours
    from optin_deploy.reporting.network_table import (
        FROZEN_HEADER,
        HEADER,
        PROBLEM_HEADER,
        SHARES_NOTE,
        frozen_rows,
        group_rows,
        problem_rows,
        summary,
        to_json,
    )

    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise BadInput(f"--picture {picture}: give a file that ends in .png.")
        require("matplotlib")
        free_name(picture, is_ours, force=writing.force, dry_run=True)
    layout = find(network, sizes=sizes_of(shape))
    if as_json:
        typer.echo(json.dumps(to_json(layout), indent=1))
    else:
        echo(summary(layout))
        if layout.groups:
            print_table(HEADER, group_rows(layout))
            typer.echo(SHARES_NOTE)
        else:
            typer.echo("Nothing can be cut in it.")
        if layout.frozen:
            print_table(FROZEN_HEADER, frozen_rows(layout), "What stays whole")
        if problems := problem_rows(layout):
            print_table(PROBLEM_HEADER, problems, "What is not understood: all around it stays whole")
    if picture is not None:
        if not writing.dry_run:
            free_name(picture, is_ours, force=writing.force)
            draw(layout, picture)
        typer.echo(f"{'would write' if writing.dry_run else 'Wrote'} {picture}", err=as_json)


def plan_network(
    network: str, limits: Limits, how: PlanOfNetwork, *, align: str | None, allocation: str | None, writing: Writing
) -> None:
    """Plan a network by magnitude."""
    from optin_deploy.planning.widths import Choice
    from optin_deploy.pruning.planning import plan_network as plan

    if how.out is None:
        raise BadInput("--out PLAN.json is missing: the file to write the plan to.")
    choice = Choice(kinds_of(how.units), allocation=allocation or Choice.allocation).in_multiples(align_of(align))
    sizes, out = sizes_of(how.shape), how.out
    found, layout = plan(network, out, limits, choice, sizes=sizes, force=writing.force, dry_run=writing.dry_run)
    rows = [
        (group.name, f"{len(found.keep.get(group.name, range(group.units))):,}", f"{group.units:,}")
        for group in layout.groups
        if group.kind in choice.kinds
    ]
    typer.echo(cost_line(found))
    print_table(("group", "kept", "of"), rows)
    if writing.dry_run:
        typer.echo(f"would write {out}")
    else:
        typer.echo(f"Wrote {out}. Next: optin rewrite {network} --plan {out} --out SMALLER.onnx")


def rewrite_network(network: Path, how: CutOfNetwork, writing: Writing) -> None:
    """Cut an ONNX file."""
    from optin_deploy.planning.plan import describe_merges
    from optin_deploy.pruning.rewriting import rewrite_file

    plan, out = how.plan, how.out
    if plan is None or out is None:
        raise BadInput(
            "to cut an ONNX file give --plan PLAN.json (made by hand, or by `optin plan FILE.onnx --magnitude`) and "
            "--out SMALLER.onnx."
        )
    if network.suffix.lower() != ".onnx":
        raise BadInput(f"{network} is no .onnx file: --plan is for these. In Python, `optin_deploy.cut` takes modules.")
    sizes, force, dry_run = sizes_of(how.shape), writing.force, writing.dry_run
    found = rewrite_file(network, plan, out, sizes=sizes, force=force, dry_run=dry_run, stage=stage_bar)
    cost = found.plan.cost
    assert cost is not None
    typer.echo(cost_line(found.plan))
    engine = "" if found.engine is None else f"; ONNX Runtime differs by {found.engine:.1e}"
    typer.echo(f"proven: it differs from the masked network by {found.proof.masked:.1e} of the largest output{engine}")
    if any(found.plan.merges):
        typer.echo(describe_merges(found.plan.merges, of_text=found.plan.of_text))
    elif not found.proof.dense:
        warn("the plan changes nothing: all that it removes counts for nothing, or it removes nothing.")
    if found.bytes_pruned is None:
        typer.echo(f"would write {out}")
        return
    typer.echo(
        f"Wrote {out}: {size(found.bytes_dense)} -> {size(found.bytes_pruned)}. "
        f"Next: optin gate {network} {out} --min-speedup 1.1"
    )


def cost_line(plan: Any) -> str:
    """What a plan keeps."""
    cost = plan.cost
    return (
        f"keeps {cost.macs_pruned / max(1, cost.macs_dense):.1%} of {si(cost.macs_dense)} MACs, "
        f"{si(cost.weights_dense)} -> {si(cost.weights_pruned)} weights, "
        f"{size(cost.bytes_dense)} -> {size(cost.bytes_pruned)}"
    )
