"""Run cells by priority in workers until the time is up; a crash or a hang costs one cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.process import WorkerDied

GRACE_S = 20.0
"""A cell that runs when the time is up may take so much longer."""


class Worker(Protocol):
    """What runs cells; see `WorkerProcess`."""

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run a cell."""

    def close(self, *, patience_s: float = 10.0) -> None:
        """End the worker."""


def run_cells(
    cells: Sequence[Cell],
    start_worker: Callable[[], Worker],
    record: Callable[[Cell, dict[str, Any]], None],
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Cell]:
    """Run what fits.

    Args: start_worker: called when there is none, at first and after a failure. record: gets each cell's row.
        seconds: no cell starts whose expected time does not fit in what is left of these.
    Returns: cells for which there was no time.
    """
    deadline = clock() + seconds
    worker: Worker | None = None
    left_out = []
    try:
        for cell in cells:
            left = deadline - clock()
            if left < cell.seconds:
                left_out.append(cell)
                continue
            try:
                worker = worker or start_worker()
                answer = worker.ask(cell.to_json(), min(cell.limit_s, max(0.0, deadline - clock()) + GRACE_S))
            except WorkerDied as err:
                if worker is not None:
                    worker.close(patience_s=0)
                    worker = None
                if clock() >= deadline:  # ended by the end of the run, not by a fault of its own
                    left_out.append(cell)
                    continue
                answer = {"status": "failed", "error": str(err), "seconds": None}
            record(cell, answer)
    except BaseException:
        if worker is not None:
            worker.close(patience_s=0)  # it may be in the middle of a cell
        raise
    if worker is not None:
        worker.close()
    return left_out
