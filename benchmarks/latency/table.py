"""How well the latency table predicts: random plans with other widths in every layer, predicted and measured.

Run: `python -m benchmarks.latency.table --model bert-base --engine onnx --plans 20`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.latency.models import MODELS
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.profiling import NS, profile_model
from optin_deploy.measuring.points import parse_point
from optin_deploy.planning.latency import TABLE_HEADER, LatencyTable, held_out_line, table_rows
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

MEDIAN, WORST = 0.05, 0.12
"""Relative errors that are allowed."""


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="bert-base")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--at", default="batch=1,seq=128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    started = time.perf_counter()
    point, source = parse_point(options.at), MODELS[options.model](options.out / "models")
    request = Job(source, engine=options.engine, points=(point,), threads=options.threads)
    file = options.out / f"{options.model}-{options.engine}.json"
    table = profile_model(request, file, check=options.plans, stage=stage_bar)
    assert table is not None, "it was no dry run"
    seconds = time.perf_counter() - started
    text = page(table, options.model, seconds)
    print(text)
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.latency.table")
    name = f"latency_table_{options.model}_{options.engine}"
    write_result(folder, name, {"seconds": seconds, "table": table.to_json()}, text, command)


def page(table: LatencyTable, model: str, seconds: float) -> str:
    """The result for people."""
    errors = np.abs([each.error for each in table.held_out])
    found = (("median error", float(np.median(errors)), MEDIAN), ("worst error", float(errors.max()), WORST))
    limits = [(n, f"{v:.1%}", f"<= {most:.0%}", "holds" if v <= most else "**does not hold**") for n, v, most in found]
    plans = [
        (
            " ".join(map(str, each.widths.values())),
            f"{each.predicted_ns / NS:.1f}",
            f"{each.measured_ns / NS:.1f}",
            f"{each.error:+.1%}",
        )
        for each in table.held_out
    ]
    setting = table.setting
    return (
        f"# Latency table of {model} on {setting['engine']} {setting['precision']}\n\n"
        f"{setting['inputs']}, {setting['threads']} threads; dense {table.dense_ns / NS:.1f} ms. "
        f" {held_out_line(table)} Table and check took {seconds / 60:.0f} minutes.\n\n"
        f"{to_table(('must hold', 'found', 'asked', ''), limits)}\n\n"
        f"{to_table(TABLE_HEADER, table_rows(table))}\n\nPlans that the table was not made from:\n\n"
        f"{to_table(('units of each group', 'predicted ms', 'measured ms', 'error'), plans)}"
    )


if __name__ == "__main__":
    main()
