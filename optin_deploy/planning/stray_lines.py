"""Lines that HiGHS prints whatever its options say are taken out of what this process writes."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STRAY = b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();"
"""A bare `printf` of HiGHS 1.12, which SciPy 1.17 holds: https://github.com/ERGO-Code/HiGHS/issues/2783."""
STDOUT = 1


@contextmanager
def without_stray_lines() -> Iterator[None]:
    """Hold back what is written to the standard output, and pass it on in the end without HiGHS's line."""
    try:
        real = os.dup(STDOUT)
    except OSError:  # it is closed
        yield
        return
    library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)  # C's buffer, which Python's functions do not see
    with os.fdopen(real, "wb", buffering=0) as out, tempfile.TemporaryFile() as held:
        library.fflush(None)
        os.dup2(held.fileno(), STDOUT)
        try:
            yield
        finally:
            library.fflush(None)
            os.dup2(real, STDOUT)
            held.seek(0)
            if rest := b"".join(line for line in held if line.strip() != STRAY):
                out.write(rest)
