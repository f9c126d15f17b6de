"""Accuracy at 60, 40 and 25% of the MACs without retraining: ours and peers, on the same rows in one run.

A cell is one task, calibration seed, method and budget; it is a file with a figure for each test row, so that a run can
be interrupted and continued, and methods compared row by row (after a change of a method, delete its files). Nothing is
chosen on test rows. Run: python -m benchmarks.accuracy --minutes 20, as often as needed; --record writes the table.
GLUE, with a connection: python -m benchmarks.accuracy --glue mrpc --model my-bert-fine-tuned-on-mrpc
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks.accuracy.methods import METHODS, PEERS, Case
from benchmarks.record import RESULTS, write_result
from benchmarks.tasks import TASKS, Task
from benchmarks.tasks.glue import GLUE, glue
from optin_deploy.bench.report import to_table
from optin_deploy.quality import outputs_of
from optin_deploy.storage import read_json, sha256_tensors, write_json
from optin_deploy.terminal import quiet_libraries

Cell = tuple[str, int, str, float]
"""Task, seed, method, share of the MACs."""
DENSE, OURS = "dense", "ours"
GATE = ["sentiment", "r8", "cifar10"]


def main() -> None:
    """Do open cells for some time, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=GATE, choices=list(TASKS))
    parser.add_argument("--glue", choices=list(GLUE), help="a task of GLUE instead, for the classifier of --model")
    parser.add_argument("--model", help="with --glue: folder or hub id")
    parser.add_argument("--data", type=Path, help="with --glue: folder with its files. Default: from the hub")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its own calibration rows")
    parser.add_argument("--rows", type=int, default=512, help="calibration rows of a seed")
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=20, help="starts no cell after that")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps the fine-tuned models")
    parser.add_argument("--cells", type=Path, default=Path("out/accuracy"), help="keeps the finished cells")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.glue and not options.model:
        parser.error("--glue needs --model, a classifier that was fine-tuned on this task")
    quiet_libraries()
    end = time.monotonic() + 60 * options.minutes
    found: dict[Cell, dict[str, Any]] = {}
    for task in tasks(options):
        wanted = list(product([task.name], options.seeds, options.methods, options.flops))
        found |= cells(task, wanted, options.cells, rows=options.rows, test_rows=options.test_rows, end=end)
    text = page(found)
    print(text)
    data = {
        "cells": [
            {"task": t, "seed": s, "method": m, "flops": f, "value": c["value"], "seconds": c["seconds"]}
            for (t, s, m, f), c in found.items()
        ]
    }
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]])
    write_result(RESULTS if options.record else options.cells, "accuracy", data, text, command)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """What was asked for, one after the other."""
    if options.glue:
        yield glue(options.glue, options.model, data=options.data)
        return
    for name in options.tasks:
        yield TASKS[name](options.cache)


def cells(
    task: Task, wanted: Sequence[Cell], folder: Path, *, rows: int, test_rows: int, end: float
) -> dict[Cell, dict[str, Any]]:
    """The finished cells of one task; open ones are done until `end`."""
    test = task.batches(task.test[:test_rows])
    key = sha256_tensors(task.model.state_dict())[:12]
    found: dict[Cell, dict[str, Any]] = {}
    cases: dict[int, Case] = {}  # what the budgets of a seed share; made for open cells alone
    for cell in [(task.name, -1, DENSE, 1.0), *wanted]:
        _, seed, method, flops = cell
        name = "-".join(c if c.isalnum() else "_" for c in method)
        path = folder / f"{task.name}-{key}" / f"{rows}-{test_rows}" / f"{name}-{flops:g}-seed{seed}.json"
        if path.exists():
            found[cell] = read_json(path, "Delete it to measure it again.")
            continue
        if time.monotonic() > end and method != DENSE:
            continue
        if seed not in cases and method != DENSE:
            cases[seed] = _case(task, seed, rows)
        started = time.perf_counter()
        model = task.model if method == DENSE else METHODS[method](cases[seed], flops)
        seconds = time.perf_counter() - started
        found[cell] = {**judged(outputs_of(model, test.batches), test.labels), "seconds": round(seconds, 1)}
        if method == OURS:
            spent = cases[seed].seconds
            found[cell]["forwards"] = {stage: round(s / spent["forward"], 1) for stage, s in spent.items()}
        write_json(path, found[cell])
        print(*cell, f"{found[cell]['value']:.2%}", f"{seconds:.0f} s", flush=True)
    return found


