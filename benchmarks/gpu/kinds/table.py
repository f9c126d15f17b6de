"""Kind `table`: whole-model milliseconds with all layers at (heads, neurons), for time budgets."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import open_engine
from benchmarks.gpu.models import MODELS, equal_plan
from benchmarks.gpu.timing import back_to_back, times
from benchmarks.gpu.workbench import SEED, Workbench
from optin_deploy.measuring.device_clock import timer_for
from optin_deploy.measuring.timing import mean_ratio


def table(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time each width against the dense model, interleaved, so that a drifting clock shows in both.

    Returns: rows of heads, neurons, ms, dense_ms (of the same rounds), relative (ms / dense ms).
    """
    dense, cost = bench.dense(cell.model), bench.cost(cell.model, cell.seq)
    inputs = bench.inputs(cell)
    timer = timer_for(bench.device)
    rows = []
    with open_engine(cell.engine, dense, inputs, cell.precision) as dense_launch:
        for heads, neurons in grid(cell):
            plan = equal_plan(MODELS[cell.model], heads=heads, neurons=neurons)
            with open_engine(cell.engine, bench.cut(cell.model, plan), inputs, cell.precision) as launch:
                launches = {"dense": dense_launch, "point": launch}
                found = back_to_back(launches, timer, timed_s=cell.timed_s, blocks=cell.blocks, seed=SEED)
            rows.append(
                {
                    "heads": heads,
                    "neurons": neurons,
                    "macs_kept": cost.of(plan) / cost.dense,
                    "ms": times(found["point"])["p50_ms"],
                    "dense_ms": times(found["dense"])["p50_ms"],
                    "relative": mean_ratio(found["point"], found["dense"]),
                }
            )
            del launch, launches
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()  # each captured graph had memory of its own
    return {"tokens": cost.tokens, "seed": SEED, "rows": rows}


def grid(cell: Cell) -> list[tuple[int, int]]:
    """The points (heads, neurons): the whole grid, then the steps beside all heads; the model itself is left out."""
    most = max(cell.heads)
    points = [(h, n) for h in cell.heads for n in cell.neurons] + [(most, n) for n in cell.steps]
    return [point for point in dict.fromkeys(points) if point != (most, max(cell.neurons))]
