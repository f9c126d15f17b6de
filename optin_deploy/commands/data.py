"""What a job starts from, as options: the model, its calibration data, and how that is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.errors import BadInput

DATA = "Data of any network"
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE|ID",
        help="Tokenizer of the calibration texts: folder, tokenizer.json or hub id. [default: beside the file]",
        rich_help_panel=DATA,
    ),
]
Preprocessor = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE|ID",
        help="How images are prepared: folder, preprocessor_config.json or hub id. [default: beside the file]",
        rich_help_panel=DATA,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|HxW",
        help="Of images: what an ONNX file leaves free, and what a transformers model is exported for. "
        "[default: as its image processor makes them]",
        rich_help_panel=DATA,
    ),
]
AnySize = Annotated[
    bool,
    typer.Option(
        "--any-size",
        help="Leave height and width of images free in what a transformers model becomes, where it allows that.",
        rich_help_panel=DATA,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M[,M,M]", help="Of channels: pixels become (pixel / 255 - mean) / std.", rich_help_panel=DATA
    ),
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Of channels.", rich_help_panel=DATA)]
Compared = Annotated[
    str | None,
    typer.Option(
        "--compare-output",
        metavar="NAME[:KIND]",
        help="Output that is compared, and as what: logits, probabilities, regression, embedding. [default: found]",
        rich_help_panel=DATA,
    ),
]


def source_of(given: Mapping[str, Any]) -> Any:
    """What a job starts from; files by their full paths, so that later commands find them from anywhere.

    Args: given: options of a command by their names in Python; those that it does not have are left as they are.
    Raises: BadInput.
    """
    from optin_deploy.commands.networks import sizes_of
    from optin_deploy.planning.widths import DEFAULT_KINDS
    from optin_deploy.pruning.source import Source

    options = {name: given[name] for name in AS_THEY_ARE if name in given}
    for name in ("model", "calibration", "evaluation", "tokenizer", "preprocessor"):
        options[name] = _found(given.get(name))
    output, read_as = compared(given.get("compared"))
    units = given.get("units")
    kinds = DEFAULT_KINDS if units is None else tuple(kind.strip() for kind in units.split(","))
    mean, std = (given.get(name) for name in ("mean", "std"))
    return Source(
        **options,
        image_size=image_size_of(given.get("image_size")),
        mean=None if mean is None else _numbers(mean, "--mean"),
        std=None if std is None else _numbers(std, "--std"),
        sizes=sizes_of(given.get("shape")) or {},
        units=kinds,
        output=output,
        read_as=read_as,
    )


AS_THEY_ARE = (
    "task",
    "text_column",
    "label_column",
    "pair_column",
    "seq_len",
    "samples",
    "seed",
    "any_size",
    "drop_tokens",
)
"""Options that a source has under the same name."""


def _found(name: str | Path | None) -> str | None:
    """The full path of a file or folder; a hub id stays what it is."""
    if name is None:
        return None
    return str(Path(name).absolute()) if isinstance(name, Path) or Path(name).exists() else name


def compared(text: str | None) -> tuple[str | None, Any]:
    """Name and kind of `--compare-output NAME:KIND`; either may be left out."""
    from optin_deploy.scoring.reading import KINDS

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


def image_size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width of `--image-size 224` or `320x48`.

    Raises: BadInput.
    """
    from optin_deploy.common.validation import whole_number

    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise BadInput(f"--image-size {text!r}: give one size, or height and width, as in 48x320.")
    height, width = (whole_number(int(part), "--image-size", 1) for part in (parts[0], parts[-1]))
    return height, width