def _case(task: Task, seed: int, rows: int) -> Case:
    drawn = random.Random(seed).sample(task.calibration, min(rows, len(task.calibration)))
    return Case(task.model, task.seq_len, task.batches(drawn), seed)


def judged(outputs: torch.Tensor, labels: Sequence[Any]) -> dict[str, Any]:
    """The task's metric, and a figure for each row, by which methods are paired.

    Classes: accuracy, and 1 for a right row. Numbers: Spearman's correlation, and the negative squared error.
    """
    wanted = torch.tensor(labels)
    if outputs.shape[1] > 1:
        right = (outputs.argmax(1) == wanted).int()
        return {"value": float(right.float().mean()), "rows": right.tolist()}
    found = outputs[:, 0]
    return {"value": float(spearmanr(found, wanted).statistic), "rows": (-((found - wanted) ** 2)).tolist()}


def page(found: Mapping[Cell, Mapping[str, Any]]) -> str:
    """The result for people."""
    tasks = list(dict.fromkeys(task for task, *_ in found))
    budgets = list(dict.fromkeys(flops for *_, method, flops in found if method != DENSE))
    methods = [method for method in METHODS if any(cell[2] == method for cell in found)]
    dense = {task: found[task, -1, DENSE, 1.0]["value"] for task in tasks}
    lines = []
    for method in methods:
        row = [method]
        for flops in budgets:
            drops = []
            for task in tasks:
                some = [c["value"] for (t, _, m, f), c in found.items() if (t, m, f) == (task, method, flops)]
                row.append(_spread(some))
                drops.append(100 * (dense[task] - statistics.mean(some)) if some else float("nan"))
            row.append(f"{statistics.mean(drops):.2f}")
        seconds = [c["seconds"] for (_, _, m, _), c in found.items() if m == method]
        lines.append((*row, f"{statistics.mean(seconds):.0f}"))
    header = ["method", *(x for flops in budgets for x in (*(f"{t} {flops:g}" for t in tasks), f"drop {flops:g}")), "s"]
    told = ", ".join(f"{task} {100 * value:.2f}%" for task, value in dense.items())
    spent = [c["forwards"] for (_, _, m, _), c in found.items() if m == OURS and "forwards" in c]
    stages = [
        f"{stage} {statistics.mean(forwards[stage] for forwards in spent):.0f}"
        for stage in (spent[0] if spent else {})
        if stage != "forward"
    ]
    return (
        f"# Accuracy without retraining\n\nShare of right test rows in percent at shares of the dense MACs, mean and "
        f"spread (standard deviation) over calibration seeds; drop: mean points lost over the tasks. Dense: {told}.\n\n"
        f"{to_table(header, lines)}\n\n"
        + "\n".join(_paired(found, tasks, budgets))
        + (f"\n\nOurs in dense forwards over the calibration rows: {', '.join(stages)}." if stages else "")
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _paired(found: Mapping[Cell, Mapping[str, Any]], tasks: Sequence[str], budgets: Sequence[float]) -> Iterator[str]:
    """Ours against the best peer of each cell, on the same rows."""
    for flops in budgets:
        for task in tasks:
            ours = _rows(found, task, OURS, flops)
            peers = {peer: rows for peer in PEERS if (rows := _rows(found, task, peer, flops)) is not None}
            if ours is None or not peers:
                continue
            best = max(peers, key=lambda peer: float(peers[peer].mean()))
            gain = ours - peers[best]
            error = float(gain.std() / len(gain) ** 0.5)
            yield f"- {task} at {flops:g}: {100 * float(gain.mean()):+.2f} ± {100 * error:.2f} points over {best}."


def _rows(found: Mapping[Cell, Mapping[str, Any]], task: str, method: str, flops: float) -> torch.Tensor | None:
    """Mean over the seeds of each test row's figure, (rows,)."""
    some = [cell["rows"] for (t, _, m, f), cell in found.items() if (t, m, f) == (task, method, flops)]
    return torch.tensor(some, dtype=torch.float64).mean(0) if some else None


if __name__ == "__main__":
    main()
