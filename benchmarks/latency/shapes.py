"""Does an ONNX file run faster with or without the shapes of its intermediate values?

ONNX Runtime fuses a residual sum with the LayerNorm after it only where the file, or the runtime itself, knows their
shapes. Dense and pruned files are timed both ways, by turns, in fresh sessions.
Run: `python -m benchmarks.latency.shapes --record`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.latency.models import MODELS, first_units
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.cutting.graph import cut
from optin_deploy.exporters import exporter
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.width_timer import inputs_of
from optin_deploy.measuring.artifacts import Opening, time_pair
from optin_deploy.measuring.gate import LatencyLimit, verdict_of
from optin_deploy.measuring.points import parse_point
from optin_deploy.network.write import write
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.runtimes.base import Feeds

SHARES = (1.0, 0.6, 0.4, 0.25)
"""Kept shares of the units of every group."""
POINTS = ("batch=1,seq=40", "batch=1,seq=128", "batch=8,seq=128")


@dataclass(frozen=True)
class Row:
    """One file at one size of input, both ways."""

    share: float
    at: str
    with_ms: float
    without_ms: float
    ratio: float
    """Time without shapes / time with them."""
    ci95: tuple[float, float]
    largest_difference: float
    """Largest difference of the outputs."""


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    rows = [*_rows(prepare(MODELS[options.model](options.out / "models")), options.threads)]
    text = page(rows, f"{options.model} on ONNX Runtime, {options.threads} threads")
    print(text)
    command = command_of("benchmarks.latency.shapes")
    data = {"model": options.model, "threads": options.threads, "rows": [asdict(row) for row in rows]}
    write_result(RESULTS if options.record else options.out, "latency_shapes", data, text, command)


def _rows(prepared: Prepared, threads: int) -> Iterator[Row]:
    layout, engine, inputs = prepared.ready.layout, exporter("onnx"), inputs_of(prepared)
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            bare, shaped = Path(folder) / "model.onnx", Path(folder) / "shaped.onnx"
            write(cut(layout, first_units(layout, share)), bare)
            onnx.save(onnx.shape_inference.infer_shapes(onnx.load(bare)), shaped)
            for at in POINTS:
                point = parse_point(at)
                feeds = inputs.feeds(point)
                first, second = (Opening(engine, path, "fp32", threads) for path in (shaped, bare))
                timing = time_pair(first, second, feeds, title=f"{share:g} at {at}", stage=stage_bar)
                verdict = verdict_of(timing, LatencyLimit("max_ratio", 1.0))
                yield Row(
                    share=share,
                    at=at,
                    with_ms=float(np.median(np.concatenate(timing.dense_ms))),
                    without_ms=float(np.median(np.concatenate(timing.pruned_ms))),
                    ratio=verdict.ratio,
                    ci95=verdict.ci95,
                    largest_difference=_difference(shaped, bare, feeds),
                )


def _difference(first: Path, second: Path, feeds: Feeds) -> float:
    engine = exporter("onnx")
    with engine.open(first) as one, engine.open(second) as other:
        pairs = [(one.run(feeds)[name], values) for name, values in other.run(feeds).items()]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def page(rows: list[Row], where: str) -> str:
    """The result for people."""
    header = ("kept", "at", "with shapes, ms", "without, ms", "without / with", "95% CI", "outputs differ by")
    cells = [
        (
            f"{row.share:.0%}",
            row.at,
            f"{row.with_ms:.2f}",
            f"{row.without_ms:.2f}",
            f"{row.ratio:.3f}",
            f"{row.ci95[0]:.3f} to {row.ci95[1]:.3f}",
            f"{row.largest_difference:.0e}",
        )
        for row in rows
    ]
    return f"# Shapes of intermediate values in ONNX files\n\n{where}.\n\n{to_table(header, cells)}"


if __name__ == "__main__":
    main()
