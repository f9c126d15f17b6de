"""`optin gate`: is a candidate slower than its baseline?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.options import Writing
from optin_deploy.commands.values import options
from optin_deploy.common.validation import holds
from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import free_name
from optin_deploy.measuring.points import parse_points
from optin_deploy.reporting.terminal import print_table, stage_bar, warn

GATE_EXAMPLES = """
Examples:

    optin gate release/model.onnx new/model.onnx --max-ratio 1.05

    optin gate work/dense.onnx work --min-speedup 1.5 --at batch=1,seq=128 --at batch=8,seq=128

    optin gate release/model.onnx --pin baseline.json --threads 2

    optin gate baseline.json new/model.onnx --max-ratio 1.05 --out gate.json
"""


@dataclass(frozen=True)
class LimitOptions:
    """How slow the candidate may be."""

    max_ratio: Annotated[float | None, typer.Option(help="Most that candidate / baseline time may be, e.g. 1.05.")] = (
        None
    )
    min_speedup: Annotated[
        float | None, typer.Option(help="Least that baseline / candidate time may be, e.g. 1.5.")
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Fail also where the limit lies in the interval.")] = False


@dataclass(frozen=True)
class PlaceOptions:
    """The engine and the points at which both are measured; None is what the pin says."""

    engine: Annotated[
        str | None,
        typer.Option(help="onnx, openvino, ort-cuda, ort-trt, aoti, trt or trt-rtx. [default: onnx, or the pin's]"),
    ] = None
    precision: Annotated[
        str | None, typer.Option(help="As in `optin build`. [default: the artifact's own, or the pin's]")
    ] = None
    at: Annotated[
        list[str] | None,
        typer.Option(help="Point to measure at, e.g. batch=8,seq=128; repeatable. [default: batch=1, or the pin's]"),
    ] = None
    threads: Annotated[
        int | None, typer.Option(help="Threads of the engine; 0 = its default. [default: 0, or the pin's]")
    ] = None


@options
def gate(
    baseline: Annotated[
        Path, typer.Argument(metavar="BASELINE", help="Artifact, output folder (its pruned artifact), or pin (.json).")
    ],
    limit: LimitOptions,
    place: PlaceOptions,
    writing: Writing,
    candidate: Annotated[
        Path | None, typer.Argument(metavar="CANDIDATE", help="Artifact or output folder; none with --pin.")
    ] = None,
    pin: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write BASELINE's hash and these settings, measure nothing.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdict, raw samples, hashes and environment (JSON).")
    ] = None,
) -> None:
    """Fail if CANDIDATE is slower than BASELINE allows; both run here and now, interleaved, so no stored time counts.

    Exit code 1 if the whole 95% interval of the ratio misses the limit (the worst point decides), 4 if the baseline
    differs from itself, 0 else: with a warning where the limit lies in the interval.
    """
    from optin_deploy.files.storage import write_json
    from optin_deploy.measuring.comparing import check_not_input, comparison_of
    from optin_deploy.measuring.gate import HEADER, limit_of

    force, dry_run = writing.force, writing.dry_run
    compared = partial(comparison_of, baseline, engine=place.engine, precision=place.precision, threads=place.threads)
    points = parse_points(place.at)
    if pin is not None:
        if (candidate, limit, out) != (None, LimitOptions(), None):
            raise BadInput(
                "--pin measures nothing: leave out CANDIDATE, --max-ratio, --min-speedup, --strict and --out."
            )
        _pin(compared(points=points), pin, force=force, dry_run=dry_run)
        return
    allowed = limit_of(limit.max_ratio, limit.min_speedup)
    if candidate is None:
        raise BadInput("CANDIDATE is missing: give an artifact or an output folder, or --pin FILE to pin BASELINE.")
    contest = compared(candidate, points=points)
    if out is not None:
        check_not_input(out, baseline, contest.baseline, contest.candidate, option="--out")
        free_name(out, _is_verdict, force=force, dry_run=True)
    if dry_run:
        typer.echo(f"would measure {contest.candidate} against {contest.baseline}, {contest}")
        return
    found = contest.run(allowed, stage=stage_bar)
    print_table(HEADER, found.rows())
    if out is not None:
        free_name(out, _is_verdict, force=force)
        write_json(out, found.to_json())
    found.check(strict=limit.strict)
    if found.outcome == "straddles":
        warn(found.sentence)
    else:
        typer.echo(found.sentence)


def _is_verdict(file: Path) -> bool:

    return holds(file, "schema_version", "verdict", "limit", "points", "environment")


def _pin(contest: Any, file: Path, *, force: bool, dry_run: bool) -> None:
    """Write a pin of the baseline alone."""
    from optin_deploy.measuring.pins import Pin

    contest.check_pin(file)
    free_name(file, Pin.is_at, force=force, dry_run=dry_run)
    if dry_run:
        typer.echo(f"would pin {contest.baseline} in {file}, {contest}")
        return
    pinned = contest.pin(file)
    typer.echo(
        f"Wrote {file}: {contest.baseline}, sha256 {pinned.sha256[:12]}, {contest}. Next: "
        f"optin gate {file} CANDIDATE --max-ratio 1.05"
    )
