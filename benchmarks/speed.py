"""Real speed of a pruned folder on ONNX Runtime, and which operators hold the rest of the time.

Takes what `make demo` left (or any output folder) and measures it at batch 1, 8 and 32; then profiles dense and
pruned by operator. Run: python -m benchmarks.speed out/demo/pruned --record
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, write_result
from exporters.measuring import Point, bench_folder
from optin_deploy.bench.report import LATENCY_HEADER, latency_rows, to_table
from optin_deploy.inputs import example_inputs
from optin_deploy.pruned import load_pruned
from optin_deploy.runtimes.ort import import_onnxruntime
from optin_deploy.terminal import stage_bar

PROFILED_RUNS = 20
SHOWN = 12
"""Operators listed; the others are one row."""


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
    points = [Point(batch=batch, seq=options.seq_len) for batch in options.batch]
    measured = bench_folder(options.folder, engine="onnx", points=points, threads=options.threads, stage=stage_bar)
    parts = [
        f"# Speed on ONNX Runtime, {options.threads} threads",
        to_table(LATENCY_HEADER, latency_rows(measured)),
    ]
    profiles = {}
    for batch in options.batch[1:]:
        both = [
            profile(options.folder / name, options.folder, batch, options.seq_len, options.threads)
            for name in ("dense.onnx", "model.onnx")
        ]
        profiles[str(batch)] = {"dense_ms": both[0], "pruned_ms": both[1]}
        parts += [
            f"Milliseconds by operator at batch {batch} (profiler on, mean of {PROFILED_RUNS} runs):",
            to_table(("operator", "dense", "pruned", "pruned / dense"), operator_rows(*both)),
        ]
    page = "\n\n".join(parts)
    print(page)
    plan = load_pruned(options.folder).plan
    data = {
        "plan": {
            "hash": plan.hash,
            "kept": plan.kept,
            "heads": [*map(len, plan.heads)],
            "neurons": [*map(len, plan.neurons)],
        },
        "latency": [m.to_json() for m in measured],
        "operators": profiles,
    }
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    write_result(RESULTS if options.record else options.out, "speed", data, page, command)


def profile(model: Path, folder: Path, batch: int, seq_len: int, threads: int) -> dict[str, float]:
    """Mean milliseconds of a run by operator, largest first, as ONNX Runtime's own profiler counts them."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    inputs = example_inputs(load_pruned(folder).model, batch=batch, seq_len=seq_len)
    feeds: dict[str, np.ndarray] = {name: value.numpy() for name, value in inputs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(temporary) / "profile")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED_RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    return {name: micros / 1000 / PROFILED_RUNS for name, micros in total.most_common()}


def operator_rows(dense: dict[str, float], pruned: dict[str, float]) -> list[tuple[str, ...]]:
    """Rows (operator, dense ms, pruned ms, ratio), the largest of the dense model first, then the rest and the sum."""
    shown = list(dense)[:SHOWN]
    values = [(name, dense[name], pruned.get(name, 0.0)) for name in shown]
    dense_all, pruned_all = sum(dense.values()), sum(pruned.values())
    values.append(("others", dense_all - sum(v[1] for v in values), pruned_all - sum(v[2] for v in values)))
    values.append(("all", dense_all, pruned_all))
    return [(name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}" if a else "-") for name, a, b in values]


if __name__ == "__main__":
    main()
