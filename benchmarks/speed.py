"""Real speed of a pruned folder on ONNX Runtime, and which operators hold the rest of the time.

Takes what `make demo` left (or any output folder) and measures it at batch 1, 8 and 32; then profiles dense and
pruned by operator. Run: `python -m benchmarks.speed out/demo/pruned --record`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.jobs.bench import BenchSettings, bench_folder
from optin_deploy.jobs.operator_times import RUNS, explain_folder
from optin_deploy.measuring.diagnosis import OPERATOR_HEADER, explained, operator_rows
from optin_deploy.measuring.points import Point
from optin_deploy.reporting.findings import read_findings
from optin_deploy.reporting.report import LATENCY_HEADER, latency_rows, to_table
from optin_deploy.reporting.terminal import stage_bar


def main() -> None:
    """Measure, profile, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of optin-export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    points = tuple(Point(batch=batch, seq=options.seq_len) for batch in options.batch)
    measured = bench_folder(options.folder, BenchSettings("onnx", None, points, options.threads), stage=stage_bar)
    parts = [
        f"# Speed on ONNX Runtime, {options.threads} threads",
        to_table(LATENCY_HEADER, latency_rows(measured)),
    ]
    profiles = {}
    for found in explain_folder(options.folder, points[1:], threads=options.threads):
        profiles[str(found.batch)] = {"dense": asdict(found.dense), "pruned": asdict(found.pruned)}
        parts += [
            f"By operator at batch {found.batch} (profiler on, median of {RUNS} runs):",
            to_table(OPERATOR_HEADER, operator_rows(found.dense, found.pruned)),
            *explained(found.dense, found.pruned, found.cut),
        ]
    page = "\n\n".join(parts)
    print(page)
    report = read_findings(options.folder).report
    data = {
        "plan": {"hash": report.hashes["plan"], "kept": report.macs.kept},
        "latency": [m.to_json() for m in measured],
        "operators": profiles,
    }
    command = command_of("benchmarks.speed")
    write_result(RESULTS if options.record else options.out, "speed", data, page, command)


if __name__ == "__main__":
    main()
