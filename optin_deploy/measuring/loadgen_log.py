"""Read the figures of a test from MLCommons LoadGen's detail log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.errors import OptinError

DETAIL, MARK = "mlperf_log_detail.txt", ":::MLLOG "
"""The log, and what a line of JSON in it begins with."""
RATES = {
    "SingleStream": "result_qps_with_loadgen_overhead",
    "Offline": "result_samples_per_second",
    "Server": "result_completed_samples_per_sec",
}
"""Entry that holds the samples per second in each scenario."""
UNMET = {
    "result_perf_constraints_met": "too slow for the target latency",
    "result_min_duration_met": "too short",
    "result_min_queries_met": "too few queries",
    "early_stopping_met": "too few queries to be sure of the percentile",
}
"""LoadGen's verdicts that make a run invalid where they are false."""


class LoadGenFailed(OptinError):
    """LoadGen ended without figures."""


@dataclass(frozen=True)
class Figures:
    """One run, as LoadGen counts."""

    valid: bool
    unmet: tuple[str, ...]
    """Why it is not valid."""
    errors: tuple[str, ...]
    """LoadGen's own messages."""
    samples: int
    samples_per_second: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    version: str
    """Version of LoadGen."""


def read_log(folder: Path) -> Figures:
    """Figures of a finished test, from the lines of LoadGen's detail log.

    Raises: LoadGenFailed: no log, or no figures in it.
    """
    try:
        lines = (folder / DETAIL).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
        return _figures(entries)
    except (OSError, ValueError, KeyError) as err:
        raise LoadGenFailed(f"LoadGen left no figures in {DETAIL} ({err!r}). Run again with other --seconds.") from err


def _figures(entries: Sequence[Mapping[str, Any]]) -> Figures:
    said = {entry["key"]: entry["value"] for entry in entries}
    latency_ms = {name: said[f"result_{name}_latency_ns"] / 1e6 for name in ("mean", *map(_percentile, (50, 90, 99)))}
    return Figures(
        valid=said["result_validity"] == "VALID",
        unmet=tuple(reason for key, reason in UNMET.items() if said.get(key) is False),
        errors=tuple(str(entry["value"]) for entry in entries if entry["metadata"]["is_error"]),
        samples=said["result_query_count"] * said["effective_samples_per_query"],
        samples_per_second=float(said[RATES[said["effective_scenario"]]]),
        mean_ms=latency_ms["mean"],
        **{f"p{q}_ms": latency_ms[_percentile(q)] for q in (50, 90, 99)},
        version=said["loadgen_version"],
    )


def _percentile(q: int) -> str:
    return f"{q:.2f}_percentile"
