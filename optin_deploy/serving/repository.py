"""A model repository on disk: versions that are never overwritten, and one small file that says which are served.

All of a publication is written aside (see `staging`). New versions are renamed into place as a whole; servers pass them
by until the files that name the served versions follow, each by one rename, the one that switches last. So a polling
server sees the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput
from optin_deploy.files.locking import opened
from optin_deploy.files.ownership import RECORD
from optin_deploy.files.storage import sha256_file
from optin_deploy.serving.manifest import (
    FILE,
    FOLDER,
    Manifest,
    check_canary,
    check_files,
    check_name,
    check_version,
    read_manifest,
    same_version,
    with_canary,
)
from optin_deploy.serving.staging import Staging

STATE = "optin.json"
"""File in a model's folder that says which versions are served."""
LOCK = ".optin.lock"
AS_PUBLISHED = 0
"""The share of the traffic is what the version's manifest says, as in files of schema_version 1."""
HINT = "Make a repository with `optin ship DIR --server triton --out REPO`."


@dataclass(frozen=True)
class State(Stored):
    """Which versions of a model are served."""

    schema_version = 2
    older = (1,)
    hint = HINT

    server: str
    served: tuple[int, ...]
    canary: int | None = AS_PUBLISHED
    """Percent of KServe's traffic that goes to the last of them; None: all."""

    def __post_init__(self) -> None:
        if self.canary != AS_PUBLISHED:
            check_canary(self.canary)
        if not 1 <= len(self.served) <= 2 or len(set(self.served)) != len(self.served):
            raise BadInput(f"{len(self.served)} served versions; possible are one, or two different ones side by side")
        for version in self.served:
            check_version(version)

    def to_bytes(self) -> bytes:
        """What STATE holds."""
        return f"{json.dumps(self.to_json(), indent=1)}\n".encode()


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
        """Let only one process publish at a time. A folder that is not there is made, and goes if nothing comes into
        it.

        Raises: BadInput: another one is at it, or the root is no folder.
        """
        if self.root.exists() and not self.root.is_dir():
            raise BadInput(f"--out {self.root} is not a folder. Give a folder.")
        made = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        with opened(self.root / LOCK) as lock:
            if not (lock.take() and lock.stands()):
                raise BadInput(f"another process is publishing to {self.root}. Wait for it, then repeat.")
            try:
                yield
            finally:
                if made and not {path.name for path in self.root.iterdir()} - {LOCK, RECORD}:
                    (self.root / RECORD).unlink(missing_ok=True)
                    with suppress(OSError):  # another one came at this moment; Windows removes no lock that is held
                        (self.root / LOCK).unlink(missing_ok=True)
                        self.root.rmdir()

    def names(self) -> tuple[str, ...]:
        """Models that `optin ship` made; none where the repository is not there yet."""
        if self.root.exists() and not self.root.is_dir():
            raise BadInput(f"{self.root} is not a folder. {HINT}")
        return tuple(sorted(path.parent.name for path in self.root.glob(f"*/{STATE}")))

    def folder(self, name: str, version: int | None = None) -> Path:
        """Folder of a model, or of one version of it.

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
        if not file.is_file():
            raise BadInput(f"{file} does not exist: {name!r} is not a model of this repository. {HINT}")
        return State.read(file)

    def manifest(self, name: str, version: int) -> Manifest:
        """Manifest of one version.

        Raises: BadInput: it does not exist, or is damaged.
        """
        if version not in self.versions(name):
            known = ", ".join(map(str, self.versions(name))) or "none"
            raise BadInput(f"{name} has no version {version}; published are: {known}.")
        return read_manifest(self.folder(name, version), name, version)

    def served(self, name: str) -> tuple[Manifest, ...]:
        """The manifests of the served versions, with the share of the traffic that they get now."""
        state = self.state(name)
        found = tuple(self.manifest(name, version) for version in state.served)
        return found if state.canary == AS_PUBLISHED else tuple(with_canary(each, state.canary) for each in found)

    def numbers(self, name: str) -> tuple[int, ...]:
        """Every number that is taken in a model's folder, also by what `optin ship` did not publish."""
        names = [path.name for path in self.folder(name).glob("*")]
        return tuple(sorted(int(number) for number in names if number.isascii() and number.isdigit()))

    def is_new(self, manifest: Manifest) -> bool:
        """Is this version still to be written?

        Returns: False if this very version is there already, whole.
        Raises: BadInput: another version of this number exists; it is never overwritten. Or the model's folder is not
            one of `optin ship`.
        """
        folder = self.folder(manifest.name, manifest.version)
        if manifest.name not in self.names():
            if os.path.lexists(folder.parent):
                raise BadInput(
                    f"{folder.parent} exists, but `optin ship` did not make it. Use another --name, or remove it."
                )
            return True
        if not os.path.lexists(folder):
            return True
        if self.has(manifest):
            return False
        raise BadInput(
            f"{folder} exists and holds something else; a version is never overwritten. Published are "
            f"{', '.join(map(str, self.versions(manifest.name))) or 'none'}: leave out --version for the next one."
        )

    def has(self, manifest: Manifest) -> bool:
        """Is this very version published, whole?"""
        try:
            found = self.manifest(manifest.name, manifest.version)
            check_files(self.folder(manifest.name, manifest.version), found)
        except BadInput:
            return False
        return same_version(found, manifest)


def hashes(contents: Contents) -> dict[str, str]:
    """sha256 (hex) of each file of a version."""
    return {
        name: hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
        for name, source in contents.items()
    }


def stage_version(staging: Staging, folder: Path, manifest: Manifest, contents: Contents) -> None:
    """Write the folder of a version aside."""
    staging.folder(folder)
    for name, source in contents.items():
        staging.copy(source, folder / name, manifest.sha256[name])
    staging.folder(folder / FOLDER)
    manifest.write(staging.path(folder / FILE))


def state_of(server: str, served: Sequence[Manifest]) -> State:
    """State in which these versions are served."""
    return State(server, tuple(manifest.version for manifest in served), served[-1].options.canary)
