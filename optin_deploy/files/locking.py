"""Locks between processes: the operating system's lock on a file, which falls when its holder ends, however that is."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.files.byte_lock import ByteLock
from optin_deploy.files.descriptors import WINDOWS, open_flags

log = logging.getLogger(__name__)

ATTEMPTS = 100
"""Attempts to open a file in a folder that another process is removing at the same moment."""


@dataclass(eq=False)
class Lock:
    """A lock on an open file.

    Where there are none (some network file systems) every `take` succeeds: work may then be done twice, with the same
    result.
    """

    path: Path
    handle: int | None
    """Descriptor of the open file; None: it is closed."""

    def __post_init__(self) -> None:
        self._bytes = ByteLock(self._open())

    def take(self, *, wait: bool = False, shared: bool = False) -> bool:
        """Take it, alone or together with others, or change from one to the other.

        Returns: False if it is held and `wait` is off.
        """
        try:
            return self._flock(wait, shared)
        except ImportError:
            return True
        except OSError as err:
            log.warning("no locks on this file system (%s): other processes may do the same work", err)
        return True

    def remove(self) -> None:
        """Remove the file, which is empty, of a lock that is held alone."""
        if self.stands() and os.fstat(self._open()).st_size == 0:
            if not WINDOWS:
                self.path.unlink()
                return
            self.close()  # Windows removes no file that is open, also if another one opened it: then it stays
            with suppress(OSError):
                self.path.unlink()

    def stands(self) -> bool:
        """Is this still the file at its path?"""
        try:
            return os.path.samestat(os.fstat(self._open()), self.path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go of the lock, and of the file."""
        if self.handle is not None:
            with suppress(OSError, ImportError):
                self._bytes.release()
            os.close(self.handle)
            self.handle = None

    def _open(self) -> int:
        assert self.handle is not None, "the lock is closed"
        return self.handle

    def _flock(self, wait: bool, shared: bool) -> bool:
        try:
            import fcntl
        except ImportError:
            return self._bytes.take(wait=wait, shared=shared)
        try:
            fcntl.flock(self._open(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextmanager
def opened(path: Path) -> Iterator[Lock]:
    """Open the file of a lock, which is made if it is absent; what it holds is never touched.

    Raises: BadInput: it is a link, whose target is none of ours, or cannot be made.
    """
    lock = Lock(path, _open(path))
    try:
        yield lock
    finally:
        lock.close()


def _open(path: Path) -> int:
    """Open for reading and writing: network file systems give shared locks only to readers, exclusive ones only to
    writers."""
    flags = os.O_RDWR | os.O_CREAT | open_flags("O_NOFOLLOW", "O_NONBLOCK")
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
                raise _not_a_lock(path)
            try:
                return os.open(path, flags, 0o666)
            except OSError as err:
                if err.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO) and not path.is_dir():
                    raise
                raise _not_a_lock(path) from err
    raise BadInput(f"{path} cannot be made. Look at its folder.")


def _not_a_lock(path: Path) -> BadInput:
    return BadInput(f"{path} is a link, a folder or a pipe, where a lock is to be. Remove it.")
