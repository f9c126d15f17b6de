"""`optin push`: a pruned model on the Hugging Face Hub, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.options import DryRun

PUSH_EXAMPLES = """
Examples:

    optin push work my-org/minilm-60 --private

    optin push work my-org/minilm-60 --dry-run
"""


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of `optin-export`.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The model on the Hub; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository: only its members see it.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch of the commit; made if need be. [default: main]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Send a pruned model to the Hugging Face Hub: its files and a card of what was measured, in one commit."""
    from optin_deploy.serving.hub import CARD, prepared_push
    from optin_deploy.serving.hub import push as send

    made = prepared_push(folder, repository)
    if dry_run:
        typer.echo(made.card)
        for name, path in {CARD: None, **made.files}.items():
            size = len(made.card.encode()) if path is None else path.stat().st_size
            typer.echo(f"{size:>14,}  {name}")
        typer.echo("dry run: nothing was sent")
        return
    sent = send(made, private=private, branch=branch)
    typer.echo(f"{len(sent.files) + 1} files: {sent.url}")
