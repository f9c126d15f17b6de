"""Which files of a folder are ours, and the only place that replaces or removes any.

A folder that we write to has a record: a line for each file with its name and the hash of what it holds, written before
the file takes its name, so that a process killed at any moment leaves no file of ours that the record does not know.
What the record knows may be replaced and removed. What was changed since is set aside under another name.
Everything else is somebody else's: it stays, and nothing is written over it.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.files.byte_lock import ByteLock
from optin_deploy.files.descriptors import WINDOWS, open_flags, retried
from optin_deploy.files.paths import exists, is_empty, is_file, is_folder, sha256_file

log = logging.getLogger(__name__)

RECORD = ".optin-files.jsonl"
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>tmp|old)")
"""A name that is only written to; see `beside`."""
RECORD_LIMIT_BYTES = 64 * 2**20
"""A line takes about 120 bytes; anything above this is not ours."""
LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Bytes that Linux and macOS take."""


@dataclass(frozen=True)
class Record:
    """The files of one folder that we made."""

    root: Path

    @classmethod
    def above(cls, path: Path) -> Record | None:
        """The record of the nearest folder above a file or folder; None: we keep none there.

        A folder that is still being written has none: what it holds is noted when it is whole.
        """
        for folder in Path(os.path.abspath(path)).parents:
            if TEMPORARY.fullmatch(folder.name):
                return None
            if is_file(folder / RECORD):
                return cls(folder)
        return None

    def begin(self) -> None:
        """Keep a record from now on.

        Raises: BadInput: its file is a link, which could lead anywhere.
        """
        self._append()

    def note(self, path: Path, sha256: str) -> None:
        """What is at `path` from now on, or in a moment, is ours if it holds this."""
        self._append({"file": self._name(path), "sha256": sha256})

    def note_temporary(self, path: Path) -> None:
        """A name that is being written to; `clear_temporaries` removes what a killed process left there."""
        self._append({"temporary": self._name(path)})

    def names(self) -> tuple[str, ...]:
        """Files that we made at some time, relative to the folder, in the order of their names."""
        return tuple(sorted(self._known()))

    def owns(self, path: Path) -> bool:
        """Did we make this file, and does it hold what we wrote; or did we make all that is in this folder?"""
        if is_folder(path):
            own = Record(path)
            return is_file(path / RECORD) and all(own.owns(file) for file in _files(path))
        return (
            self._is_inside(path) and is_file(path) and sha256_file(path) in self._known().get(self._name(path), set())
        )

    def strangers(self, path: Path) -> list[Path]:
        """What others put at a name, or into a folder of this name; what we made and somebody changed is none."""
        if is_folder(path):
            own = Record(path)
            if not is_file(path / RECORD):
                return [path] if any(path.iterdir()) else []
            return [file for file in _files(path) if own.strangers(file)]
        return [path] if exists(path) and self._name(path) not in self._known() else []

    def reserve(self, names: Iterable[str], *, force: bool = False, dry_run: bool = False) -> None:
        """See to it that we may write at these names. With `force`, files of others are set aside, never folders.

        Raises: BadInput: somebody else's file or folder is there; nothing was changed then.
        """
        paths = [self.root / name for name in dict.fromkeys(names)]
        strange = {path: self.strangers(path) for path in paths}
        refused = [each for path, found in strange.items() for each in found if not force or is_folder(path)]
        if refused:
            raise BadInput(in_the_way(refused) + _unrecorded([self.root, *filter(is_folder, refused)]))
        for path in (path for path, found in strange.items() if found and not dry_run):
            log.warning("%s was there before; it is kept as %s", path, set_aside(path).name)

    def make_room(self, path: Path) -> None:
        """Set aside what stands at `path` and is not ours, or was changed, before something of ours takes the name."""
        if exists(path) and not is_empty(path) and not self.owns(path):
            self._set_aside(path)

    def remove(self, name: str) -> None:
        """Remove a file or folder of ours; what was changed is set aside, what somebody put into a folder stays."""
        path = self.root / name
        if not self._is_inside(path):
            return
        if is_folder(path):
            own = Record(path)
            if not is_file(path / RECORD):
                return  # somebody else's
            for file in _files(path):
                own.remove(str(file.relative_to(path)))
            if not _files(path):
                (path / RECORD).unlink(missing_ok=True)
            for folder in sorted((each for each in (path, *path.rglob("*")) if is_folder(each)), reverse=True):
                with suppress(OSError):  # somebody's file is in it
                    folder.rmdir()
        elif self.owns(path):
            retried(path.unlink)
        elif exists(path) and not self.strangers(path):
            self._set_aside(path)

    def clear_temporaries(self) -> None:
        """Remove what killed processes left half-written; only for who holds the folder's lock alone."""
        for line in self._lines():
            name = str(line.get("temporary", ""))
            path = self.root / name
            if not (found := TEMPORARY.fullmatch(path.name)) or not self._is_inside(path):
                continue
            place = path.parent / found["name"]
            if found["kind"] == "old" and not exists(place) and is_folder(path):
                path.rename(place)  # it was killed between the two renames of an exchange
            elif is_folder(path):
                retried(shutil.rmtree, path)  # its name was drawn at random, so that nobody else writes there
            elif is_file(path):
                retried(path.unlink)

    def _is_inside(self, path: Path) -> bool:
        """Does it lie in the folder, and not behind a link that leads out of it?"""
        return path.parent.resolve().is_relative_to(self.root.resolve())

    def _set_aside(self, path: Path) -> None:
        log.warning("%s is not what was written there; it is kept as %s", path, set_aside(path).name)

    def _known(self) -> dict[str, set[str]]:
        """Name -> hashes of what we ever wrote there."""
        known: dict[str, set[str]] = {}
        for line in self._lines():
            name, sha256 = line.get("file"), line.get("sha256")
            if isinstance(name, str) and isinstance(sha256, str):
                known.setdefault(name, set()).add(sha256)
        return known

    def _lines(self) -> Iterator[dict[str, object]]:
        """What the record says; a line that a killed process cut short is passed over, and so is a name outside."""
        path = self.root / RECORD
        if not is_file(path) or path.stat().st_size > RECORD_LIMIT_BYTES:
            return
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and _is_relative(line.get("file", line.get("temporary"))):
                yield line

    def _append(self, line: dict[str, str] | None = None) -> None:
        path = self.root / RECORD
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | open_flags("O_NOFOLLOW")
        try:
            if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            handle = os.open(path, flags, 0o666)
        except OSError as err:
            if path.is_symlink() or path.is_dir():
                raise BadInput(f"{path} is a link or a folder, where our record is to be. Remove it.") from err
            raise
        lock = ByteLock(handle)
        try:
            if line is not None:
                if WINDOWS:  # which first looks for the end of a file and then writes: another line may come in between
                    lock.take(wait=True, shared=False)
                size = os.fstat(handle).st_size
                os.lseek(handle, max(0, size - 1), os.SEEK_SET)
                whole = size == 0 or os.read(handle, 1) == b"\n"
                data = f"{'' if whole else chr(10)}{json.dumps(line)}\n".encode()
                if os.write(handle, data) < len(data):  # without its line, the file would be nobody's of ours later
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(handle)
        finally:
            lock.release()
            os.close(handle)

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))).as_posix()


