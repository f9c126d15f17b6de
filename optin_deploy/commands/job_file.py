"""A job as a TOML file: read as options of the command line, and written beside the result."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from optin_deploy.commands.parsing import GIVEN
from optin_deploy.errors import BadInput
from optin_deploy.files.toml import read_toml

HINT = "Write lines such as flops = 0.6, with the names of options."
PATHS = ("calibration", "evaluation", "latency_table", "timing_cache", "out")
"""Options that are paths."""
MODELS = ("model", "tokenizer", "preprocessor")
"""Options that are paths where there is such a file, else names of the hub."""
NOT_KEPT = ("config", "out", "force", "dry_run", "prepare_only")
"""Options that say nothing about the result."""


def read_job(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take what a file says as the defaults of this command's options.

    Raises: BadInput: the file cannot be read, or names an option that does not exist or a value of another kind.
    """
    if path is None:
        return None
    parameters = {name: each for each in ctx.command.params for name in _names(each)}
    found: dict[str, Any] = {}
    for key, value in read_toml(path, f"--config {path}", HINT).items():
        parameter = parameters.get(key.replace("_", "-"))
        if parameter is None or parameter.name in ("config", "help"):
            known = ", ".join(sorted(name for name in parameters if name not in ("config", "help")))
            near = get_close_matches(key.replace("_", "-"), parameters, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise BadInput(f"{path}: {key} is no option of a job.{meant} Possible are {known}.")
        found[parameter.name or key] = _value(path, key, parameter, value)
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


def job_text(ctx: typer.Context) -> str:
    """Return what the user gave as the text of such a file; files by their full paths."""
    lines = ["# optin-export --config job.toml makes this again; what is not named is at its default."]
    for each in ctx.command.params:
        source = ctx.get_parameter_source(each.name or "")
        if each.name in NOT_KEPT or source is None or source.name not in GIVEN:
            continue
        value = ctx.params[each.name or ""]
        if isinstance(value, Path) or (each.name in MODELS and Path(value).exists()):
            value = str(Path(value).absolute())
        lines.append(f"{_names(each)[0]} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _names(parameter: Any) -> list[str]:
    """Names of an option in a file: as they are typed, without the dashes."""
    return [option.removeprefix("--") for option in parameter.opts]


def _value(path: Path, key: str, parameter: Any, value: Any) -> Any:
    """Check the kind of a value, and make a path relative to the file's folder a whole one."""
    if isinstance(value, bool) != bool(getattr(parameter, "is_flag", False)):
        raise BadInput(
            f"{path}: {key} = {json.dumps(value, default=str)}; flags are true or false, and nothing else is."
        )
    if parameter.multiple != isinstance(value, list) or isinstance(value, dict) or value == "":
        kind = "a list of values" if parameter.multiple else "one value"
        raise BadInput(f"{path}: {key} = {json.dumps(value, default=str)}; give {kind}.")
    if parameter.name in (*PATHS, *MODELS) and isinstance(value, str):
        whole = path.parent / value
        return str(whole.absolute()) if parameter.name in PATHS or whole.exists() else value
    return value
