"""Latency of both models at each point as report.json and measurements.json hold it, checked field by field."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Annotated

from pydantic import Field, PositiveInt

from optin_deploy.errors import BadInput
from optin_deploy.measuring.measurement import beside

Milliseconds = Annotated[float, Field(ge=1e-9, le=1e9)]
"""A latency, no shorter than any clock tells and no longer than 11 days: quotients of two are finite."""
Ratio = Annotated[float, Field(ge=1e-9, le=1e9)]
Blocks = Annotated[tuple[Annotated[tuple[Milliseconds, ...], Field(min_length=1)], ...], Field(min_length=2)]
"""(blocks, runs) raw samples."""


@dataclass(frozen=True)
class StoredLatency:
    """Latency of one model at one point."""

    p50_ms: Milliseconds
    p95_ms: Milliseconds
    throughput: float
    """Samples a second."""


@dataclass(frozen=True)
class StoredSamples:
    """Raw samples of one comparison."""

    dense: Blocks
    pruned: Blocks

    def __post_init__(self) -> None:
        if len(self.dense) != len(self.pruned):
            raise BadInput(f"{len(self.dense)} blocks of the dense model, {len(self.pruned)} of the pruned one")

    @property
    def block_ratios(self) -> tuple[float, ...]:
        """Median dense / median pruned latency of each block."""
        return tuple(median(a) / median(b) for a, b in zip(self.dense, self.pruned, strict=True))


@dataclass(frozen=True)
class LatencyRow:
    """Dense against pruned at one point."""

    engine: str
    precision: str
    batch: PositiveInt
    seq_len: PositiveInt | None
    threads: int
    dense: StoredLatency
    pruned: StoredLatency
    speedup: Ratio
    ci95: tuple[Ratio, Ratio]
    ideal: Ratio
    realised: float
    samples_ms: StoredSamples
    same_ci95: tuple[Ratio, Ratio] = (1.0, 1.0)
    """Confidence interval of the ratio of the dense model's two sessions; since schema 2."""
    unstable: bool = False
    dense_engine: str | None = None
    dense_precision: str | None = None
    """Precision of the dense model if it differs from the pruned one's; None in reports that did not say it."""

    @property
    def beside(self) -> str:
        """See `Measurement.beside`."""
        return beside(self.engine, self.precision, self.dense_engine, self.dense_precision)
