"""What opening, syncing and removing files needs that is not alike on POSIX and on Windows."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Done = TypeVar("Done")

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


def retried(change: Callable[Given, Done], *args: Given.args, **options: Given.kwargs) -> Done:
    """Replace, rename or remove a file or folder.

    On Windows an open file keeps its place, and networks refer to themselves: what nobody uses any more maps its file
    until it is collected.
    """
    try:
        return change(*args, **options)
    except PermissionError:
        if not WINDOWS:
            raise
    gc.collect()
    return change(*args, **options)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    if WINDOWS and path.exists():
        gc.collect()
        shutil.rmtree(path, ignore_errors=True)
