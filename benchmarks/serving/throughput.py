"""What a pruned model gains behind a real Triton: perf_analyzer on dense and pruned, beside the local speed-up.

The server is that of `make servers`, its ONNX Runtime a python-based backend; `optin ship` writes the repository.
Run: `python -m benchmarks.serving.throughput out/demo/pruned --record`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.serving.servers import TritonServer, environment
from optin_deploy.files.storage import read_tensors
from optin_deploy.jobs.bench import BenchSettings, bench_rows, checked
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.serving.manifest import ServingOptions
from optin_deploy.serving.names import dense_of
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.shipping import ship_folder

NAME = "model"
CONCURRENCIES = (1, 4, 16)
SHARE, LEAST_BATCH = 0.75, 8
"""Share of the local speed-up that must be reached at the highest concurrency, and the least batch for which it must
be."""
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""Names that perf_analyzer looks for -> what they are called in nvidia-pytriton."""


@dataclass(frozen=True)
class Run:
    """One run of perf_analyzer."""

    model: str
    batch: int
    concurrency: int
    per_second: float
    """Samples per second."""
    p50_ms: float
    p95_ms: float


def main() -> None:
    """Serve, drive, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of `optin export`")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each point, dense and pruned by turns")
    parser.add_argument("--window", type=int, default=4000, help="milliseconds of a run's windows, at least")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads, on the server and locally")
    parser.add_argument("--out", type=Path, default=Path("out/serving"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    home = environment("triton")
    if home is None:
        parser.error("there is no .venv-triton: run `make servers`")
    local = _local(options.folder, options.batches, options.threads)
    with tempfile.TemporaryDirectory(prefix="optin-serving-") as scratch:
        runs = list(_served(options, home, Path(scratch), local))
    data = {
        "runs": [asdict(run) for run in runs],
        "local": [measured.to_json() for measured in local],
        "settings": {"threads": options.threads, "window_ms": options.window, "rounds": options.rounds},
    }
    command = command_of("benchmarks.serving.throughput")
    page = page_of(runs, local)
    for folder in (options.out, *((RESULTS,) if options.record else ())):
        write_result(folder, "serving_throughput", data, page, command)
    print(page)


def _local(folder: Path, batches: Sequence[int], threads: int) -> list[Measurement]:
    points = tuple(Point(batch) for batch in batches)
    return bench_rows(checked(folder, BenchSettings("onnx", None, points, threads)), stage=stage_bar)


def _served(options: argparse.Namespace, home: Path, scratch: Path, local: Sequence[Measurement]) -> Iterator[Run]:
    serving = ServingOptions(max_batch=32, threads=options.threads)
    ship_folder(options.folder, ShipOrder("triton", scratch / "repository", NAME, options=serving))
    data = _input_data(options.folder / "samples.safetensors", scratch / "inputs.json")
    control = ["--model-control-mode=none"]
    with TritonServer(scratch / "repository", scratch / "server", home=home, control=control) as server:
        client = PerfAnalyzer(server, home, scratch, data)
        for measured in local:
            for concurrency in CONCURRENCIES:
                # Twice what the dense model needs for all that are waiting: in a shorter window none may finish.
                window = max(options.window, round(2 * concurrency * measured.timing.dense(50)))
                for turn in range(options.rounds):
                    models = (dense_of(NAME), NAME)
                    for model in models if turn % 2 == 0 else models[::-1]:
                        with stage_bar(f"{model}, batch {measured.batch}, {concurrency} at once"):
                            yield client.run(model, measured.batch, concurrency, window)


def _input_data(samples: Path, target: Path) -> Path:
    """Recorded rows as perf_analyzer reads them: random ids could lie outside of the vocabulary."""
    tensors = read_tensors(samples, "Give an output folder of `optin export`.")
    rows = {name.removeprefix("input."): values for name, values in tensors.items() if name.startswith("input.")}
    count = len(next(iter(rows.values())))
    entries = [
        {
            name: {"content": values[i].reshape(-1).tolist(), "shape": list(values[i].shape)}
            for name, values in rows.items()
        }
        for i in range(count)
    ]
    target.write_text(json.dumps({"data": entries}))
    return target


class PerfAnalyzer:
    """perf_analyzer of the server's environment, on recorded rows."""

    def __init__(self, server: TritonServer, home: Path, scratch: Path, data: Path) -> None:
        self.binary = str(home / "bin/perf_analyzer")
        self.asked = ["-i", "grpc", "-u", server.grpc, "--input-data", str(data)]
        self.table = scratch / "table.csv"
        self.environment = _libraries(home, scratch)

    def run(self, model: str, batch: int, concurrency: int, window: int) -> Run:
        """Three windows (ms) whatever their spread: the rounds show it."""
        self.table.unlink(missing_ok=True)
        command = [self.binary, *self.asked, "-m", model, "-b", str(batch), "--concurrency-range", str(concurrency)]
        command += ["-p", str(window), "-s", "999", "-r", "3", "-f", str(self.table)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode or not self.table.is_file():
            raise RuntimeError(f"perf_analyzer ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
        with self.table.open(newline="") as file:
            (row,) = csv.DictReader(file)
        rate, p50, p95 = (float(row[name]) for name in ("Inferences/Second", "p50 latency", "p95 latency"))
        return Run(model, batch, concurrency, rate, p50 / 1000, p95 / 1000)


def _libraries(home: Path, scratch: Path) -> Mapping[str, str]:
    """The environment in which perf_analyzer finds its libraries."""
    bundled = next((home / "lib").glob("python3*/site-packages/nvidia_pytriton.libs"))
    folder = scratch / "lib"
    folder.mkdir()
    for name, pattern in LIBRARIES.items():
        (folder / name).symlink_to(next(bundled.glob(pattern)))
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{bundled}"}


def page_of(runs: Sequence[Run], local: Sequence[Measurement]) -> str:
    """The result for people."""
    rows, judged = [], []
    for measured in local:
        for concurrency in sorted({run.concurrency for run in runs}):
            here = [run for run in runs if (run.batch, run.concurrency) == (measured.batch, concurrency)]
            dense, pruned = (_rounds(here, model) for model in (dense_of(NAME), NAME))
            gains = pruned["per_second"] / dense["per_second"]
            share = float(np.median(gains)) / measured.timing.speedup
            if concurrency == max(CONCURRENCIES) and measured.batch >= LEAST_BATCH:
                judged.append(share >= SHARE)
            rows.append(
                (
                    str(measured.batch),
                    str(concurrency),
                    *(f"{np.median(each['per_second']):.1f}" for each in (dense, pruned)),
                    *(f"{np.median(each['p95_ms']):.0f}" for each in (dense, pruned)),
                    f"{np.median(gains):.2f}x ({min(gains):.2f} to {max(gains):.2f})",
                    f"{measured.timing.speedup:.2f}x [{measured.timing.ci95[0]:.2f}, {measured.timing.ci95[1]:.2f}]",
                    f"{share:.0%}",
                )
            )
    header = ("batch", "concurrency", "dense/s", "pruned/s", "dense p95 ms", "pruned p95 ms", "gain", "local", "share")
    verdict = "no such point was measured" if not judged else "holds" if all(judged) else "**does not hold**"
    return "\n".join(
        [
            "# Dense and pruned behind Triton, driven by perf_analyzer",
            "",
            "Samples a second and latency over gRPC; median of the rounds, the gain with its range over them. Local: "
            "the speed-up that `optin bench` measures at the same batch, threads and machine. Asked: at least "
            f"{SHARE:.0%} of it at concurrency {max(CONCURRENCIES)} and batches of {LEAST_BATCH} or more: {verdict}.",
            "",
            to_table(header, rows),
        ]
    )


def _rounds(runs: Sequence[Run], model: str) -> dict[str, Any]:
    mine = [run for run in runs if run.model == model]
    return {name: np.array([getattr(run, name) for run in mine]) for name in ("per_second", "p95_ms")}


if __name__ == "__main__":
    main()
