"""`optin score`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.options import Model, Scoring, Writing, of_scoring
from optin_deploy.commands.parsing import check_columns, echo, refuse_idle, warn_if_bundled
from optin_deploy.commands.source import AllRows
from optin_deploy.commands.values import options
from optin_deploy.common.progress import silent
from optin_deploy.common.validation import whole_number
from optin_deploy.errors import BadInput
from optin_deploy.planning.budget import Limits
from optin_deploy.reporting.terminal import stage_bar
from optin_deploy.scoring.settings import Features, ScoreSettings

of_many = partial(typer.Option, rich_help_panel="Many processes")
SCORE_EXAMPLES = """
Examples:

    optin score ./my-bert --calibration texts.txt --out work

    torchrun --nproc-per-node=4 --max-restarts=3 -m optin_deploy score ./my-bert --calibration texts.txt --out work

    optin score ./my-bert --calibration texts.txt --out /shared/work --shard 2/8
"""


@dataclass(frozen=True)
class AllScoring(Scoring):
    """How units are scored, in all details."""

    features: Annotated[str, of_scoring(help="What is compared: block (outputs of blocks) or ffn.")] = Features.site
    tokens: Annotated[int | None, of_scoring(help="Tokens drawn from each sample. [default: all]")] = None
    probes: Annotated[
        int | None, of_scoring(help="Random projections a sample. [default: until the ranking is stable]")
    ] = None

    def settings(self) -> ScoreSettings:
        """Return these as `ScoreSettings`, checked."""
        if self.paper and (self.features != "block" or self.tokens is not None):
            raise BadInput("--paper says itself what is compared: leave out --features and --tokens.")
        found = super().settings()
        chosen = found.features if self.paper else Features(self.features, self.tokens)  # type: ignore[arg-type]
        return replace(found, features=chosen, probes=self.probes)


@dataclass(frozen=True)
class ShareOptions:
    """Which share of the work a process does."""

    shard: Annotated[str | None, of_many(metavar="i/N", help="Do only this share of the work.")] = None
    ray: Annotated[
        int | None, of_many(metavar="N", help="Run N workers on the Ray cluster of RAY_ADDRESS, or here.")
    ] = None


@options
def score(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder.")],
    rows: AllRows,
    scoring: AllScoring,
    share: ShareOptions,
    writing: Writing,
) -> None:
    """Score every unit of MODEL that may be cut; writes scores.safetensors, and the network as dense.onnx.

    Run it as often as you like on the same --out, on one machine or on many that share the folder: finished parts are
    skipped, and whoever finds all of them finished writes the scores. Under torchrun each process takes a share, and
    takes over what a killed one left.
    """
    source, settings = rows.source(model), scoring.settings()  # refused before anything heavy is imported
    from optin_deploy.jobs.checked import describe
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.jobs.stages import ScoreRequest
    from optin_deploy.jobs.workspace import Workspace
    from optin_deploy.scoring.parts import MOST_WORKERS, PartsLeft, worker_of

    check_columns(ctx, rows.calibration)
    if scoring.scorer == "exact":
        refuse_idle(ctx, "probes", why="--scorer exact projects nothing")
    force, ray = writing.force, share.ray
    request = ScoreRequest(source, out.absolute(), settings, scoring.memory(), force)
    if ray is not None and share.shard is not None:
        raise BadInput("--ray divides the work itself: leave out --shard.")
    if ray is not None:
        whole_number(ray, "--ray", 1, MOST_WORKERS)
    worker = worker_of(share.shard, os.environ)
    Workspace.check(out, source, force=force)
    if writing.dry_run:
        echo(describe(prepare(source), limits=Limits(flops=1.0), artifact=out / "scores.safetensors"))
        return
    first = worker.index == 0 or share.shard is not None
    if first:
        warn_if_bundled(rows.calibration)
    try:
        with stage_bar("score") if first else nullcontext(silent) as progress:
            if ray is None:
                reused = request.run(worker, progress)
            else:
                from optin_deploy.jobs.cluster import score_on_ray

                reused = score_on_ray(request, ray)
    except PartsLeft as left:
        typer.echo(str(left))
        return
    if first:
        typer.echo(f"{'Found finished' if reused else 'Wrote'} {out / 'scores.safetensors'}. Next: optin plan {out}")
