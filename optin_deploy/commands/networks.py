"""`optin inspect`, and `optin plan` and `optin rewrite` of ONNX files: networks of any kind, found in their graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_deploy.commands.options import DryRun, Force
from optin_deploy.commands.parsing import echo
from optin_deploy.common.extras import require
from optin_deploy.common.formatting import si, size
from optin_deploy.errors import BadInput
from optin_deploy.reporting.terminal import print_table, stage_bar, warn

if TYPE_CHECKING:
    from optin_deploy.planning.budget import Limits

INSPECT_EXAMPLES = """
Examples:

    optin inspect model.onnx

    optin inspect ./my-bert --json

    optin inspect model.onnx --picture network.png --shape height=64 --shape width=320
"""

NETWORK = "ONNX files and any network"
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=SIZE",
        help="Size of a free axis of the inputs, by its name in the file; repeatable. [default: several are tried]",
        rich_help_panel=NETWORK,
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN.json", help="What stays.", rich_help_panel=NETWORK)
]
Magnitude = Annotated[
    bool,
    typer.Option("--magnitude", help="Score units by the norms of their weights; no data.", rich_help_panel=NETWORK),
]
Units = Annotated[
    str | None,
    typer.Option(
        metavar="KINDS",
        help="What may be cut: heads, groups, queries, neurons, channels; qk-width, v-width: heads get narrower. "
        "[default: heads,groups,neurons,channels]",
        rich_help_panel=NETWORK,
    ),
]
PlanOut = Annotated[Path | None, typer.Option("--out", metavar="PLAN.json", help="File.", rich_help_panel=NETWORK)]
RewriteOut = Annotated[
    Path | None, typer.Option("--out", metavar="SMALLER.onnx", help="File.", rich_help_panel=NETWORK)
]


def inspect(
    network: Annotated[
        str, typer.Argument(metavar="MODEL|FILE.onnx", help="ONNX file, or folder or hub id of a transformers model.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help='Print {"groups": [...], "frozen": [...]}.')] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the network: its blocks with their groups.")
    ] = None,
    shape: Shape = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Say what can be cut in a network, what that costs, and what stays whole and why; no data is needed."""
    from optin_deploy.files.ownership import free_name
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
        free_name(picture, is_ours, force=force, dry_run=True)
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
        if not dry_run:
            free_name(picture, is_ours, force=force)
            draw(layout, picture)
        typer.echo(f"{'would write' if dry_run else 'Wrote'} {picture}", err=as_json)


def plan_network(
    network: str,
    *,
    limits: Limits,
    align: int | None,
    allocation: str | None,
    units: str | None,
    out: Path | None,
    shape: Sequence[str] | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Plan a network by magnitude."""
    from optin_deploy.planning.widths import DEFAULT_ALIGN, DEFAULT_KINDS, Choice
    from optin_deploy.pruning.planning import plan_network as plan

    if out is None:
        raise BadInput("--out PLAN.json is missing: the file to write the plan to.")
    kinds = DEFAULT_KINDS if units is None else tuple(kind.strip() for kind in units.split(","))
    choice = Choice(
        kinds,
        DEFAULT_ALIGN if align is None else align,
        "uniform" if allocation is None else allocation,
    )
    found, layout = plan(network, out, limits, choice, sizes=sizes_of(shape), force=force, dry_run=dry_run)
    rows = [
        (group.name, f"{len(found.keep.get(group.name, range(group.units))):,}", f"{group.units:,}")
        for group in layout.groups
        if group.kind in kinds
    ]
    typer.echo(cost_line(found))
    print_table(("group", "kept", "of"), rows)
    if dry_run:
        typer.echo(f"would write {out}")
    else:
        typer.echo(f"Wrote {out}. Next: optin rewrite {network} --plan {out} --out SMALLER.onnx")


def rewrite_network(
    network: Path, *, plan: Path | None, out: Path | None, shape: Sequence[str] | None, force: bool, dry_run: bool
) -> None:
    """Cut an ONNX file."""
    from optin_deploy.planning.plan import told_merges
    from optin_deploy.pruning.rewriting import rewrite_file

    if plan is None or out is None:
        raise BadInput(
            "to cut an ONNX file give --plan PLAN.json (made by hand, or by `optin plan FILE.onnx --magnitude`) and "
            "--out SMALLER.onnx."
        )
    if network.suffix.lower() != ".onnx":
        raise BadInput(f"{network} is no .onnx file: --plan is for these. In Python, `optin_deploy.cut` takes modules.")
    found = rewrite_file(network, plan, out, sizes=sizes_of(shape), force=force, dry_run=dry_run, stage=stage_bar)
    cost = found.plan.cost
    assert cost is not None
    typer.echo(cost_line(found.plan))
    engine = "" if found.engine is None else f"; ONNX Runtime differs by {found.engine:.1e}"
    typer.echo(f"proven: it differs from the masked network by {found.proof.masked:.1e} of the largest output{engine}")
    if any(found.plan.merges):
        typer.echo(told_merges(found.plan.merges, of_text=found.plan.of_text))
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


def sizes_of(shape: Sequence[str] | None) -> dict[str, int]:
    """Sizes of free axes from `--shape NAME=SIZE`.

    Raises: BadInput.
    """
    from optin_deploy.common.validation import whole_number

    found: dict[str, int] = {}
    for text in shape or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isascii() or not number.isdigit() or len(number) > 12:
            raise BadInput(f"--shape {text!r}: give the name of an axis and its size, as in height=64.")
        if name in found:
            raise BadInput(f"--shape {name} is given twice. Give each axis once.")
        found[name] = whole_number(int(number), f"--shape {name}=", 1)
    return found
