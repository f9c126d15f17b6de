"""Budgets in time on real engines: for targets from 0.3 to 0.9 of the dense time, what is measured at the end.

A plan is looked for as `optin-export --speedup` does, and what it found is measured once more, on its own. Scores and
curves are made once a model; a finished target is a file and is not measured again. Run:
`python -m benchmarks.latency.targets --minutes 30`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.latency.models import MODELS
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.files.storage import read_json, write_json
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.profiling import table_at
from optin_deploy.jobs.stages import dense_stage, score_stage
from optin_deploy.jobs.sweep import measure_curves
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.time_rounds import LEAST, Round
from optin_deploy.jobs.width_timer import WidthTimer, width_timer
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.points import parse_point
from optin_deploy.planning.budget import Limits, TimeTarget
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

SHARES = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Target shares of the dense model's time."""
HINT = "It will be measured again."


@dataclass(frozen=True)
class Cell:
    """One target, and what came of it."""

    model: str
    engine: str
    share: float
    rounds: list[Round]
    refused: str | None = None
    """What the tool says if the target cannot be met."""
    kept: float = 0.0
    """Share of the MACs."""
    measured: float = 0.0
    """Share of the dense time, measured on its own after the search."""
    ci95: tuple[float, float] = (0.0, 0.0)
    unstable: bool = False

    @property
    def holds(self) -> bool:
        """Whether the time is at most the target, and within 5% of it."""
        return self.refused is None and LEAST * self.share <= self.measured <= self.share


def main() -> None:
    """Measure until the time is up, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm", "vit-small"])
    parser.add_argument("--engines", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30, help="No target is begun after this.")
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    end = time.monotonic() + 60 * options.minutes
    cells: list[Cell] = []
    for model in options.models:
        for engine in options.engines:
            cells += _of_engine(model, engine, options.out, threads=options.threads, end=end)
    text = page(cells, options.threads)
    print(text)
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.latency.targets")
    rows = [{**asdict(cell), "holds": cell.holds} for cell in cells]
    write_result(folder, "latency_targets", {"cells": rows}, text, command)


def _of_engine(model: str, engine: str, out: Path, *, threads: int, end: float) -> list[Cell]:
    paths = {share: out / "targets" / f"{model}-{engine}-{share}.json" for share in SHARES}
    left = [share for share, path in paths.items() if not path.exists()]
    if left and time.monotonic() < end:
        source = MODELS[model](out / "models")
        home = out / f"work-{model}"
        asked = checked_job(Job(source, engine=engine, threads=threads), home)
        workspace = Workspace.claim(home, source)
        with stage_bar(f"score {model}") as progress:
            dense_stage(workspace, asked.prepared)
            score_stage(workspace, asked.prepared, progress=progress)
        planner = Planner(workspace, asked.prepared, asked.choice)
        measure_curves(planner, stage_bar)
        with width_timer(asked.prepared, asked.target, asked.spec, parse_point("batch=1"), threads=threads) as yard:
            for share in left:
                if time.monotonic() < end:
                    write_json(paths[share], asdict(_cell(planner, yard, model, share)))
    found = [read_json(path, HINT) for path in paths.values() if path.exists()]
    return [Cell(**{**cell, "rounds": [Round(**each) for each in cell["rounds"]]}) for cell in found]


def _cell(planner: Planner, yard: WidthTimer, model: str, share: float) -> Cell:
    engine = yard.target.engine
    with stage_bar(f"profile {engine}") as progress:
        file = planner.workspace.root / f"latency-{engine}.json"
        table = table_at(file, yard, planner.choice, progress=progress)
    limits = Limits(time=TimeTarget("--speedup", 1 / share))
    try:
        plan, rounds = Planning(planner, yard, limits, stage=stage_bar).within(table)
    except InfeasibleBudget as refused:
        return Cell(model, engine, share, [], refused=str(refused))
    with stage_bar(f"{model} {engine} {share:g}") as progress:
        timing = yard.against_dense(dict(plan.keep), progress)
    low, high = timing.ci95
    cost = plan.cost
    assert cost is not None, "plans of jobs tell what they cost"
    return Cell(
        model,
        engine,
        share,
        rounds,
        kept=cost.macs_pruned / cost.macs_dense,
        measured=1 / timing.speedup,
        ci95=(1 / high, 1 / low),
        unstable=timing.unstable,
    )


def page(cells: list[Cell], threads: int) -> str:
    """The result for people."""
    rows = [
        (
            cell.model,
            cell.engine,
            f"{cell.share:g}",
            "refused" if cell.refused else f"{cell.measured:.3f} [{cell.ci95[0]:.3f}, {cell.ci95[1]:.3f}]",
            "" if cell.refused else f"{cell.kept:.1%}",
            str(len(cell.rounds)),
            ("holds" if cell.holds else "**does not hold**") + (", unstable" if cell.unstable else ""),
        )
        for cell in cells
    ]
    header = ("model", "engine", "target", "measured, of the dense time [95% CI]", "MACs kept", "rounds", "")
    held, refused = sum(cell.holds for cell in cells), sum(cell.refused is not None for cell in cells)
    return (
        f"# Budgets in time\n\n{held} of {len(cells)} targets hold, {refused} are refused: what was found, measured "
        f"once more beside the dense model, takes at most the target and at least {LEAST:.0%} of it. Batch 1, "
        f"threads: {threads}; MiniLM at 128 tokens, ViT-S at 197.\n\n{to_table(header, rows)}"
    )


if __name__ == "__main__":
    main()
