"""A model repository on disk: versions that are never overwritten, and one small file that says which are served.

A version is written aside and renamed into place as a whole; servers pass it by until the files that name the served
versions follow, each by one rename, the one that switches last. So a polling server sees the old state or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.serving.manifest import FILE, FOLDER, Manifest, check_files, check_name, check_version, read_manifest
from optin_deploy.storage import atomic_file, atomic_folder, read_json, sha256_file, write_json
from optin_deploy.validation import STORED, validated

STATE = "optin.json"
"""In a model's folder: which versions are served."""
LOCK = ".optin.lock"
SCHEMA_VERSION = 1
HINT = "Make a repository with `optin ship DIR --server triton --out REPO`."


@dataclass(frozen=True)
class State:
    """Which versions of a model are served."""

    __pydantic_config__ = STORED

    schema_version: int
    server: str
    served: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise BadInput(f"schema_version {self.schema_version}; this version of optin-deploy reads {SCHEMA_VERSION}")
        if not 1 <= len(self.served) <= 2 or len(set(self.served)) != len(self.served):
            raise BadInput(f"{len(self.served)} served versions; possible are one, or two different ones side by side")
        for version in self.served:
            check_version(version)


Contents = Mapping[str, Path | bytes]
"""Relative path -> a file to copy, or bytes."""
Version = tuple[Manifest, Contents]
"""What is to be published."""


@dataclass(frozen=True)
class Repository:
    """One model repository."""

    root: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process publishes at a time.

        Raises: BadInput: another one is at it, or the root is no folder.
        """
        if self.root.exists() and not self.root.is_dir():
            raise BadInput(f"--out {self.root} is not a folder. Give a folder.")
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise BadInput(f"another process is publishing to {self.root}. Wait for it, then repeat.") from err
            yield

    def names(self) -> tuple[str, ...]:
        """Models that `optin ship` made."""
        if not self.root.is_dir():
            raise BadInput(f"{self.root} is not a folder. {HINT}")
        return tuple(sorted(path.parent.name for path in self.root.glob(f"*/{STATE}")))

    def folder(self, name: str, version: int | None = None) -> Path:
        """Of a model, or of one version of it.

        Raises: BadInput: not a name or number that it may have, or a link, which could lead anywhere.
        """
        folder = self.root / check_name(name)
        if version is not None:
            folder /= str(check_version(version))
        if folder.is_symlink() or folder.parent.is_symlink():
            raise BadInput(f"{folder} is a link or lies behind one; it could lead out of the repository. Remove it.")
        return folder

    def versions(self, name: str) -> tuple[int, ...]:
        """Published versions, rising."""
        folder = self.folder(name)
        found = [path.parent.parent.name for path in folder.glob(f"*/{FILE}")]
        return tuple(sorted(int(number) for number in found if number.isascii() and number.isdigit()))

    def state(self, name: str) -> State:
        """What of a model is served.

        Raises: BadInput: no such model.
        """
        file = self.folder(name) / STATE
        data = read_json(file, f"{name!r} is not a model of this repository. {HINT}")
        return validated(State, data, f"{file}: not of this version", HINT)

    def manifest(self, name: str, version: int) -> Manifest:
        """Of one version.

        Raises: BadInput: it does not exist, or is damaged.
        """
        if version not in self.versions(name):
            known = ", ".join(map(str, self.versions(name))) or "none"
            raise BadInput(f"{name} has no version {version}; published are: {known}.")
        return read_manifest(self.folder(name, version), name, version)

    def served(self, name: str) -> tuple[Manifest, ...]:
        """The manifests of the served versions."""
        return tuple(self.manifest(name, version) for version in self.state(name).served)

    def publish(self, manifest: Manifest, contents: Contents) -> bool:
        """Write a version of a model that has others already; nobody serves it yet.

        Returns: False if this very version was there already.
        Raises: BadInput: another version of this number exists; it is never overwritten.
        """
        folder = self.folder(manifest.name, manifest.version)
        if self.has(manifest):
            return False
        if folder.exists():
            raise BadInput(
                f"{folder} exists and holds something else; a version is never overwritten. Published are "
                f"{', '.join(map(str, self.versions(manifest.name))) or 'none'}: leave out --version for the next one."
            )
        with atomic_folder(folder) as aside:
            write_version(aside, manifest, contents)
        return True

    def create(self, manifests: Sequence[Version], finish: Callable[[Path], None]) -> None:
        """Write the first versions of a model and what `finish` puts beside them, in one rename.

        Args: finish: is given the model's folder, still aside.
        """
        folder = self.folder(manifests[0][0].name)
        if folder.exists():
            raise BadInput(f"{folder} exists, but `optin ship` did not make it. Use another --name, or remove it.")
        with atomic_folder(folder) as aside:
            for manifest, contents in manifests:
                version = aside / str(manifest.version)
                version.mkdir()
                write_version(version, manifest, contents)
            finish(aside)

    def has(self, manifest: Manifest) -> bool:
        """Is this very version published, whole?"""
        try:
            found = self.manifest(manifest.name, manifest.version)
            check_files(self.folder(manifest.name, manifest.version), found)
        except BadInput:
            return False
        return found == manifest


def hashes(contents: Contents) -> dict[str, str]:
    """sha256 (hex) of each file of a version."""
    return {
        name: hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
        for name, source in contents.items()
    }


def write_version(folder: Path, manifest: Manifest, contents: Contents) -> None:
    """Fill the folder of a version."""
    for name, source in contents.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        else:
            shutil.copyfile(source, target)
        if sha256_file(target) != manifest.sha256[name]:
            raise BadInput(f"{name} changed while it was copied. Run the same command again.")
    (folder / FOLDER).mkdir(exist_ok=True)
    write_json(folder / FILE, manifest.to_json())


def write_state(folder: Path, server: str, served: Sequence[int]) -> None:
    """Note in a model's folder what is served."""
    write_json(folder / STATE, asdict(State(SCHEMA_VERSION, server, tuple(served))))


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, each by one rename, in their order; those that are the same already stay untouched."""
    for name, content in files.items():
        path = folder / name
        data = content.encode() if isinstance(content, str) else content
        if path.is_file() and path.read_bytes() == data:
            continue
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
