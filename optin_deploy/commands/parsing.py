"""Option values as the types that the library takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer

from optin_deploy.commands.options import Writing
from optin_deploy.common.validation import parse_size, validated
from optin_deploy.errors import BadInput
from optin_deploy.reporting.terminal import warn

TABLES = (".jsonl", ".csv")
"""Calibration files that have columns."""
GIVEN = ("COMMANDLINE", "DEFAULT_MAP")
"""Sources of options that a user wrote: the command line, or a file of `--config`."""


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


def engine_options(ctx: typer.Context, engine: str) -> Any:
    """Return the options of an engine, of its own type: what was given by flags, and by `--engine-option`.

    Raises: BadInput: the engine has no such option, be it given with its default; or a value that cannot be.
    """
    from optin_deploy.exporters import exporter
    from optin_deploy.exporters.profiles import parse_profile

    flags: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "profile": ("profiles", lambda texts: tuple(map(parse_profile, texts))),
        "workspace": ("workspace_bytes", lambda text: parse_size(text, "--workspace")),
        "timing_cache": ("timing_cache", Path.absolute),
        "compatible": ("compatible", tuple),
        "weights": ("weights", str),
    }
    kind = exporter(engine).options
    own = [field.name for field in fields(kind)]
    absent = [flag for flag, (name, _) in flags.items() if name not in own]
    refuse_idle(ctx, *absent, why=f"they are for plans of trt and trt-rtx, and engine {engine} has none")
    by_flag = {name: read(ctx.params[flag]) for flag, (name, read) in flags.items() if given(ctx, flag)}
    others = [name for name in own if name not in dict(flags.values())]
    hint = f"Engine {engine} has {', '.join(others) or 'no option'} to be given by it."
    found = named_values(ctx.params["engine_option"], others, hint)
    return replace(validated(kind, found, "--engine-option", hint) if found else kind(), **by_flag)


def named_values(texts: Sequence[str] | None, names: Sequence[str], hint: str) -> dict[str, str]:
    """Return what `--engine-option NAME=VALUE` gives, by name.

    Args: hint: ends the error; says which names there are.
    Raises: BadInput: another name, no value, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if name not in names or not value or name in found:
            wrong = "is given twice" if name in found else "is not NAME=VALUE" if name in names else "is not known"
            raise BadInput(f"--engine-option {text!r} {wrong}. {hint}")
        found[name] = value
    return found


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


def warn_if_bundled(calibration: Path | None) -> None:
    """The bundled set is for trying things out."""
    if calibration is None:
        warn("no --calibration given: using the small bundled set. Accuracy needs your own data.")


def echo(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)