def beside(path: Path, kind: str = "tmp") -> Path:
    """A new hidden name to write to before `path` is replaced by it; its record is made first, so that it is known."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{kind}")
    record = Record.above(path)
    if record is not None:
        record.note_temporary(temporary)
    return temporary


def in_the_way(paths: Iterable[Path]) -> str:
    """The sentence about files of others that stand where ours are to be."""
    names = [str(path) for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: optin-deploy did not make this, and would write over it. Move it away, or use "
        "another folder or name; --force keeps files (not folders) under another name."
    )


def _unrecorded(folders: Iterable[Path]) -> str:
    """Why files that look like ours are not known as ours; empty: all these folders have a record."""
    for path in (folder / RECORD for folder in folders):
        if not (is_file(path) and 0 < path.stat().st_size <= RECORD_LIMIT_BYTES):
            return (
                f" If it did make this: the record {path} is missing or unusable, without which nothing counts as its "
                "own. Copy such a folder with its hidden files; earlier versions made none."
            )
    return ""


def free_name(path: Path, ours: Callable[[Path], bool], *, force: bool = False, dry_run: bool = False) -> None:
    """See to it that one file of ours may be written where the user says. With `force`, what is there is set aside.

    Args: ours: is an existing file of the kind that is written? dry_run: only look.
    Raises: BadInput: it is a folder, a device such as /dev/null, or a file of another kind.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder. Give a file.")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is a device or a pipe. Give a file: it would be replaced.")
    if not exists(path) or ours(path):
        return
    if not force:
        raise BadInput(
            f"{path} exists and is no earlier result of this command; it would be written over. Give another name, or "
            "--force, which keeps it under another one."
        )
    if not dry_run:
        log.warning("%s was there before; it is kept as %s", path, set_aside(path).name)


def set_aside(path: Path) -> Path:
    """Give a file or folder another name beside it, so that nothing is lost. Returns: the new path."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.kept{number}")
        if not exists(kept):
            return retried(path.rename, kept)
    raise AssertionError("unreachable")


def record_all(folder: Path) -> None:
    """Note every file of a folder that we have just made, so that the folder may be replaced later."""
    record = Record(folder)
    record.begin()
    for file in _files(folder):
        record.note(file, sha256_file(file))


def _files(folder: Path) -> list[Path]:
    """Everything in a folder that is no folder itself, besides the record."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path for path in paths if path.name != RECORD)


def _is_relative(name: object) -> bool:
    """A relative name that a file can have, and that does not lead out of its folder."""
    if not isinstance(name, str) or name == "" or Path(name).anchor or ".." in Path(name).parts:
        return False
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return b"\0" not in raw and len(raw) < LONGEST_PATH and all(len(part) <= LONGEST_NAME for part in raw.split(b"/"))
