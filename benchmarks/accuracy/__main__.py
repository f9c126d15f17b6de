"""Accuracy at 60, 40 and 25% of the MACs without retraining: ours and peers, on the same rows in one run.

A cell is one task, calibration seed, method and budget; it is a file with a figure for each test row, so that a run can
be interrupted and continued, and methods compared row by row (after a change of a method, delete its files). Nothing is
chosen on test rows. Run: `python -m benchmarks.accuracy --minutes 20`, as often as needed; --record writes the table
and its picture.
GLUE, with a connection: `python -m benchmarks.accuracy --glue mrpc --model my-bert-fine-tuned-on-mrpc`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import onnx

from benchmarks.accuracy.case import OUTPUT, Case
from benchmarks.accuracy.methods import ABLATIONS, METHODS, ONE_SEED, Method, fits
from benchmarks.accuracy.outputs import outputs_of
from benchmarks.accuracy.report import DENSE, Cell, Found, draw, page
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks import TASKS, Task
from benchmarks.tasks.glue import GLUE, glue
from benchmarks.tasks.task import judged
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.files.storage import read_json, sha256_tensors, write_json
from optin_deploy.network.graph import Network
from optin_deploy.network.write import write as write_network
from optin_deploy.pruning.networks import Found as Read
from optin_deploy.pruning.networks import find_in
from optin_deploy.reporting.terminal import quiet_libraries
from optin_deploy.structure.labels import DEFAULT_KINDS, KINDS

GATE = ["sentiment", "r8", "cifar10"]


def main() -> None:
    """Do open cells for some time, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=GATE, choices=list(TASKS))
    parser.add_argument("--glue", choices=list(GLUE), help="a task of GLUE instead, for the classifier of --model")
    parser.add_argument("--model", help="with --glue: folder or hub id")
    parser.add_argument("--data", type=Path, help="with --glue: folder with its files. Default: from the hub")
    usual = [method for method in METHODS if method not in ABLATIONS]
    parser.add_argument("--methods", nargs="+", default=usual, choices=list(METHODS))
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4, 0.25])
    parser.add_argument("--units", nargs="+", default=DEFAULT_KINDS, choices=KINDS, help="what ours cuts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its own calibration rows")
    parser.add_argument("--rows", type=int, default=1024, help="calibration rows of a seed, at most half of a task's")
    parser.add_argument("--test-rows", type=int, default=1500, help="of GLUE: all")
    parser.add_argument("--minutes", type=float, default=20, help="starts no cell after that")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps the fine-tuned models")
    parser.add_argument("--cells", type=Path, default=Path("out/accuracy"), help="keeps the finished cells")
    parser.add_argument("--networks", action="store_true", help="keeps those of the first seed too, see latency.py")
    parser.add_argument("--name", help="of the page, accuracy_NAME, where not all usual methods are asked for")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.glue and not options.model:
        parser.error("--glue needs --model, a classifier that was fine-tuned on this task")
    quiet_libraries()
    end = time.monotonic() + 60 * options.minutes
    found: Found = {}
    open_cells = 0
    for task in tasks(options):
        wanted = asked(task, options.seeds, options.methods, options.flops)
        open_cells += len(wanted) + 1
        test_rows = len(task.test) if options.glue else options.test_rows
        keep = options.seeds[0] if options.networks else None
        how = {"rows": options.rows, "test_rows": test_rows, "networks_of": keep, "kinds": tuple(options.units)}
        found |= cells(task, wanted, options.cells, end=end, **how)
    open_cells -= len(found)
    refused = {cell: kept["refused"] for cell, kept in found.items() if "refused" in kept}
    found = {cell: kept for cell, kept in found.items() if cell not in refused}
    text = page(found, refused)
    if tuple(options.units) != DEFAULT_KINDS:
        text += f"\n\nOurs cuts {', '.join(options.units)}."
    print(text)
    if open_cells and options.record:
        sys.exit(f"{open_cells} cells are open: nothing is recorded. Run it again.")
    data = {
        "cells": [
            {"task": t, "seed": s, "method": m, "flops": f, "value": c["value"], "stages": c["stages"]}
            for (t, s, m, f), c in found.items()
        ],
        "refused": [{"task": t, "seed": s, "method": m, "flops": f, "why": w} for (t, s, m, f), w in refused.items()],
    }
    command = command_of("benchmarks.accuracy")
    name = (
        "accuracy"
        if not options.glue and options.tasks == GATE
        else f"accuracy_{'_'.join(dict.fromkeys(t for t, *_ in found))}"
    )
    name = f"accuracy_{options.name}" if options.name else name
    folder = RESULTS if options.record else options.cells
    write_result(folder, name, data, text, command)
    draw(found, folder / f"{name}.png")


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """What was asked for, one after the other."""
    if options.glue:
        yield glue(options.glue, options.model, data=options.data)
        return
    for name in options.tasks:
        yield TASKS[name](options.cache)


