"""`optin show`, `report` and `doctor`: what is there, and what will not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.options import Folder, Writing
from optin_deploy.commands.parsing import warn_of_disagreements
from optin_deploy.commands.values import options
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.reporting.terminal import print_plan, print_table

REPORT_BYTES = 2**22
"""A report.md has some KiB; a larger one is none of ours."""

SHOW_EXAMPLES = """
Examples:

    optin show work

    optin show scores work
"""


@options
def show(
    what: Annotated[
        str, typer.Argument(metavar="DIR|scores", help="Output folder of an earlier command, or scores and the folder.")
    ],
    writing: Writing,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Whose scores; left out: of the current folder.")
    ] = None,
) -> None:
    """Print the plan and the report in DIR; with `scores` the scores, which are also drawn into DIR/scores.png."""
    from optin_deploy.files.names import SCORES
    from optin_deploy.jobs.workspace import Workspace

    scores_wanted, root = _scores_wanted(what, folder)
    workspace = Workspace(root)
    source = workspace.source()
    typer.echo(f"{source.model}, calibrated on {source.calibration or 'the bundled set'}")
    if scores_wanted:
        _show_scores(workspace, force=writing.force, dry_run=writing.dry_run)
        return
    if (root / SCORES).is_file() and not (root / "plan.json").exists():
        from optin_deploy.reporting.score_table import print_provenance

        print_provenance(workspace.read_scores())
        typer.echo(f"No plan yet. Next: optin plan {root}, or optin show scores {root}")
        return
    plan, page = workspace.read_plan(), _page(root / "report.md")
    scores = workspace.read_scores().scores if (root / SCORES).is_file() else {}
    already = plan.hash[:12] in page  # the page has the same table
    print_plan(plan, {name: len(values) for name, values in scores.items()}, table=not already)
    if page:
        typer.echo(page)
    warn_of_disagreements(root)


REPORT_EXAMPLES = """
Examples:

    optin report work

    optin report work --out minilm.html
"""


@options
def report(
    folder: Folder,
    writing: Writing,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page. [default: DIR/report.html]")] = None,
) -> None:
    """Write the report in DIR as one HTML page with charts; it loads nothing, so it can be sent or printed."""
    from optin_deploy.reporting.page import write_page

    path = write_page(folder, out, force=writing.force, dry_run=writing.dry_run)
    warn_of_disagreements(folder)
    typer.echo(f"would write {path}" if writing.dry_run else f"Wrote {path}; open it in a browser.")


DOCTOR_EXAMPLES = """
Examples:

    optin doctor

    optin doctor work

    optin doctor model.onnx --json
"""


def doctor(
    target: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Output folder or .onnx file. Without it: this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what will not work on this machine, or with the ONNX files in DIR, and what to do; exit code 1 if any."""
    from optin_deploy.doctor.doctor import diagnose

    found = diagnose(target)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        for title, header, rows in found.tables():
            print_table(header, rows, title)
        typer.echo(found.summary)
    if found.has_problem:
        raise typer.Exit(1)


def _page(path: Path) -> str:
    """The page to read of a job; empty: there is none.

    Raises: BadInput: it is none of ours.
    """
    if not path.is_file():
        return ""
    if path.stat().st_size > REPORT_BYTES:
        raise BadInput(
            f"{path} has {path.stat().st_size} bytes; at most {REPORT_BYTES} are shown. Make it again with "
            f"`optin-export MODEL --out {path.parent}`."
        )
    return path.read_text(encoding="utf-8", errors="replace")


def _scores_wanted(what: str, folder: Path | None) -> tuple[bool, Path]:
    """Scores or plan, and of which folder: `show DIR`, `show scores DIR`, or `show scores` of the current folder."""
    if folder is None and Path(what).is_dir():
        return False, Path(what)
    if what == "scores":
        return True, folder or Path()
    wrong = f"cannot show {what!r} of {folder}" if folder else f"{what} is not an output folder"
    raise BadInput(f"{wrong}; possible: optin show DIR, optin show scores DIR.")


def _show_scores(workspace: Any, *, force: bool, dry_run: bool) -> None:
    from optin_deploy.reporting.pictures import draw_scores
    from optin_deploy.reporting.score_table import print_scores

    scores = workspace.read_scores()
    print_scores(scores)
    picture = workspace.root / "scores.png"
    workspace.record.reserve([picture.name], force=force, dry_run=dry_run)
    try:
        if not dry_run:
            draw_scores(scores, picture)
        typer.echo(f"{'would write' if dry_run else 'Wrote'} {picture}")
    except MissingDependency as err:  # the table above says the same
        typer.echo(f"{picture} was not drawn: {err}")
