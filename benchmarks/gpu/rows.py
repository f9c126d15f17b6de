"""Result rows: one JSON a line, on disk before the next cell starts; a half-written last line is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput

Row = Mapping[str, Any]
"""cell, device, torch: the key. config, status (ok, skipped, failed), seconds, and result or error."""


def append_row(path: Path, row: Row) -> None:
    """Add a row and fsync; what an interrupted run left half-written is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *, device: str, torch: str) -> dict[str, Row]:
    """The latest row of each cell that was measured on this device with this torch.

    Raises: BadInput: a whole line is not a row.
    """
    if not path.exists():
        return {}
    found: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if (row["device"], row["torch"]) == (device, torch):
                found[row["cell"]] = row
        except (ValueError, KeyError, TypeError) as err:
            raise BadInput(f"{path}:{number} is not a row of this suite ({err}). Move the file away.") from err
    return found
