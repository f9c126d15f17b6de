"""Kind `table`: whole-model milliseconds with all layers at (heads, neurons), for time budgets."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Run, open_engine
from benchmarks.gpu.models import MODELS, equal_plan
from benchmarks.gpu.precision import matmul_mode
from benchmarks.gpu.timing import compare, measure
from benchmarks.gpu.workbench import SEED, Workbench
from optin_deploy.measuring.device_clock import timer_for


def table(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time each width against the dense model, interleaved, so that a drifting clock shows in both.

    Returns: rows of heads, neurons, ms, dense_ms (of the same rounds), relative (ms / dense ms).
    """
    dense, cost = bench.dense(cell.model), bench.cost(cell.model, cell.seq)
    inputs = bench.inputs(cell)
    timer = timer_for(bench.device)
    rows = []
    with matmul_mode(cell.precision), open_engine(cell.engine, dense, inputs, cell.precision) as dense_run:
        for heads, neurons in grid(cell):
            plan = equal_plan(MODELS[cell.model], heads=heads, neurons=neurons)
            smaller = bench.cut(cell.model, plan)
            with open_engine(cell.engine, smaller, inputs, cell.precision) as run:
                runs: dict[str, Run] = {"dense": dense_run, "point": run}
                samples = measure(runs, timer, timed_s=cell.timed_s, blocks=cell.blocks, seed=SEED)
            ms = {name: found.to_json(cell.batch)["p50_ms"] for name, found in samples.items()}
            relative = 1 / compare(samples["dense"], samples["point"], seed=SEED)["speedup"]
            rows.append(
                {
                    "heads": heads,
                    "neurons": neurons,
                    "macs_kept": cost.of(plan) / cost.dense,
                    "ms": ms["point"],
                    "dense_ms": ms["dense"],
                    "relative": relative,
                }
            )
            del smaller, run, runs
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()  # each captured graph had memory of its own
    return {"tokens": cost.tokens, "seed": SEED, "rows": rows}


def grid(cell: Cell) -> list[tuple[int, int]]:
    """The points (heads, neurons): the whole grid, then the steps beside all heads; the model itself is left out."""
    most = max(cell.heads)
    points = [(h, n) for h in cell.heads for n in cell.neurons] + [(most, n) for n in cell.steps]
    return [point for point in dict.fromkeys(points) if point != (most, max(cell.neurons))]
