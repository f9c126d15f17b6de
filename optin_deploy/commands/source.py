"""What a job starts from, as options: the model, its calibration rows, and how these are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.common.validation import whole_number
from optin_deploy.errors import BadInput
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.settings import KINDS

of_data = partial(typer.Option, rich_help_panel="Data of any network")
of_network = partial(typer.Option, rich_help_panel="ONNX files and any network")
"""Options in the panels of `--help`."""
Seed = Annotated[int, typer.Option(help="Seed of sampling and random projections.")]
Shape = Annotated[
    list[str] | None,
    of_network(
        "--shape",
        metavar="NAME=SIZE",
        help="Size of a free axis of the inputs, by its name in the file; repeatable. [default: several are tried]",
    ),
]
Units = Annotated[
    str | None,
    of_network(
        metavar="KINDS",
        help="What may be cut: heads, groups, queries, neurons, channels; qk-width, v-width: heads get narrower. "
        "[default: heads,groups,neurons,channels]",
    ),
]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read."""

    text_column: Annotated[str, typer.Option(help="Column of the text in .jsonl and .csv.")] = Source.text_column
    pair_column: Annotated[
        str, typer.Option(help="Column of the second text, for models that take pairs; text_pair may be absent.")
    ] = Source.pair_column
    label_column: Annotated[str, typer.Option(help="Column of the label; labels are only used to report accuracy.")] = (
        Source.label_column
    )


@dataclass(frozen=True)
class RowOptions:
    """Calibration rows of a model, and what they are read with."""

    task: Annotated[str | None, typer.Option(help="transformers task; inferred from config.architectures.")] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            help=".txt, .jsonl, .csv, a folder of images or recordings, or .npz with inputs by name. Default: a small "
            "bundled set."
        ),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(help="Longest calibration text in tokens. [default: 128, or what the network takes]"),
    ] = None
    seed: Seed = Source.seed
    tokenizer: Annotated[
        str | None,
        of_data(
            metavar="DIR|FILE|ID",
            help="Tokenizer of the calibration texts: folder, tokenizer.json or hub id. [default: beside the file]",
        ),
    ] = None
    preprocessor: Annotated[
        str | None,
        of_data(
            metavar="DIR|FILE|ID",
            help="How images or sounds are prepared: folder, preprocessor_config.json or hub id. [default: beside the "
            "file]",
        ),
    ] = None
    shape: Shape = None

    def source(self, model: str, **more: Any) -> Source:
        """Return a `Source`; files by their full paths, so that later commands find them from anywhere.

        Args: more: further fields of it.
        Raises: BadInput.
        """
        return Source(
            model=_found(model) or model,
            task=self.task,
            calibration=_found(self.calibration),
            seq_len=self.seq_len,
            seed=self.seed,
            tokenizer=_found(self.tokenizer),
            preprocessor=_found(self.preprocessor),
            sizes=sizes_of(self.shape),
            **more,
        )


@dataclass(frozen=True)
class AllRows(RowOptions):
    """The same, with all that is known of rows, and what of the network they are for."""

    columns: Columns = Columns()  # it is frozen
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = Source.samples
    image_size: Annotated[
        str | None,
        of_data(
            metavar="SIZE|HxW",
            help="Of images: what an ONNX file leaves free, and what a transformers model is exported for. "
            "[default: as its image processor makes them]",
        ),
    ] = None
    any_size: Annotated[
        bool,
        of_data(
            "--any-size",
            help="Leave height and width of images free in what a transformers model becomes, where it allows that.",
        ),
    ] = False
    mean: Annotated[
        str | None, of_data(metavar="M[,M,M]", help="Of channels: pixels become (pixel / 255 - mean) / std.")
    ] = None
    std: Annotated[str | None, of_data(metavar="S[,S,S]", help="Of channels.")] = None
    units: Units = None
    compared: Annotated[
        str | None,
        of_data(
            "--compare-output",
            metavar="NAME[:KIND]",
            help="Output that is compared, and as what: logits, probabilities, regression, embedding. [default: found]",
        ),
    ] = None

    def source(self, model: str, **more: Any) -> Source:
        """Return a `Source`; see `Rows.of`."""
        output, read_as = _compared(self.compared)
        return super().source(
            model,
            **vars(self.columns),
            samples=self.samples,
            image_size=_image_size(self.image_size),
            any_size=self.any_size,
            mean=None if self.mean is None else _numbers(self.mean, "--mean"),
            std=None if self.std is None else _numbers(self.std, "--std"),
            units=kinds_of(self.units),
            output=output,
            read_as=read_as,
            **more,
        )


def kinds_of(units: str | None) -> tuple[str, ...]:
    """Kinds of units of `--units`; the default ones without it."""
    return Source.units if units is None else tuple(kind.strip() for kind in units.split(","))


def _found(name: str | Path | None) -> str | None:
    """Full path of a file or folder; a hub id stays what it is."""
    if name is None:
        return None
    return str(Path(name).absolute()) if isinstance(name, Path) or Path(name).exists() else name


def _compared(text: str | None) -> tuple[str | None, Any]:
    """Name and kind of `--compare-output NAME:KIND`; either may be left out."""
    if text is None:
        return None, None
    name, colon, kind = text.rpartition(":")
    if colon and kind in KINDS:
        return name or None, kind
    return text, None


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as err:
        raise BadInput(
            f"{option} {text!r}: give one number, or one for each channel, as in 0.485,0.456,0.406."
        ) from err


def _image_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of `--image-size 224` or `320x48`.

    Raises: BadInput.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise BadInput(f"--image-size {text!r}: give one size, or height and width, as in 48x320.")
    height, width = (whole_number(int(part), "--image-size", 1) for part in (parts[0], parts[-1]))
    return height, width


def sizes_of(shape: Sequence[str] | None) -> dict[str, int]:
    """Sizes of free axes from `--shape NAME=SIZE`.

    Raises: BadInput.
    """

    found: dict[str, int] = {}
    for text in shape or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isascii() or not number.isdigit() or len(number) > 12:
            raise BadInput(f"--shape {text!r}: give the name of an axis and its size, as in height=64.")
        if name in found:
            raise BadInput(f"--shape {name} is given twice. Give each axis once.")
        found[name] = whole_number(int(number), f"--shape {name}=", 1)
    return found
