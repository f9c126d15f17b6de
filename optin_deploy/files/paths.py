"""What is at a path itself: links are not followed."""

from __future__ import annotations

import hashlib
from pathlib import Path


def clear(folder: Path) -> None:
    """Remove a folder with all that is in it; of links only themselves."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if is_folder(path) else path.unlink()
    folder.rmdir()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(path: Path) -> bool:
    """Is anything there, be it a link that leads nowhere?"""
    return path.exists() or path.is_symlink()


def is_file(path: Path) -> bool:
    """Is it a file, and no link to one?"""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Is it a folder, and no link to one?"""
    return path.is_dir() and not path.is_symlink()


def is_empty(path: Path) -> bool:
    """Is it a folder without anything in it?"""
    return is_folder(path) and not any(path.iterdir())
