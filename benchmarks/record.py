"""Write a result with the environment it was measured in; --record puts it among the committed ones."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optin_deploy.common.environment import environment
from optin_deploy.files.storage import write_json, write_text

RESULTS = Path(__file__).parent / "results"


def command_of(module: str) -> str:
    """Return the command line of this process, as anyone can type it again."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_result(folder: Path, name: str, data: Mapping[str, Any], page: str, command: str) -> None:
    """`name`.json with data, command and environment; `name`.md for people."""
    env = environment()
    write_json(folder / f"{name}.json", {"command": command, "environment": env, **data})
    footer = f"`{command}`, {env['date']}, {env['cpu_model']}, {env['cores_logical']} cores. {_versions(env)}"
    write_text(folder / f"{name}.md", f"{page.rstrip()}\n\n{footer}\n")


def _versions(env: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in env["versions"].items()) + "."
