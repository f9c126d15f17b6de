"""What a job is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.measuring.points import Point
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.tuning.settings import LabelFree

if TYPE_CHECKING:
    from optin_deploy.exporters.options import EngineOptions
    from optin_deploy.planning.widths import Align


@dataclass(frozen=True)
class Job:
    """All that one job is asked for."""

    source: Source
    limits: Limits = field(default_factory=Limits)
    """What may stay."""
    engine: str = "onnx"
    precision: str | None = None
    """None: the engine's first."""
    align: Align | None = None
    """Neurons, channels and widths in multiples of this; None: what the engine likes."""
    allocation: str = "curves"
    tokens: float | None = None
    """Mean share of the tokens that stay behind the attention of a block; None: all."""
    scoring: ScoreSettings = field(default_factory=ScoreSettings)
    memory_budget: int | None = None
    """Bytes that scoring may take beyond the network; None: most of what is free."""
    compensation: bool = True
    tuning: LabelFree | None = None
    """How the cut network is tuned towards the dense outputs, without labels; None: nothing is trained."""
    points: tuple[Point, ...] = (Point(),)
    """Points at which dense and pruned are measured against each other."""
    threads: int = 0
    """Intra-op threads of the engine; 0 = its default."""
    table: Path | None = None
    """Latency table for `limits.time`; None: latency.json in the output folder, measured if need be."""
    pool: str | None = None
    options: EngineOptions | None = None
    """Those of the engine; None: their defaults."""
    dense: bool = True
    """Is the dense network exported too, and measured beside?"""
