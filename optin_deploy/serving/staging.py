"""All or nothing: what is new is written into one hidden folder first, then moved to its places, each by one rename.

Whatever fails before the last rename, a full disk or an interrupt, leaves everything as it was: moves are taken back.
A process that is killed between two renames cannot do that. Each file and folder is then whole, old or new, and the
next publication of the same finishes it and removes the hidden folder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.files.descriptors import retried, sync
from optin_deploy.files.ownership import Record
from optin_deploy.files.storage import scratch_folder, sha256_file


@dataclass(frozen=True, eq=False)
class Staging:
    """Files and folders on their way into one folder."""

    root: Path
    scratch: Path
    """The hidden folder, on the same file system."""
    moves: list[tuple[Path, Path]] = field(default_factory=list)
    """(where it is written, where it belongs), in the order in which they take their places."""

    def path(self, target: Path) -> Path:
        """Path to write to for what belongs at `target`; inside a staged folder if it belongs into one."""
        for staged, place in self.moves:
            if target.is_relative_to(place):
                return staged / target.relative_to(place)
        self.moves.append((self.scratch / str(len(self.moves)), target))
        return self.moves[-1][0]

    def folder(self, target: Path) -> None:
        """Stage a folder that is not there yet; what is staged below it moves with it."""
        self.path(target).mkdir(parents=True, exist_ok=True)

    def write(self, target: Path, data: bytes) -> None:
        """Stage a file that later ones may replace: it is noted as ours."""
        path = self.path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        Record(self.root).note(target, hashlib.sha256(data).hexdigest())

    def copy(self, source: Path | bytes, target: Path, sha256: str) -> None:
        """Stage a file that nothing replaces.

        Raises: BadInput: its hash is another one by now.
        """
        path = self.path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            shutil.copyfile(source, path)
        if sha256_file(path) != sha256:
            raise BadInput(f"{target.name} changed while it was copied. Run the same command again.")

    def commit(self) -> None:
        """Move everything to its place, or nothing."""
        for path in (path for path in self.scratch.rglob("*") if path.is_file()):
            sync(path)
        before = {target: _copied(target, self.scratch / f"before-{i}") for i, (_, target) in enumerate(self.moves)}
        done: list[tuple[Path, Path]] = []
        made: list[Path] = []
        try:
            for staged, target in self.moves:
                made += _made(target.parent)
                done.append((staged, target))
                retried(staged.replace, target)
        except BaseException:
            for staged, target in reversed(done):
                old = before[target]
                if old is not None:
                    retried(old.replace, target)
                elif not staged.exists() and target.exists():
                    retried(target.replace, staged)
            for folder in reversed(made):
                with suppress(OSError):  # somebody else's file is in it
                    folder.rmdir()
            raise


@contextmanager
def staged(root: Path) -> Iterator[Staging]:
    """Write into a folder whose lock is held: all that is staged inside of the block, or nothing.

    Raises: BadInput: the disk is full.
    """
    record = Record(root)
    record.begin()
    record.clear_temporaries()
    with scratch_folder(root / "ship") as scratch:
        staging = Staging(root, scratch)
        yield staging
        staging.commit()


def _copied(target: Path, copy: Path) -> Path | None:
    """A copy of a file that is to be replaced; None: there is none."""
    return Path(shutil.copy2(target, copy)) if target.is_file() else None


def _made(folder: Path) -> list[Path]:
    """Make a folder and those above it. Returns: the ones that were not there, outermost first."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent[::-1]
