"""A pin: a small JSON that names a baseline artifact by its hash, and where its latency is compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file
from optin_deploy.measuring.points import Point
from optin_deploy.network.onnx_data import data_files

HINT = "Write it with `optin gate BASELINE --pin FILE`."
MOST_POINTS = 100


@dataclass(frozen=True)
class Pin(Stored):
    """One pinned baseline."""

    what = "a pin of this version"
    hint = HINT

    artifact: str
    """Path relative to the pin's own folder, with forward slashes; never out of that folder."""
    sha256: str
    size_bytes: int
    """Size of the file."""
    engine: str
    precision: str | None
    """None: the artifact's own."""
    threads: int
    points: tuple[Point, ...]
    data: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files that hold an ONNX file's weights, by path relative to its folder; empty: it holds them."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.points) <= MOST_POINTS or self.threads < 0:
            raise BadInput(f"{len(self.points)} points (1 to {MOST_POINTS}), {self.threads} threads (0 or more)")

    def path(self, folder: Path) -> Path:
        """The artifact, if it is still the pinned one.

        Args: folder: of the pin.
        Raises: BadInput: the path leads out of the folder, or the file or its data is missing or another one.
        """
        if not self.artifact or _leads_out(self.artifact):
            raise BadInput(
                f"the pin names {self.artifact!r}; a pinned artifact lies in the pin's own folder or below it. {HINT}"
            )
        path = folder / self.artifact
        if not path.is_file():
            raise BadInput(
                f"{path}, which the pin names, is missing. Bring it there (sha256 {self.sha256}), or pin anew: {HINT}"
            )
        size = path.stat().st_size
        found = sha256_file(path) if size == self.size_bytes else None
        if found != self.sha256:
            raise BadInput(
                f"{path} is not the pinned file: pinned are {self.size_bytes} bytes with sha256 {self.sha256}, there "
                f"are {size} with {found or sha256_file(path)}. Bring the pinned file back, or pin anew: {HINT}"
            )
        for name, there in data_hashes(path).items():
            if there != self.data.get(name):
                raise BadInput(
                    f"{path.parent / name}, which holds weights of {path.name}, is not the pinned file: pinned is "
                    f"sha256 {self.data.get(name)}, there is {there}. Bring the pinned file back, or pin anew: {HINT}"
                )
        return path

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; without data files it is what earlier versions wrote and read."""
        return {name: each for name, each in super().to_json().items() if name != "data" or each}


def data_hashes(path: Path) -> dict[str, str]:
    """sha256 of the files that hold an ONNX file's weights, by path relative to its folder.

    Raises: BadInput: one of them cannot be read.
    """
    files = data_files(path) if path.suffix == ".onnx" else ()
    return {file.relative_to(path.parent).as_posix(): sha256_file(file) for file in files}


def _leads_out(artifact: str) -> bool:
    """Is a relative path not one that stays inside, on any system?"""
    windows = PureWindowsPath(artifact)  # takes both kinds of slashes
    return PurePosixPath(artifact).is_absolute() or bool(windows.anchor) or ".." in windows.parts


def pinned_path(file: Path, artifact: Path) -> str:
    """How a pin in `file` names an artifact.

    Raises: BadInput: the artifact lies outside of the pin's folder.
    """
    relative = PurePosixPath(Path(os.path.relpath(artifact.absolute(), file.parent.absolute())))
    if _leads_out(str(relative)):
        raise BadInput(
            f"{artifact} is not below {file.parent.absolute()}, where the pin is to lie: the pair could not be moved "
            "together. Write the pin beside the artifact or above it."
        )
    return str(relative)


def write_pin(
    file: Path, artifact: Path, *, engine: str, precision: str | None, threads: int, points: Sequence[Point]
) -> Pin:
    """Pin an artifact as it is now.

    Raises: BadInput: the artifact lies outside of the pin's folder.
    """
    pin = Pin(
        artifact=pinned_path(file, artifact),
        sha256=sha256_file(artifact),
        size_bytes=artifact.stat().st_size,
        engine=engine,
        precision=precision,
        threads=threads,
        points=tuple(points),
        data=data_hashes(artifact),
    )
    pin.write(file)
    return pin
