"""What a cut network learns from, and how it is trained or tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.common.validation import seed_of, whole_number
from optin_deploy.errors import BadInput
from optin_deploy.pruning.source import Source

STATE = ".optin-training"
"""Folder in which an unfinished training lies."""
TUNE_HINT = "Give --tune minutes=5, perhaps with steps=1000, lr=2e-4 or batch=32 behind a comma."


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
        seed_of(self.seed)


@dataclass(frozen=True)
class LabelFree:
    """How long and how fast a cut network is tuned towards the dense one's outputs, without labels."""

    minutes: float
    """Most minutes, of a clock on the wall."""
    steps: int | None = None
    """Most steps; with them the result does not depend on the speed of the machine. None: as many as there is time."""
    learning_rate: float = 2e-4
    """Highest size of a step, as a part of the root mean square of each weight's entries."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 10_000:
            raise BadInput(f"--tune minutes={self.minutes:g}: possible are more than 0, up to 10000. {TUNE_HINT}")
        if not 0 < self.learning_rate < 1:
            raise BadInput(f"--tune lr={self.learning_rate:g}: give a rate above 0 and below 1, such as 2e-4.")
        for name, value in (("steps", self.steps), ("batch", self.batch_size)):
            if value is not None:
                whole_number(value, f"--tune {name}=", 1, hint=TUNE_HINT)


def parse_tune(text: str) -> LabelFree:
    """Read `minutes=5,lr=2e-4`.

    Raises: BadInput: says which part is wrong.
    """
    fields = {"minutes": "minutes", "steps": "steps", "lr": "learning_rate", "batch": "batch_size"}
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in fields:
            raise BadInput(f"--tune {text!r}: {name!r} is not known; possible are {', '.join(fields)}. {TUNE_HINT}")
        if fields[name] in values:
            raise BadInput(f"--tune {text!r}: {name} is given twice. {TUNE_HINT}")
        try:
            values[fields[name]] = (int if name in ("steps", "batch") else float)(value)
        except ValueError as err:
            raise BadInput(f"--tune {text!r}: {value!r} is no number for {name}. {TUNE_HINT}") from err
    if "minutes" not in values:
        raise BadInput(f"--tune {text!r}: minutes are missing. {TUNE_HINT}")
    return LabelFree(**values)
