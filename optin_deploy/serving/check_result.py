"""What `optin serve-check` found, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optin_deploy.common.environment import environment
from optin_deploy.serving.load import LoadPoint
from optin_deploy.serving.manifest import Manifest

SCHEMA_VERSION = 1
PERCENTILES = (50, 95, 99)
LOAD_HEADER = ("clients", "model", "role", *(f"p{q} ms" for q in PERCENTILES), "requests/s", "pruned / dense [95% CI]")


@dataclass(frozen=True)
class Checked:
    """What one version answered."""

    manifest: Manifest
    largest_error: float
    """Largest error of all outputs and requests, relative to max(1, largest reference value); NaN if nothing was
    compared."""
    requests: int
    compared_with: str
    """`artifact`: run here on the same inputs; `recorded`: the torch model's outputs, where that cannot be."""
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """An entry of the result."""
        return {
            "name": self.manifest.name,
            "version": self.manifest.version,
            "role": self.manifest.role,
            "sha256": self.manifest.sha256.get(self.manifest.file),
            "largest_error": self.largest_error if math.isfinite(self.largest_error) else None,
            "requests": self.requests,
            "compared_with": self.compared_with,
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class ServedPair:
    """A pruned version, and the dense one that it is compared with."""

    pruned: Manifest
    dense: Manifest | None


@dataclass(frozen=True)
class ServeCheck:
    """Everything that was found."""

    checked: tuple[Checked, ...]
    load: tuple[tuple[ServedPair, tuple[LoadPoint, ...]], ...]
    settings: Mapping[str, Any]

    def load_rows(self) -> list[tuple[str, ...]]:
        """Rows of a table with LOAD_HEADER."""
        rows = []
        for pair, points in self.load:
            for point in points:
                for each in filter(None, (pair.dense, pair.pruned)):
                    name = label(each)
                    figures = [f"{point.latency_ms(name, q):.2f}" for q in PERCENTILES]
                    speedup = "-"
                    if pair.dense is not None and each is pair.pruned:
                        gain, (low, high) = point.gain(label(pair.dense), name)
                        speedup = f"{gain:.2f}x [{low:.2f}, {high:.2f}]"
                    rows.append(
                        (str(point.concurrency), name, each.role, *figures, f"{point.per_second(name):.1f}", speedup)
                    )
        return rows

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit, in sentences."""
        return tuple(problem for each in self.checked for problem in each.problems)

    def to_json(self) -> dict[str, Any]:
        """What --out holds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": dict(self.settings),
            "environment": environment(),
            "models": [each.to_json() for each in self.checked],
            "load": [
                {
                    "pruned": label(pair.pruned),
                    "dense": pair.dense and label(pair.dense),
                    "points": [point.to_json() for point in points],
                }
                for pair, points in self.load
            ],
        }


def label(manifest: Manifest) -> str:
    """How a version is called in tables."""
    return f"{manifest.name}:{manifest.version}"
