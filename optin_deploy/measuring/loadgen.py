"""What is asked of MLCommons LoadGen, and what people are told of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optin_deploy.common.validation import positive_number
from optin_deploy.errors import BadInput
from optin_deploy.measuring.loadgen_log import Figures

OFFICIAL_SECONDS = 600
SCENARIOS = {
    "single-stream": ("SingleStream", "p90_ms"),
    "offline": ("Offline", "samples_per_second"),
    "server": ("Server", "p99_ms"),
}
"""Ours -> LoadGen's name, and the figure that artifacts are compared by."""


MOST = {"--seconds": 86_400.0, "--qps": 1e6, "--target-latency": 86_400_000.0}
"""A day; LoadGen counts in integers of nanoseconds."""


@dataclass(frozen=True)
class LoadSettings:
    """What LoadGen sends."""

    scenario: str = "single-stream"
    seconds: float = 10.0
    """Least duration of a run."""
    qps: float | None = None
    """Server: mean rate of the Poisson arrivals, queries a second."""
    target_latency_ms: float | None = None
    """Server: what 99% of the queries must keep."""

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise BadInput(f"--scenario {self.scenario!r}: possible are {', '.join(SCENARIOS)}.")
        asked = {"--seconds": self.seconds, "--qps": self.qps, "--target-latency": self.target_latency_ms}
        for option, value in asked.items():
            if value is not None:
                positive_number(value, option, MOST[option])
        for option, value in list(asked.items())[1:]:
            if (value is not None) != (self.scenario == "server"):
                said = "needs" if self.scenario == "server" else "has no"
                example = "--scenario server --qps 50 --target-latency 20"
                raise BadInput(f"--scenario {self.scenario} {said} {option}. The server scenario: {example}.")


@dataclass(frozen=True)
class Run:
    """One test of one artifact."""

    model: str
    """`dense` or `pruned`."""
    number: int
    logs: str
    """Folder of LoadGen's logs, relative to the output folder."""
    figures: Figures


@dataclass(frozen=True)
class ScenarioRuns:
    """All runs of a scenario, in the order they ran."""

    load: LoadSettings
    runs: tuple[Run, ...]

    @property
    def figure(self) -> str:
        """Name of the figure that is compared."""
        return SCENARIOS[self.load.scenario][1]

    def mean(self, model: str) -> float:
        """Geometric mean of that figure over a model's runs."""
        values = [getattr(run.figures, self.figure) for run in self.runs if run.model == model]
        return math.exp(sum(map(math.log, values)) / len(values))

    @property
    def ratio(self) -> float:
        """How much better the pruned model is: 2.0 = half the latency, or twice the samples a second."""
        higher_is_better = self.figure == "samples_per_second"
        return (self.mean("pruned") / self.mean("dense")) ** (1 if higher_is_better else -1)

    def to_json(self) -> dict[str, Any]:
        """What mlperf.json holds of it."""
        means = {model: self.mean(model) for model in ("dense", "pruned")}
        return {
            "about": about(self.load),
            "load": asdict(self.load),
            "loadgen": self.runs[0].figures.version,
            "runs": [asdict(run) for run in self.runs],
            "compared": {"figure": self.figure, **means, "ratio": self.ratio},
        }


HEADER = ("run", "p50 / p90 / p99 ms", "samples/s", "samples", "LoadGen says")


def run_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of HEADER."""
    return [
        (
            f"{run.model} {run.number}",
            f"{f.p50_ms:.2f} / {f.p90_ms:.2f} / {f.p99_ms:.2f}",
            f"{f.samples_per_second:.1f}",
            str(f.samples),
            "; ".join(("valid" if f.valid else "invalid", *f.unmet, *f.errors)),
        )
        for run in runs
        for f in (run.figures,)
    ]


def compared_lines(found: ScenarioRuns) -> list[str]:
    """The ratio, and what it is not."""
    what, unit = {
        "p90_ms": ("latency at percentile 90", "ms"),
        "p99_ms": ("latency at percentile 99", "ms"),
        "samples_per_second": ("throughput", "samples/s"),
    }[found.figure]
    dense, pruned = found.mean("dense"), found.mean("pruned")
    return [
        f"{what[0].upper()}{what[1:]}, geometric means: {dense:.4g} {unit} dense, {pruned:.4g} {unit} pruned: "
        f"{found.ratio:.2f}x (above 1: pruned is better).",
        *invalid_lines(found.runs),
        "Two runs of each give no confidence interval; `optin bench` without --protocol does.",
        about(found.load),
    ]


def invalid_lines(runs: Sequence[Run]) -> list[str]:
    """A warning where LoadGen does not accept a run."""
    count = sum(not run.figures.valid for run in runs)
    return [f"LoadGen calls {count} of {len(runs)} runs invalid: do not compare by them."] if count else []


def about(load: LoadSettings) -> str:
    """What these figures are not."""
    return (
        f"Not an MLPerf result or submission: its rules ask, among other things, for {OFFICIAL_SECONDS} seconds a run; "
        f"asked here: {load.seconds:g}."
    )
