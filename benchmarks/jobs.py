"""Whole jobs, as a user does them, for pages of results: made once, measured in every run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optin_deploy.jobs.bench import BenchSettings, bench_folder
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.measuring.points import Point
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.terminal import stage_bar

THREADS = 1
SPEED = ("dense p50 ms", "cut p50 ms", "speed-up [95%]", "ideal")
"""The columns of `speed`."""
KEPT = ("quality", "macs", "params", "groups", "seconds", "notes")
"""What of a report is kept."""


def reported(source: Source, flops: float, out: Path) -> dict[str, Any]:
    """What a job at a share of the MACs reports; made unless `out` has it, and measured on ONNX Runtime in this run."""
    if not (out / "report.json").is_file():
        export_model(Job(source, Limits(flops=flops), points=(), threads=THREADS), out, stage=stage_bar)
    bench_folder(out, BenchSettings("onnx", None, (Point(),), THREADS), stage=stage_bar)
    said, measured = (
        json.loads((out / name).read_text(encoding="utf-8")) for name in ("report.json", "measurements.json")
    )
    return {"folder": str(out), **{key: said[key] for key in KEPT}, "latency": measured["latency"]}


def quality(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """What is right in the cut network and in the dense one, and the points between, for a table."""
    cut, dense = (found["quality"][each] for each in ("pruned", "dense"))
    return f"{cut:.1%}", f"{dense:.1%}", f"{100 * (cut - dense):+.1f}"


def speed(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What was measured, for a table."""
    measured = found["latency"][0]
    low, high = measured["ci95"]
    times = (f"{measured[each]['p50_ms']:.2f}" for each in ("dense", "pruned"))
    return (*times, f"{measured['speedup']:.2f} [{low:.2f}, {high:.2f}]", f"{measured['ideal']:.2f}")
