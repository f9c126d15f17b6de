"""Read back what a job found, checked: report.json, measurements.json, sweep.csv, and the plan that was cut."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field, PositiveFloat, PositiveInt

from optin_deploy.common.stored import Stored
from optin_deploy.common.validation import validated
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import sha256_file
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.quality.metrics import METRICS
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.artifact_table import ArtifactQuality
from optin_deploy.reporting.latency_rows import LatencyRow
from optin_deploy.reporting.report import SCHEMA_VERSION, quality_lines

if TYPE_CHECKING:
    from optin_deploy.reporting.report import Report

LENIENT = {"extra": "ignore", "strict": True, "allow_inf_nan": False}
"""`__pydantic_config__` of what other versions may have added fields to."""
OF_TEXT = {**LENIENT, "strict": False}
"""`LENIENT` for a table, in which every value is text."""

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class FigurePair:
    """One figure of both models."""

    dense: PositiveFloat
    pruned: PositiveFloat


@dataclass(frozen=True)
class Macs(FigurePair):
    """MACs of one sample."""

    kept: Share
    prunable_kept: Share


@dataclass(frozen=True)
class Sizes:
    """Bytes of the artifacts."""

    pruned: PositiveFloat
    dense: PositiveFloat | None = None


@dataclass(frozen=True)
class StoredGroup:
    """Units of one group of a network that was cut in its graph."""

    name: str
    kind: str
    kept: Annotated[int, Field(ge=0, le=2**24)]
    units: Annotated[int, Field(ge=1, le=2**24)]


@dataclass(frozen=True)
class StoredReport(Stored):
    """What is read of report.json; the fields are those of reporting.report.Report."""

    schema_version = SCHEMA_VERSION
    older = (1,)
    hint = "Make it with `optin-export MODEL --out {folder}`."
    __pydantic_config__ = LENIENT

    quality: Quality
    params: FigurePair
    macs: Macs
    size_bytes: Sizes
    parity: Mapping[str, float]
    latency: tuple[LatencyRow, ...]
    environment: Mapping[str, Any]
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    """Highest resident bytes of each stage; absent in reports of earlier versions."""
    groups: tuple[StoredGroup, ...] = ()
    """Groups of a network that was cut in its graph."""
    artifacts: tuple[ArtifactQuality, ...] = ()
    """Artifacts of other types beside the float32 networks."""
    tuned: Mapping[str, Any] | None = None
    """What tuning without labels did; None: nothing was tuned."""

    def __post_init__(self) -> None:
        try:
            _ = self.quality_lines
        except KeyError as err:
            raise BadInput(f"quality has metric {err}, which is not known") from err

    @property
    def quality_lines(self) -> list[str]:
        """The sentence that a report opens with, and a warning if agreement is low."""
        return quality_lines(cast("Report", self))  # of a report it reads `quality`, which is the same here

    @property
    def model(self) -> str:
        """Folder or hub id of the dense model, or its ONNX file."""
        return str(self.settings.get("model") or self.settings.get("source") or "a model")


@dataclass(frozen=True)
class StoredMeasurements(Stored):
    """What is read of measurements.json."""

    schema_version = 2
    older = (1,)
    hint = "Measure again with `optin bench {folder}`."
    __pydantic_config__ = LENIENT

    latency: tuple[LatencyRow, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class SweepRow:
    """One line of sweep.csv."""

    __pydantic_config__ = OF_TEXT

    flops: Share
    """Share of the dense MACs that was allowed."""
    kept: Share
    """Share of the dense MACs that the model takes."""
    parameters: PositiveInt
    metric: str
    dense: float
    pruned: float
    drop: float
    """Points of the metric that are lost, or percent of a perplexity."""

    def __post_init__(self) -> None:
        known = METRICS.get(self.metric)
        if known is not None and not known.less and max(abs(self.dense), abs(self.pruned)) > 1:
            raise ValueError(f"{self.metric} is {self.dense} and {self.pruned}, and lies between -1 and 1")


@dataclass(frozen=True)
class Kept:
    """Units of one kind: which of them stay."""

    names: tuple[str, ...]
    """Names of layers or groups."""
    stay: tuple[tuple[bool, ...], ...]
    """One row a name."""


@dataclass(frozen=True)
class Findings:
    """All that is known about a finished output folder."""

    report: StoredReport
    report_sha256: str
    kept: Mapping[str, Kept]
    """Which units of the dense model are in the pruned one, by kind."""
    bench: StoredMeasurements | None
    """Measured again by `optin bench`."""
    sweep: tuple[SweepRow, ...]
    """Empty if there was no sweep."""


def read_findings(folder: Path) -> Findings:
    """Everything in an output folder that people want to look at.

    Raises: BadInput: the job is not finished, or a file is damaged. PlanMismatch: the model is not the report's.
    """
    path = folder / "report.json"
    report = StoredReport.read(path)
    bench, sweep = folder / "measurements.json", folder / "sweep.csv"
    return Findings(
        report,
        sha256_file(path),
        _kept(folder, report),
        StoredMeasurements.read(bench) if bench.exists() else None,
        _read_sweep(sweep, f"Make it again with `optin sweep {folder}`.") if sweep.exists() else (),
    )


def read_report(folder: Path) -> StoredReport | None:
    """The report.json of an output folder; None: there is none, as after `optin build` alone.

    Raises: BadInput: it is damaged or edited.
    """
    path = folder / "report.json"
    return StoredReport.read(path) if os.path.lexists(path) else None


def _kept(folder: Path, report: StoredReport) -> Mapping[str, Kept]:
    """Units that stay in the plan that the report is about."""
    plan = _plan_of(folder, report)
    found: dict[str, tuple[list[str], list[tuple[bool, ...]]]] = {}
    for group in report.groups:
        kept = set(plan.keep.get(group.name, range(group.units)))
        names, stay = found.setdefault(group.kind, ([], []))
        names.append(group.name)
        stay.append(tuple(unit in kept for unit in range(group.units)))
    return {kind: Kept(tuple(names), tuple(stay)) for kind, (names, stay) in found.items()}


def _plan_of(folder: Path, report: StoredReport) -> NetworkPlan:
    """The plan that a report is about: that of the folder, or of model/ where a newer one lies in the folder.

    Raises: PlanMismatch: none is.
    """
    first = NetworkPlan.read(folder / "plan.json")
    saved = folder / "model" / "plan.json"
    plans = [first, NetworkPlan.read(saved)] if saved.is_file() else [first]
    for plan in plans:
        if plan.hash == report.hashes.get("plan"):
            return plan
    raise PlanMismatch(
        f"{folder / 'report.json'} is about plan {report.hashes.get('plan', '-')[:12]}, but {folder / 'plan.json'} is "
        f"{first.hash[:12]}. Make both with `optin-export MODEL --out {folder}`."
    )


def _read_sweep(path: Path, hint: str) -> tuple[SweepRow, ...]:
    what = f"{path}: not of this version"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{str(name): text for name, text in row.items()} for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as err:
        raise BadInput(f"{path} is not a table ({err}). {hint}") from err
    if not rows:
        raise BadInput(f"{path} holds no row. {hint}")
    return tuple(validated(SweepRow, row, what, hint) for row in rows)
