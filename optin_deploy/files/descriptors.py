"""What opening and syncing files needs that is not alike on POSIX and on Windows."""

from __future__ import annotations

import gc
import os
from pathlib import Path

WINDOWS = os.name == "nt"


def open_flags(*names: str) -> int:
    """The sum of flags of `os.open` by name; those that this system lacks ask for nothing.

    Bytes stay as they are (Windows would write two for the end of a line), and no child process inherits the file.
    """
    return sum(getattr(os, name, 0) for name in (*names, "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"))


def sync(path: Path) -> None:
    """Have what a file holds written to the disk; Windows does so only through a handle that may write."""
    with path.open("r+b" if WINDOWS else "rb") as file:
        os.fsync(file.fileno())


def replace(temporary: Path, path: Path) -> None:
    """Put a file in the place of another.

    On Windows an open file keeps its place, and networks refer to themselves: what nobody uses any more maps its file
    until it is collected.
    """
    try:
        temporary.replace(path)
    except PermissionError:
        if not WINDOWS:
            raise
        gc.collect()
        temporary.replace(path)
