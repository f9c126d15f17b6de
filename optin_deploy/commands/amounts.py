"""Amounts as people type them."""

from __future__ import annotations

from typing import Any

import typer

from optin_deploy.common.validation import parse_share, parse_size
from optin_deploy.errors import BadInput


def size_of(text: str | None, option: str) -> int | None:
    """Bytes of a size such as 4GiB."""
    return None if text is None else parse_size(text, option)


def share_of(text: str | float) -> float:
    """Share of 0.6 or 60%.

    Raises: typer.BadParameter.
    """
    try:
        return parse_share(str(text))
    except ValueError as err:
        raise typer.BadParameter(f"{str(text)!r} is not a share such as 0.6 or 60%.") from err


def align_of(text: str | None) -> Any:
    """Multiples of `--align 16` or `--align neurons=16,channels=8`.

    Raises: BadInput.
    """
    if text is None:
        return None
    parts = [part.rpartition("=") for part in text.split(",")]
    numbers = [number.strip() for _, _, number in parts]
    names = [name.strip() for name, _, _ in parts]
    whole = all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers)
    if not whole or len({*names}) < len(names) or (len(names) > 1 and "" in names):
        raise BadInput(f"--align {text!r}: give a whole number, or one for each kind, as in neurons=16,channels=8.")
    return int(numbers[0]) if names == [""] else dict(zip(names, map(int, numbers), strict=True))
