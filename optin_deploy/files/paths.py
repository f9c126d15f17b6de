"""What is at a path itself: links are not followed."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
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
