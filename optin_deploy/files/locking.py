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

log = logging.getLogger(__name__)

ATTEMPTS = 100
"""Attempts to open a file in a folder that another process is removing at the same moment."""


@dataclass(frozen=True, eq=False)
class Lock:
    """A lock on an open file.

    Where there are none (some network file systems) every `take` succeeds: work may then be done twice, with the same
    result.
    """

    path: Path
    handle: int
    """Descriptor of the open file."""

    def take(self, *, wait: bool = False, shared: bool = False) -> bool:
        """Take it, alone or together with others, or change from one to the other.

        Returns: False if it is held and `wait` is off.
        """
        try:
            import fcntl
        except ImportError:
            return True
        try:
            fcntl.flock(self.handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as err:
            log.warning("no locks on this file system (%s): other processes may do the same work", err)
        return True

    def remove(self) -> None:
        """Remove the file, which is empty, of a lock that is held alone."""
        if self.stands() and os.fstat(self.handle).st_size == 0:
            self.path.unlink()

    def stands(self) -> bool:
        """Is this still the file at its path?"""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def opened(path: Path) -> Iterator[Lock]:
    """Open the file of a lock, which is made if it is absent; what it holds is never touched.

    Raises: BadInput: it is a link, whose target is none of ours, or cannot be made.
    """
    handle = _open(path)
    try:
        yield Lock(path, handle)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Open for reading and writing: network file systems give shared locks only to readers, exclusive ones only to
    writers."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            except OSError as err:
                if err.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
                raise BadInput(f"{path} is a link, a folder or a pipe, where a lock is to be. Remove it.") from err
    raise BadInput(f"{path} cannot be made. Look at its folder.")
