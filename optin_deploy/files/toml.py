"""TOML files that people write."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput

MOST_BYTES = 2**20


def read_toml(path: Path, name: str, hint: str) -> dict[str, Any]:
    """Read a file of at most 1 MiB.

    Args: name: what an error calls it, such as its option with the path. hint: ends each error.
    Raises: BadInput: absent, no TOML, or too large.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadInput(f"{name} is larger than 1 MiB: that is not written by hand. {hint}")
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as err:  # of TOML, of Unicode, of a number of thousands of digits
        raise BadInput(f"{name} cannot be read: {err}. {hint}") from err
