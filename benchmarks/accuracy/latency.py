"""What the networks of an accuracy run take: each beside the dense one, interleaved, on ONNX Runtime with one thread.

Run `python -m benchmarks.accuracy --networks` first, which keeps the networks of its first seed, then on a quiet
machine: `python -m benchmarks.accuracy.latency out/accuracy/cifar10-.../1024-1500 --name cifar10 --record`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.errors import BadInput
from optin_deploy.files.storage import read_json
from optin_deploy.measuring.comparing import comparison_of
from optin_deploy.measuring.gate import LatencyLimit
from optin_deploy.measuring.points import Point
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

DENSE_NAME = "dense-1-seed-1"
CELL = re.compile(r"(?P<method>\w+)-(?P<flops>[\d.]+)-seed(?P<seed>\d+)")
HEADER = ("method", "MACs kept", "accuracy", "dense ms", "cut ms", "speed-up [95%]", "time saved of ideal")


def main() -> None:
    """Measure all kept networks of one folder, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with cells and networks of one task")
    parser.add_argument("--name", required=True, help="of the page, accuracy_latency_NAME")
    parser.add_argument("--seed", type=int, default=0, help="calibration seed of the networks")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    found = [
        measured(options.folder, path, batch)
        for batch in options.batch
        for path in sorted(options.folder.glob("*.onnx"))
        if (cell := CELL.fullmatch(path.stem)) is not None and int(cell["seed"]) == options.seed
    ]
    if not found:
        why = f"{options.folder} holds no networks of seed {options.seed}"
        raise BadInput(f"{why}. Run python -m benchmarks.accuracy --networks first.")
    text = page(options.name, options.seed, found)
    print(text)
    command = command_of("benchmarks.accuracy.latency")
    folder = RESULTS if options.record else options.folder
    write_result(folder, f"accuracy_latency_{options.name}", {"networks": found}, text, command)


def measured(folder: Path, path: Path, batch: int) -> dict[str, Any]:
    """One network beside the dense one."""
    cell = CELL.fullmatch(path.stem)
    assert cell is not None
    contest = comparison_of(folder / f"{DENSE_NAME}.onnx", path, threads=1, points=[Point(batch)])
    timing = contest.run(LatencyLimit("min_speedup", 1.0), stage=stage_bar).points[0].timing
    value = read_json(path.with_suffix(".json"), "Delete the network beside it.")["value"]
    return {
        "method": cell["method"].replace("_", " "),
        "flops": float(cell["flops"]),
        "accuracy": value,
        "batch": batch,
        "dense_ms": timing.dense(50),
        "cut_ms": timing.pruned(50),
        "speedup": timing.speedup,
        "ci95": list(timing.ci95),
        "unstable": timing.unstable,
    }


def page(name: str, seed: int, found: list[dict[str, Any]]) -> str:
    """The result for people."""
    parts = [f"# Measured time of the networks of {name}\n\nONNX Runtime, one thread, calibration seed {seed}."]
    for batch in dict.fromkeys(each["batch"] for each in found):
        rows = []
        for each in sorted(found, key=lambda one: (-one["flops"], one["method"])):
            if each["batch"] == batch:
                saved = (1 - 1 / each["speedup"]) / (1 - each["flops"])
                low, high = each["ci95"]
                rows.append(
                    (
                        *(each["method"], f"{each['flops']:g}", f"{each['accuracy']:.2%}"),
                        *(f"{each['dense_ms']:.2f}", f"{each['cut_ms']:.2f}"),
                        f"{each['speedup']:.2f} [{low:.2f}, {high:.2f}]" + (" unstable" if each["unstable"] else ""),
                        f"{saved:.0%}",
                    )
                )
        parts.append(f"Batch {batch}:\n\n{to_table(HEADER, rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
