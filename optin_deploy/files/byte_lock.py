"""A shared or exclusive lock of an open file on Windows, which knows locks of bytes, each for one holder alone.

Who shares the lock holds one byte of many, drawn at random; who holds it alone holds them all. The bytes lie far behind
what such a file holds: Windows keeps others from reading what is locked.
"""

from __future__ import annotations

import os
import secrets
import time
from importlib import import_module

FIRST_BYTE = 2**30
"""Behind any file that is locked, and within the 31 bits that `msvcrt.locking` takes as a place."""
PLACES = 2**16
"""Bytes to draw from: those who share seldom draw the same one."""
DRAWS = 4
"""Draws before the lock counts as held by one alone; two who share draw the same byte each time in 1 of 10^19 tries."""
PAUSE_SECONDS = 0.05
"""Between two looks of one who waits; Ctrl-C is heard in between, which it is not inside of the system's own wait."""


class ByteLock:
    """The lock of one open file; it falls when it is released, when the file is closed, or when the process ends."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._held: tuple[int, int] | None = None
        """First byte and number of bytes."""

    def take(self, *, wait: bool, shared: bool) -> bool:
        """Let go of what is held, then take the lock.

        Returns: False if another one holds it and `wait` is off.
        Raises: ImportError: this is not Windows. OSError: the file system has no locks.
        """
        self.release()
        while not (taken := self._draw(shared)) and wait:
            time.sleep(PAUSE_SECONDS)
        return taken

    def release(self) -> None:
        """Let go of it, if it is held: closing the file does so too, but at a time that the system chooses."""
        if self._held is not None:
            self._lock("LK_UNLCK", *self._held)
            self._held = None

    def _draw(self, shared: bool) -> bool:
        for _ in range(DRAWS if shared else 1):
            start, count = (FIRST_BYTE + secrets.randbelow(PLACES), 1) if shared else (FIRST_BYTE, PLACES)
            try:
                self._lock("LK_NBLCK", start, count)
            except PermissionError:  # one of the bytes is another one's
                continue
            self._held = start, count
            return True
        return False

    def _lock(self, kind: str, start: int, count: int) -> None:
        msvcrt = import_module("msvcrt")
        os.lseek(self._handle, start, os.SEEK_SET)
        msvcrt.locking(self._handle, getattr(msvcrt, kind), count)
