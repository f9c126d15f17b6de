"""Accuracy at equal measured time: plans by milliseconds against plans by MACs, on the tasks of benchmarks/accuracy.

A plan is looked for as `optin-export --speedup` does. Then the budget in MACs is sought whose plan takes as long,
measured beside it, or up to 2% longer: what luck there is, the MACs get. Both are compensated on the same rows and
judged on the same test rows. A finished cell is a file and is not made again. Run, as often as needed:
`python -m benchmarks.latency.equal_time --minutes 30`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.case import OUTPUT
from benchmarks.accuracy.outputs import outputs_of
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks import TASKS, Task
from benchmarks.tasks.task import judged
from optin_deploy.checkpoint.loading import LoadedModel
from optin_deploy.checkpoint.tasks import task_of
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.rows import Feeds
from optin_deploy.files.storage import read_json, sha256_tensors, write_json
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.profiling import NS, table_at
from optin_deploy.jobs.stages import score_stage
from optin_deploy.jobs.sweep import measure_curves
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.width_timer import DENSE, WidthTimer, width_timer
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.points import BLOCKS, Point
from optin_deploy.measuring.stats import bootstrap_ci
from optin_deploy.measuring.timing import log_ratios, mean_ratio
from optin_deploy.planning.budget import Limits, TimeTarget
from optin_deploy.planning.ladder import narrowest
from optin_deploy.planning.latency import LatencyTable, TimeCost
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice, ladders_of
from optin_deploy.pruning.dense import DenseSource
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.pruning import ComparedOutput, emptiable, make, ready_of
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

SLACK = 0.02
"""The plan by MACs may take so much longer."""
TRIES = 5
STEP = 0.0025
"""Step of the share of the MACs that is sought."""
BY_TIME, BY_MACS = "time", "MACs"


@dataclass(frozen=True, eq=False)
class Setting:
    """One task on one engine, with the calibration rows of one seed."""

    task: Task
    planner: Planner
    yard: WidthTimer
    table: LatencyTable

    def predicted(self, plan: NetworkPlan) -> float:
        """Milliseconds by the table."""
        costs = self.planner.prepared.ready.costs
        return TimeCost(self.table, costs.macs).total(costs.widths(plan.keep)) / NS

    def by_macs(self, allowed_ms: float) -> NetworkPlan:
        """The largest plan by MACs that the table gives this time, to a step."""
        ready = self.planner.prepared.ready
        whole = ready.costs.macs.whole
        least = narrowest(ladders_of(ready.layout, self.planner.choice, emptiable(ready.layout)), whole)
        low, high = int(ready.costs.macs.total(least) / ready.costs.macs.dense / STEP) + 1, int(1 / STEP)
        while low < high:  # the time grows with the MACs, near enough
            middle = (low + high + 1) // 2
            fits = self.predicted(self.planner.plan(Limits(flops=middle * STEP))) <= allowed_ms
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.planner.plan(Limits(flops=low * STEP))

    def judged(self, plan: NetworkPlan, test: Feeds) -> dict[str, Any]:
        """The task's metric after compensation."""
        smaller = make(self.planner.prepared.ready, plan).network
        return judged(outputs_of(smaller, OUTPUT, test.batches, self.task.seq_len), test.labels)


