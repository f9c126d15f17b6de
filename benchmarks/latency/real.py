"""The protocol on real sessions: a model beside itself, again and again, and the dense model where a pruned one stood.

Does the interval hold 1 where nothing differs, and does a gate at 1.05 fail what is slower and nothing else?
Run: `python -m benchmarks.latency.real --runs 20 --swaps 5`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.latency.models import MODELS, first_units
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.common.progress import Progress
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.width_timer import WidthTimer, width_timer
from optin_deploy.measuring.gate import LatencyLimit, verdict_of
from optin_deploy.measuring.points import parse_point
from optin_deploy.measuring.timing import PairTiming
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

LIMIT = LatencyLimit("max_ratio", 1.05)
KEPT = 0.75
"""Share of the heads and neurons that the smaller model of a swap keeps."""
MUST_COVER = 0.85
"""Least share of A/A runs whose interval must hold 1: 17 of 20."""


@dataclass(frozen=True)
class Run:
    """One comparison."""

    kind: str
    """same: a model with itself; swapped: the dense model as candidate, a smaller one as baseline."""
    ratio: float
    """Candidate / baseline time."""
    ci95: tuple[float, float]
    verdict: str
    """Verdict of the gate at LIMIT."""


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--at", default="batch=1,seq=32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--swaps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    point = parse_point(options.at)
    request = Job(MODELS[options.model](options.out / "models"), engine=options.engine, points=(point,))
    asked = checked_job(request)
    with width_timer(asked.prepared, asked.target, asked.spec, point, threads=options.threads) as yard:
        runs = [*_runs(yard, options.runs, options.swaps)]
        setting = yard.setting
    where = f"{options.model} on {options.engine}, {options.at.replace('=', ' ')}"
    text = page(runs, f"{where}, {options.threads} threads")
    print(text)
    command = command_of("benchmarks.latency.real")
    data = {"setting": setting, "runs": [asdict(run) for run in runs]}
    write_result(RESULTS if options.record else options.out, "latency_real", data, text, command)


def _runs(yard: WidthTimer, same: int, swapped: int) -> Iterator[Run]:
    smaller = first_units(yard.layout, KEPT)
    kinds: list[tuple[str, int, Callable[[Progress], PairTiming]]] = [
        ("same", same, lambda progress: yard.against_dense({}, progress)),
        ("swapped", swapped, lambda progress: yard.behind_dense(smaller, progress)),
    ]
    for kind, count, measure in kinds:
        for number in range(count):
            with stage_bar(f"{kind} {number + 1}") as progress:
                timing = measure(progress)
            verdict = verdict_of(timing, LIMIT)
            yield Run(kind, verdict.ratio, verdict.ci95, verdict.outcome)


def page(runs: list[Run], where: str) -> str:
    """The result for people."""
    same, swapped = ([run for run in runs if run.kind == kind] for kind in ("same", "swapped"))
    covered = sum(run.ci95[0] <= 1 <= run.ci95[1] for run in same)
    failed = sum(run.verdict == "fails" for run in same)
    caught = sum(run.verdict == "fails" for run in swapped)
    checks = [
        ("intervals of identical models that hold 1", f"{covered} of {len(same)}", covered >= MUST_COVER * len(same)),
        ("identical models that the gate fails", f"{failed} of {len(same)}", failed == 0),
        ("dense models behind pruned ones that it fails", f"{caught} of {len(swapped)}", caught == len(swapped)),
    ]
    rows = [(what, found, "holds" if good else "**does not hold**") for what, found, good in checks]
    every = [(run.kind, f"{run.ratio:.3f}", f"{run.ci95[0]:.3f} to {run.ci95[1]:.3f}", run.verdict) for run in runs]
    return (
        f"# The protocol on real sessions\n\n{where}. The gate allows {LIMIT.value:g}; swapped: the candidate is the "
        f"dense model, the baseline keeps {KEPT:.0%} of its heads and neurons.\n\n"
        f"{to_table(('', 'found', ''), rows)}\n\n{to_table(('run', 'candidate / baseline', '95% CI', 'gate'), every)}"
    )


if __name__ == "__main__":
    main()
