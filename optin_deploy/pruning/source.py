"""What a job starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optin_deploy.common.stored import Stored
from optin_deploy.common.validation import INT32, seed_of, whole_number
from optin_deploy.data.pairs import PAIR_COLUMN
from optin_deploy.scoring.settings import Kind
from optin_deploy.structure.labels import DEFAULT_KINDS

MOST_TOKENS = 2**20
"""Longer than any position table."""


@dataclass(frozen=True)
class Source(Stored):
    """What a job starts from, source.json; every later stage reads it, so that commands need only the folder."""

    schema_version = 2
    hint = "Make the folder again with `optin score MODEL --out DIR --force`."

    model: str
    """The dense network: an ONNX file, or folder or hub id of a transformers model."""
    task: str | None = None
    calibration: str | None = None
    """File or folder; None = the bundled set."""
    text_column: str = "text"
    label_column: str = "label"
    seq_len: int | None = None
    """Longest calibration text in tokens; None = what the network fixes, or 128 at the most."""
    samples: int = 512
    seed: int = 0
    evaluation: str | None = None
    """File or folder whose rows judge the networks; None = rows held out of the calibration set."""
    pair_column: str = PAIR_COLUMN
    """Column of the second text of pairs."""
    tokenizer: str | None = None
    """Folder, tokenizer.json or hub id; None = what lies beside the network."""
    preprocessor: str | None = None
    """Folder, preprocessor_config.json or hub id; None = what lies beside the network."""
    image_size: tuple[int, int] | None = None
    """Height and width, where an ONNX file leaves them free; a transformers model is exported for them."""
    any_size: bool = False
    """Height and width stay free in the export of a transformers model."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels, in place of a preprocessor: pixels become (pixel / 255 - mean) / std."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of free axes by their names in the file, if it takes only some sizes."""
    units: tuple[str, ...] = DEFAULT_KINDS
    """Kinds of units that may be cut."""
    drop_tokens: bool = False
    """Whether tokens that go are dropped, not merged."""
    output: str | None = None
    """Output that is compared; None = found."""
    read_as: Kind | None = None
    """How it is compared; None = by what makes it."""

    def __post_init__(self) -> None:
        if self.seq_len is not None:
            whole_number(
                max(self.seq_len, 1), "--seq-len", 1, MOST_TOKENS, "The default is 128."
            )  # the model says more
        whole_number(self.samples, "--samples", 1, INT32, "The default is 512.")
        seed_of(self.seed)

    @property
    def is_file(self) -> bool:
        """Is this an ONNX file, not a transformers model?"""
        return self.model.lower().endswith(".onnx")

    def inputs(self) -> dict[str, str]:
        """What a job reads, by what it is."""
        read = {"model": self.model, "calibration data": self.calibration, "data of --eval": self.evaluation}
        read |= {"tokenizer": self.tokenizer, "preprocessor": self.preprocessor}
        return {what: path for what, path in read.items() if path is not None}
