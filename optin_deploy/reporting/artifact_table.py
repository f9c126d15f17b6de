"""What each artifact is worth beside the float32 dense network: rows of the report, a table, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optin_deploy.errors import BadInput
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import point_name
from optin_deploy.quality.metrics import METRICS
from optin_deploy.quality.quality import Quality

if TYPE_CHECKING:
    from optin_deploy.reporting.latency_rows import LatencyRow

FLOAT32 = "fp32"
CLEAR_POINTS, CLEAR_ROWS = 1.0, 2
"""An artifact loses clearly more than its network in float32 if it is by more than so many points, and so many rows."""


@dataclass(frozen=True)
class ArtifactQuality:
    """One artifact on the rows that judge; `quality.dense` is the float32 dense network's figure."""

    engine: str
    precision: str
    which: str
    """`dense` or `pruned`."""
    quality: Quality

    def __post_init__(self) -> None:
        if self.quality.metric not in METRICS:
            raise BadInput(f"quality has metric {self.quality.metric!r}, which is not known")

    def __str__(self) -> str:
        return f"{self.precision} {self.which}, {self.engine}"

    def to_json(self) -> dict[str, object]:
        """Return a row of report.json's `artifacts`."""
        return {**vars(self), "quality": self.quality.to_json()}

    @property
    def figure(self) -> str:
        """Its figure of the metric, as tables show it."""
        metric = METRICS[self.quality.metric]
        return f"{self.quality.pruned:{'.1%' if metric.share and metric.labelled else '.4f'}}"


def artifact_table(
    rows: Sequence[ArtifactQuality], latency: Sequence[Measurement | LatencyRow]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows (artifact, figure, points lost, measured speed-up) of a report; no rows where all is float32."""
    metric = METRICS[rows[0].quality.metric].title if rows else ""
    header = ("artifact", metric, "points lost", "speed-up over float32 dense")
    return header, [(str(row), row.figure, f"{row.quality.drop:.2f}", _speed(latency, row)) for row in rows]


def _speed(latency: Sequence[Measurement | LatencyRow], row: ArtifactQuality) -> str:
    """Speed-ups over the float32 dense model at the points where they were measured; `-`: nowhere."""
    found = [
        f"{m.speedup:.2f}x at {point_name(m.batch, m.seq_len)}"
        for m in latency
        if (m.engine, m.precision, row.which) == (row.engine, row.precision, "pruned")
        and (m.dense_precision or m.precision) == FLOAT32
    ]
    return ", ".join(found) or "-"


def artifact_warnings(rows: Sequence[ArtifactQuality]) -> list[str]:
    """A sentence for each artifact that loses clearly more than the float32 network that it was made of."""
    float32 = {row.which: row.quality.drop for row in rows if row.precision == FLOAT32}
    return [
        f"In {row.precision} on {row.engine} the {row.which} model loses {row.quality.drop:.2f} points, in float32 "
        f"{float32[row.which]:.2f}. Use a higher --precision, or another engine."
        for row in rows
        if row.quality.drop - float32[row.which] > max(CLEAR_POINTS, 100 * CLEAR_ROWS / row.quality.samples)
    ]