def main() -> None:
    """Do open cells for some time, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["sentiment", "r8", "cifar10"], choices=list(TASKS))
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws its own calibration rows")
    parser.add_argument("--rows", type=int, default=1024, help="calibration rows, at most half of a task's")
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30, help="starts no cell after that")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps the fine-tuned models")
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    end = time.monotonic() + 60 * options.minutes
    cells = [cell for task in options.tasks for cell in _of_task(task, options, end)]
    missing = len(options.tasks) * len(options.speedups) * len(options.seeds) - len(cells)
    text = page(cells, options.engine, options.threads) if cells else "nothing is measured yet"
    print(text)
    if missing:
        sys.exit(f"{missing} cells are open: nothing is recorded. Run it again.")
    command = command_of("benchmarks.latency.equal_time")
    write_result(RESULTS if options.record else options.out, "latency_equal_time", {"cells": cells}, text, command)


def _of_task(name: str, options: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    task = TASKS[name](options.cache)
    key = sha256_tensors(task.model.state_dict())[:12]
    folder = options.out / "equal-time" / f"{name}-{key}-{options.engine}"
    for seed in options.seeds:
        paths = {x: folder / f"{options.rows}-{options.test_rows}-{x:g}-seed{seed}.json" for x in options.speedups}
        left = [x for x, path in paths.items() if not path.exists()]
        if left and time.monotonic() < end:
            with _setting(task, folder, seed, options) as setting:
                for speedup in left:
                    if time.monotonic() < end:
                        write_json(paths[speedup], _cell(setting, speedup, seed, options.test_rows))
        yield from (read_json(path, "Delete it.") for path in paths.values() if path.exists())


@contextmanager
def _setting(task: Task, folder: Path, seed: int, options: argparse.Namespace) -> Iterator[Setting]:
    rows = min(options.rows, len(task.calibration) // 2)  # as in benchmarks/accuracy
    drawn = task.batches(random.Random(seed).sample(task.calibration, rows))
    calibration = replace(drawn, labels=(None,) * len(drawn))  # which the product never looks at
    read = find_in(task.model)
    source = Source(task.name, seq_len=task.seq_len, samples=rows, seed=seed)
    loaded = LoadedModel(task.model, task_of("text-classification"), task.preprocessor)
    dense = DenseSource(read.network, sha256_tensors(task.model.state_dict()), loaded)
    prepared = Prepared(
        source, dense, ready_of(read, Halves(calibration, None), compared=ComparedOutput(OUTPUT), seed=seed)
    )
    workspace = Workspace.claim(folder / f"work-seed{seed}", source)
    with stage_bar(f"score {task.name}") as progress:
        score_stage(workspace, prepared, progress=progress)
    target = exporter(options.engine)
    planner = Planner(workspace, prepared, Choice(align=target.align, allocation="curves"))
    measure_curves(planner, stage_bar)
    point = Point(1, task.seq_len if loaded.is_text else None)
    with width_timer(prepared, target, ExportSpec(), point, threads=options.threads) as yard:
        with stage_bar(f"profile {task.name}") as progress:
            table = table_at(folder / "latency.json", yard, planner.choice, progress=progress)
        yield Setting(task, planner, yard, table)


def _cell(setting: Setting, speedup: float, seed: int, test_rows: int) -> dict[str, Any]:
    limits = Limits(time=TimeTarget("--speedup", speedup))
    by_time, rounds = Planning(setting.planner, setting.yard, limits, stage=stage_bar).within(setting.table)
    by_macs, timing = as_slow(setting, by_time)
    with stage_bar("judge"):
        plans = {BY_TIME: by_time, BY_MACS: by_macs}
        test = setting.task.batches(setting.task.test[:test_rows])
        distinct = {plan.hash: plan for plan in plans.values()}
        found = {key: setting.judged(plan, test) for key, plan in distinct.items()}
    return {
        "task": setting.task.name,
        "seed": seed,
        "asked": speedup,
        "rounds": len(rounds),
        **timing,
        "plans": {
            name: {
                "kept": kept(plan),
                "widths": {name: len(units) for name, units in plan.keep.items()},
                **found[plan.hash],
            }
            for name, plan in plans.items()
        },
    }


def kept(plan: NetworkPlan) -> float:
    """Share of the MACs."""
    assert plan.cost is not None, "plans of jobs tell what they cost"
    return plan.cost.macs_pruned / plan.cost.macs_dense


def as_slow(setting: Setting, plan: NetworkPlan) -> tuple[NetworkPlan, dict[str, Any]]:
    """The plan by MACs that takes as long as `plan`; how long both take, times dense and beside each other."""
    tried: list[tuple[NetworkPlan, dict[str, Any]]] = []
    allowed_ms = setting.predicted(plan)
    for number in range(TRIES):
        rival = setting.by_macs(allowed_ms)
        if any(rival.keep == other.keep for other, _ in tried):
            break
        with stage_bar(f"MACs {number + 1}, {kept(rival):.1%}"):
            ms = setting.yard.together([dict(plan.keep), dict(rival.keep)], blocks=BLOCKS).ms
        ratio = mean_ratio(ms["1"], ms["0"])
        beside = {
            "speedup": {name: mean_ratio(ms[DENSE], ms[i]) for name, i in ((BY_TIME, "0"), (BY_MACS, "1"))},
            "ratio": ratio,
            "ratio_ci95": bootstrap_ci(log_ratios(ms["1"], ms["0"])),
        }
        tried.append((rival, beside))
        if 1 <= ratio <= 1 + SLACK:
            break
        allowed_ms = setting.predicted(rival) * (1 + SLACK / 2) / ratio
    return min(tried, key=lambda each: abs(each[1]["ratio"] - 1 - SLACK / 2))


def page(cells: Sequence[Mapping[str, Any]], engine: str, threads: int) -> str:
    """The result for people."""
    lines, gains = [], []
    for cell in cells:
        time_, macs = (cell["plans"][name] for name in (BY_TIME, BY_MACS))
        gain = np.subtract(time_["rows"], macs["rows"]) * 100.0
        gains.append(gain)
        low, high = cell["ratio_ci95"]
        lines.append(
            (
                cell["task"],
                str(cell["seed"]),
                f"{cell['asked']:g}x",
                f"{cell['speedup'][BY_TIME]:.2f}x",
                f"{cell['speedup'][BY_MACS]:.2f}x",
                f"{cell['ratio']:.3f} [{low:.3f}, {high:.3f}]",
                f"{time_['kept']:.1%}",
                f"{macs['kept']:.1%}",
                f"{100 * time_['value']:.1f}",
                f"{100 * macs['value']:.1f}",
                f"{gain.mean():+.2f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.2f}",
            )
        )
    header = (
        *("task", "seed", "asked", "by time", "by MACs", "time by MACs / by time [95% CI]"),
        *("MACs kept by time", "by MACs", "accuracy by time", "by MACs", "points gained"),
    )
    mean = statistics.mean(float(gain.mean()) for gain in gains)
    verdict = "holds" if mean >= 0 else "**does not hold**"
    tasks: dict[str, list[float]] = {}
    for cell, gain in zip(cells, gains, strict=True):
        tasks.setdefault(cell["task"], []).append(float(gain.mean()))
    told = ", ".join(f"{task} {statistics.mean(some):+.2f}" for task, some in tasks.items())
    return (
        f"# Budgets in time against budgets in MACs, at equal measured time\n\nMean gain in accuracy over all rows of "
        f"the table: {mean:+.2f} points ({told}); at least 0 is asked: {verdict}. {engine}, batch 1 at each task's "
        f"length, threads: {threads}. The gain of a row is paired over its test rows, with its standard error.\n\n"
        f"{to_table(header, lines)}"
    )


if __name__ == "__main__":
    main()
