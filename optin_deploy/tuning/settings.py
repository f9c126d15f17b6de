"""What a cut network learns from, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.pruning.source import Source


@dataclass(frozen=True)
class TrainingRows:
    """What is learned from."""

    data: Path
    evaluation: Path | None = None
    """None: some rows of `data` judge."""
    samples: int = 2048
    text_column: str = Source.text_column
    label_column: str = Source.label_column
    pair_column: str = Source.pair_column


@dataclass(frozen=True)
class Tuning:
    """How long and how fast, and what pulls."""

    epochs: float = 1.0
    """0: only a classifier is fitted, where the network has none."""
    learning_rate: float = 2e-5
    batch_size: int = 32
    distill: float = 0.5
    """Weight of the distance to the dense outputs; that of the labels is the rest. Without labels it is all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.epochs <= 1000:
            raise BadInput(f"--epochs {self.epochs:g}: possible are 0 to 1000.")
        if not 0 < self.learning_rate < 1:
            raise BadInput(f"--learning-rate {self.learning_rate:g}: give a rate above 0 and below 1, such as 2e-5.")
        if self.batch_size < 1:
            raise BadInput(f"--batch-size {self.batch_size}: give 1 or more rows.")
        if not 0 <= self.distill <= 1:
            raise BadInput(f"--distill {self.distill:g}: possible are 0 (labels alone) to 1 (the dense outputs alone).")