def asked(task: Task, seeds: Sequence[int], methods: Sequence[str], budgets: Sequence[float]) -> list[Cell]:
    """The cells of a task, but those that a method leaves out."""
    return [
        (task.name, seed, method, flops)
        for seed, method, flops in product(seeds, methods, budgets)
        if fits(method, task) and (method not in ONE_SEED or seed == seeds[0])
    ]


def cells(
    task: Task,
    wanted: Sequence[Cell],
    folder: Path,
    *,
    rows: int,
    test_rows: int,
    end: float,
    networks_of: int | None = None,
    kinds: tuple[str, ...] = DEFAULT_KINDS,
) -> Found:
    """The finished cells of one task; open ones are done until `end`.

    Args: networks_of: a seed whose networks are kept beside the cells, and the dense one. kinds: see `Case`.
    """
    test = task.batches(task.test[:test_rows])
    read: Read | None = None
    rows = min(rows, len(task.calibration) // 2)  # else the seeds would hardly differ
    key = sha256_tensors(task.model.state_dict())[:12]
    found: Found = {}
    cases: dict[int, Case] = {}  # what the budgets of a seed share; made for open cells alone
    for cell in [(task.name, -1, DENSE, 1.0), *wanted]:
        _, seed, method, flops = cell
        name = re.sub(r"\W+", "_", method)
        units = "" if kinds == DEFAULT_KINDS else f"-{'-'.join(kinds)}"
        path = folder / f"{task.name}-{key}" / f"{rows}-{test_rows}{units}" / f"{name}-{flops:g}-seed{seed}.json"
        kept = networks_of is not None and seed in (-1, networks_of) and method not in ONE_SEED  # another tool's files
        network_file = path.with_suffix(".onnx") if kept else None
        known = read_json(path, "Delete it to measure it again.") if path.exists() else None
        late = time.monotonic() > end and method != DENSE
        if known is not None and (late or "refused" in known or network_file is None or network_file.exists()):
            found[cell] = known
            continue
        if late:
            continue
        read = read or find_in(task.model, task.inputs)
        if seed not in cases and method != DENSE:
            cases[seed] = made_case(task, read, seed, rows, path.with_name(f"scores-seed{seed}.safetensors"), kinds)
        try:
            network, stages = (read.network, {}) if method == DENSE else timed(METHODS[method], cases[seed], flops)
        except InfeasibleBudget as err:
            found[cell] = {"refused": str(err)}
            write_json(path, found[cell])
            print(*cell, f"refused: {err}", flush=True)
            continue
        if isinstance(network, Network) and network_file is not None:
            write_network(network, network_file)
        figures = judged(outputs_of(network, OUTPUT, test.batches, task.seq_len), test.labels)
        found[cell] = {**figures, "stages": stages, "calibration_rows": rows}
        write_json(path, found[cell])
        print(*cell, f"{found[cell]['value']:.2%}", *(f"{stage} {s:.1f} s" for stage, s in stages.items()), flush=True)
    return found


def timed(method: Method, case: Case, flops: float) -> tuple[Network | onnx.ModelProto, dict[str, float]]:
    """The pruned network, and the seconds of all that it needs, whoever made it first: shared stages, and its own work.

    A dense forward over the calibration rows is among them, as a unit.
    """
    forward = case.forward_seconds()
    case.used.clear()
    before, started = sum(case.seconds.values()), time.perf_counter()
    network = method(case, flops)
    own = time.perf_counter() - started - (sum(case.seconds.values()) - before)
    return network, {"forward": forward, **{stage: case.seconds[stage] for stage in sorted(case.used)}, "own": own}


def made_case(
    task: Task, read: Read, seed: int, rows: int, kept: Path | None = None, kinds: tuple[str, ...] = DEFAULT_KINDS
) -> Case:
    """The calibration rows that a seed draws; `kept`, `kinds`: see `Case`."""
    drawn = random.Random(seed).sample(task.calibration, rows)
    return Case(task.name, task.model, read, task.seq_len, task.batches(drawn), seed, kept, kinds)


if __name__ == "__main__":
    main()
