"""The GPU suite: dense and pruned transformers side by side on this GPU, in many engines and precisions.

Results go to OUT/cells.jsonl as they come, and at the end to OUT/gpu.json and OUT/gpu.md. A further call goes on
with the cells that this device (with this torch) has no row for.

Examples:

    python -m benchmarks.gpu --minutes 9                      measure by priority for nine minutes
    python -m benchmarks.gpu --list --only 'graph/fp16/b32'   show what a choice would measure, and in which order
    python -m benchmarks.gpu --only table --again             measure all latency tables anew
    python -m benchmarks.gpu --minutes 0 --record             write the committed report from what is there
    python -m benchmarks.gpu --smoke --out /tmp/smoke         try the suite on a CPU, in seconds
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import Cell, Suite, load_suite
from benchmarks.gpu.process import WorkerDied, WorkerProcess
from benchmarks.gpu.report import page, requirement_lines
from benchmarks.gpu.rows import append_row, read_rows
from benchmarks.gpu.runner import run_cells
from benchmarks.record import RESULTS, write_result
from optin_deploy.errors import BadInput, OptinError

HERE = Path(__file__).parent
DEFAULT_MINUTES = 9.0
NO_GPU = (
    "no CUDA device: {reason}. Run this on a machine with an NVIDIA GPU and a CUDA build of torch, "
    "or try the suite here with: python -m benchmarks.gpu --smoke"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; 0 done, 1 a cell failed, 2 bad input or no GPU, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(_parser().parse_args(given), shlex.join(["python", "-m", "benchmarks.gpu", *given]))
    except (OptinError, WorkerDied) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="no cell starts that would end later")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results (default: out/gpu)")
    parser.add_argument("--record", action="store_true", help="write gpu.json and gpu.md to benchmarks/results")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models: shows that the suite works, measures nothing"
    )
    parser.add_argument("--cells", type=Path, help="another TOML file of cells")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, with --smoke cpu")
    parser.add_argument("--only", metavar="REGEX", default="", help="only cells whose key matches")
    parser.add_argument("--again", action="store_true", help="also measure cells that have a row, such as failed ones")
    parser.add_argument("--list", action="store_true", help="print the cells in their order and stop")
    return parser


def _run(options: argparse.Namespace, command: str) -> int:
    suite = load_suite(options.cells or HERE / ("cells_smoke.toml" if options.smoke else "cells.toml"))
    chosen = _chosen(suite, options.only)
    if options.list:
        print("\n".join(cell.key for cell in chosen))
        return 0
    if options.record and options.smoke:
        raise BadInput("--smoke measures nothing worth recording; leave out --record.")
    device = options.device or ("cpu" if options.smoke else "cuda")
    if device == "cpu" and not options.smoke:
        raise BadInput(NO_GPU.format(reason="--device cpu is for --smoke"))
    started = time.monotonic()
    worker_command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", device]
    first = WorkerProcess(worker_command, options.out / "worker.log")
    if "no_device" in first.hello:
        first.close()
        raise BadInput(NO_GPU.format(reason=first.hello["no_device"]))
    identity = {"device": first.hello["device"], "torch": first.hello["torch"]}
    print(f"{identity['device']}, torch {identity['torch']}; results in {options.out}", flush=True)
    file = options.out / "cells.jsonl"
    idle = [first]

    def start_worker() -> WorkerProcess:
        return idle.pop() if idle else WorkerProcess(worker_command, options.out / "worker.log")

    def record(cell: Cell, answer: dict[str, Any]) -> None:
        append_row(file, {"cell": cell.key, **identity, "config": cell.to_json(), **answer})
        print(f"[{time.monotonic() - started:6.1f} s] {cell.key}: {_summary(answer)}", flush=True)

    interrupted = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends us as Ctrl-C does
    try:
        done = read_rows(file, **identity)
        missing = [cell for cell in chosen if options.again or cell.key not in done]
        left_out = run_cells(missing, start_worker, record, seconds=options.minutes * 60 - (time.monotonic() - started))
        print(f"{len(chosen) - len(missing)} cells were there, no time was left for {len(left_out)}.")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
        for unused in idle:
            unused.close()
    rows = read_rows(file, **identity)
    _write(options, suite, rows, first.hello, command)
    failed = any(row["status"] == "failed" for row in rows.values())
    return 130 if interrupted else int(failed)


def _chosen(suite: Suite, only: str) -> list[Cell]:
    try:
        chosen = [cell for cell in suite.cells if re.search(only, cell.key)]
    except re.error as err:
        raise BadInput(f"--only {only!r} is not a regular expression: {err}.") from err
    if not chosen:
        raise BadInput(f"--only {only!r} matches no cell; see the keys with --list.")
    return chosen


def _summary(answer: dict[str, Any]) -> str:
    """What a watcher wants to know of a row."""
    if answer["status"] != "ok":
        return f"{answer['status']}: {answer['error']}"
    result = answer["result"]
    if "sketch_s" in result:
        return f"sketch {result['sketch_s']:.2f} s, exact {result['exact_s']:.0f} s (extrapolated)"
    if "rows" in result:
        return f"{len(result['rows'])} widths"
    variants = [f"{name} {v['p50_ms']:.3f} ms" if "p50_ms" in v else f"{name} {v['total_ms']:.3f} ms of kernels"
                for name, v in result["variants"].items()]  # fmt: skip
    speedups = [f"{v['speedup']:.2f}x" for v in result["variants"].values() if "speedup" in v]
    parity = "" if result.get("ok", True) else ", PARITY FAILS"
    return ", ".join((*variants, *speedups)) + parity


def _write(options: argparse.Namespace, suite: Suite, rows: Any, machine: dict[str, Any], command: str) -> None:
    """gpu.json and gpu.md; the report names the GPU, the record's own footer the rest."""
    folder = RESULTS if options.record else options.out
    state = machine["state"] or {}
    shown = (f"{name} {value}" for name, value in {**machine, **state}.items() if name != "state")
    text = f"{page(suite, rows)}\n\nAt the start: {', '.join(shown)}."
    write_result(
        folder,
        "gpu",
        {"machine": machine, "must_hold": requirement_lines(suite.must_hold, rows), "rows": [*rows.values()]},
        text,
        command,
    )
    print(f"{folder / 'gpu.json'}, {folder / 'gpu.md'}")
    print("\n".join(line for line in text.splitlines() if line.startswith("- must hold")))


if __name__ == "__main__":
    sys.exit(main())
