"""The kinds of cells: each takes a cell and the workbench, and gives a JSON-ready result."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.kinds.pair import pair
from benchmarks.gpu.kinds.profile import profile
from benchmarks.gpu.kinds.score import score_times
from benchmarks.gpu.kinds.table import table
from benchmarks.gpu.workbench import Workbench

MEASURES = {"pair": pair, "table": table, "score": score_times, "profile": profile}


def measure_cell(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Measure a cell by its kind.

    Raises: Skipped: its engine cannot run here.
    """
    return MEASURES[cell.kind](cell, bench)
