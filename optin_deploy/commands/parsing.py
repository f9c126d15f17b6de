"""Option values as the types that the library takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from optin_deploy.commands.options import Writing
from optin_deploy.errors import BadInput
from optin_deploy.reporting.terminal import warn

TABLES = (".jsonl", ".csv")
"""Calibration files that have columns."""
GIVEN = ("COMMANDLINE", "DEFAULT_MAP")
"""Sources of options that a user wrote: the command line, or a file of `--config`."""
PLAN_OPTIONS = ("profile", "profile_sizes", "workspace", "timing_cache", "compatible", "weights")


def given(ctx: typer.Context, *parameters: str) -> list[str]:
    """Those of a command's parameters that the user gave, here or in a file, also with their defaults; as typed."""
    found = []
    for each in ctx.command.params:
        source = ctx.get_parameter_source(each.name or "")
        if each.name in parameters and source is not None and source.name in GIVEN:
            typed = each.secondary_opts if ctx.params.get(each.name) is False and each.secondary_opts else each.opts
            found.append(typed[0])
    return found


def refuse_idle(ctx: typer.Context, *parameters: str, why: str) -> None:
    """Refuse options that would do nothing.

    Args: why: ends the sentence.
    Raises: BadInput: names those that were given.
    """
    idle = given(ctx, *parameters)
    if idle:
        them = "it" if len(idle) == 1 else "them"
        raise BadInput(f"{' and '.join(idle)} would do nothing: {why}. Leave {them} out.")


def check_plan_options(ctx: typer.Context, engine: str) -> None:
    """Refuse TensorRT's options for an engine that has none, their defaults too.

    Raises: BadInput.
    """
    from optin_deploy.exporters import exporter

    if not exporter(engine).has_profiles:
        refuse_idle(ctx, *PLAN_OPTIONS, why=f"they are for plans of trt and trt-rtx, and engine {engine} has none")


def check_columns(ctx: typer.Context, *files: Path | None) -> None:
    """Refuse names of columns where no file has any.

    Raises: BadInput.
    """
    if not any(file is not None and file.suffix.lower() in TABLES and not file.is_dir() for file in files):
        why = f"only {' and '.join(TABLES)} files have columns, and none is given"
        refuse_idle(ctx, "text_column", "label_column", "pair_column", why=why)


def writing_to(folder: Path, writing: Writing) -> AbstractContextManager[object]:
    """Write into an output folder: no other job does meanwhile, and files of others stay what they are."""
    from optin_deploy.jobs.workspace import Workspace

    return nullcontext() if writing.dry_run else Workspace(folder).changing(force=writing.force)


def warn_of_disagreements(folder: Path) -> None:
    """Say what in an output folder does not belong together."""
    from optin_deploy.jobs.belonging import disagreements

    for problem in disagreements(folder):
        warn(problem)


def judged_by(source: Any, evaluation: Path | None) -> Any:
    """The same source, judged by the rows of `--eval`."""
    return source if evaluation is None else replace(source, evaluation=str(evaluation.absolute()))


def warn_if_bundled(calibration: Path | None) -> None:
    """The bundled set is for trying things out."""
    if calibration is None:
        warn("no --calibration given: using the small bundled set. Accuracy needs your own data.")


def echo(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)
