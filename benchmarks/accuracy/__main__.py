"""Accuracy at 60, 40 and 25% of the MACs without retraining: ours and peers, on the same rows in one run.

A cell is one task, calibration seed, method and budget; it is a file with a figure for each test row, so that a run can
be interrupted and continued, and methods compared row by row (after a change of a method, delete its files). Nothing is
chosen on test rows. Run: python -m benchmarks.accuracy --minutes 20, as often as needed; --record writes the table.
GLUE, with a connection: python -m benchmarks.accuracy --glue mrpc --model my-bert-fine-tuned-on-mrpc
"""

from __future__ import annotations

import argparse
import random
import re
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
from torch import nn

from benchmarks.accuracy.methods import METHODS, PEERS, Case, Method
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
    parser.add_argument("--rows", type=int, default=1024, help="calibration rows of a seed")
    parser.add_argument("--test-rows", type=int, default=1500, help="of GLUE: all")
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
        test_rows = len(task.test) if options.glue else options.test_rows
        found |= cells(task, wanted, options.cells, rows=options.rows, test_rows=test_rows, end=end)
    text = page(found)
    print(text)
    asked = len(list(product(options.seeds, options.methods, options.flops))) + 1
    missing = asked * len({cell[0] for cell in found}) - len(found)
    if missing and options.record:
        sys.exit(f"{missing} cells are open: nothing is recorded. Run it again.")
    data = {
        "cells": [
            {"task": t, "seed": s, "method": m, "flops": f, "value": c["value"], "stages": c["stages"]}
            for (t, s, m, f), c in found.items()
        ]
    }
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]])
    name = (
        "accuracy"
        if not options.glue and options.tasks == GATE
        else f"accuracy_{'_'.join(dict.fromkeys(t for t, *_ in found))}"
    )
    write_result(RESULTS if options.record else options.cells, name, data, text, command)


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
        name = re.sub(r"\W+", "_", method)
        path = folder / f"{task.name}-{key}" / f"{rows}-{test_rows}" / f"{name}-{flops:g}-seed{seed}.json"
        if path.exists():
            found[cell] = read_json(path, "Delete it to measure it again.")
            continue
        if time.monotonic() > end and method != DENSE:
            continue
        if seed not in cases and method != DENSE:
            cases[seed] = _case(task, seed, rows)
        model, stages = (task.model, {}) if method == DENSE else timed(METHODS[method], cases[seed], flops)
        found[cell] = {**judged(outputs_of(model, test.batches), test.labels), "stages": stages}
        write_json(path, found[cell])
        print(*cell, f"{found[cell]['value']:.2%}", *(f"{stage} {s:.1f} s" for stage, s in stages.items()), flush=True)
    return found


def timed(method: Method, case: Case, flops: float) -> tuple[nn.Module, dict[str, float]]:
    """The pruned model, and the seconds of all that it needs, whoever made it first: shared stages, and its own work.

    A dense forward over the calibration rows is among them, as a unit.
    """
    forward = case.forward_seconds()
    case.used.clear()
    before, started = sum(case.seconds.values()), time.perf_counter()
    model = method(case, flops)
    own = time.perf_counter() - started - (sum(case.seconds.values()) - before)
    return model, {"forward": forward, **{stage: case.seconds[stage] for stage in sorted(case.used)}, "own": own}


def _case(task: Task, seed: int, rows: int) -> Case:
    # Of fewer rows not all are drawn, else the seeds would not differ.
    drawn = random.Random(seed).sample(task.calibration, min(rows, 3 * len(task.calibration) // 4))
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
    constant = bool((found == found[0]).all() or (wanted == wanted[0]).all())
    value = 0.0 if constant else float(spearmanr(found, wanted).statistic)
    return {"value": value, "rows": (-((found - wanted) ** 2)).tolist()}


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
        lines.append((*row, *_spent([c["stages"] for (_, _, m, _), c in found.items() if m == method])))
    columns = [x for flops in budgets for x in (*(f"{t} {flops:g}" for t in tasks), f"drop {flops:g}")]
    header = ("method", *columns, "seconds", "forwards")
    told = ", ".join(f"{task} {100 * value:.2f}%" for task, value in dense.items())
    rows = ", ".join(f"{task} {len(found[task, -1, DENSE, 1.0]['rows']):,}" for task in tasks)
    seeds = len({seed for _, seed, *_ in found} - {-1})
    spent = [c["stages"] for (_, _, m, _), c in found.items() if m == OURS]
    stages = [
        f"{stage} {statistics.mean(x[stage] / x['forward'] for x in spent):.0f}"
        for stage in ("scores", "curves", "tokens", "own")
        if spent and all(stage in x for x in spent)
    ]
    return (
        "# Accuracy without retraining\n\nAccuracy on test rows (stsb: Spearman's correlation) in percent at shares of "
        f"the dense MACs: mean and standard deviation over {seeds} calibration seeds (fewer where it says so). Drop: "
        f"mean points lost over the tasks. Seconds: of all that a method needs; forwards: in dense forwards over the "
        f"calibration rows. Dense: {told}. Test rows: {rows}.\n\n"
        f"{to_table(header, lines)}\n\n"
        + "\n".join(_paired(found, tasks, budgets))
        + (f"\n\nOurs in dense forwards: {', '.join(stages)} (compensation, cut, proof)." if stages else "")
    )


def _spent(cells: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """Mean seconds, and mean dense forwards."""
    totals = [sum(s for stage, s in stages.items() if stage != "forward") for stages in cells]
    forwards = [total / stages["forward"] for total, stages in zip(totals, cells, strict=True)]
    return f"{statistics.mean(totals):.0f}", f"{statistics.mean(forwards):.0f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{100 * values[0]:.1f} (1 seed)"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def _paired(found: Mapping[Cell, Mapping[str, Any]], tasks: Sequence[str], budgets: Sequence[float]) -> Iterator[str]:
    """Ours against the best peer of each cell, on the same rows and the seeds that both have."""
    gains: dict[float, list[tuple[float, float]]] = {}
    for flops, task in product(budgets, tasks):
        ours = _rows(found, task, OURS, flops)
        if any(figure < 0 for row in ours.values() for figure in row):
            continue  # numbers, whose rows are no points
        best: tuple[float, str, torch.Tensor] | None = None
        for peer in PEERS:
            theirs = _rows(found, task, peer, flops)
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                mine, other = (torch.tensor([x[seed] for seed in seeds]).double().mean(0) for x in (ours, theirs))
                if best is None or float(other.mean()) > best[0]:
                    best = (float(other.mean()), peer, mine - other)
        if best is not None:
            _, peer, gain = best
            error = float(gain.std() / len(gain) ** 0.5)
            gains.setdefault(flops, []).append((float(gain.mean()), error))
            yield f"- {task} at {flops:g}: {100 * float(gain.mean()):+.2f} ± {100 * error:.2f} points over {peer}."
    for flops, some in gains.items():
        mean, error = statistics.mean(g for g, _ in some), sum(e**2 for _, e in some) ** 0.5 / len(some)
        yield f"- on average at {flops:g}: {100 * mean:+.2f} ± {100 * error:.2f} points over each task's best peer."


def _rows(found: Mapping[Cell, Mapping[str, Any]], task: str, method: str, flops: float) -> dict[int, Sequence[float]]:
    """By seed, each test row's figure."""
    return {s: cell["rows"] for (t, s, m, f), cell in found.items() if (t, m, f) == (task, method, flops)}


if __name__ == "__main__":
    main()
