"""What comes from outside, checked on the way in: stored JSON, numbers within bounds, sizes as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from optin_deploy.common.arguments import whole
from optin_deploy.errors import BadInput

T = TypeVar("T")

STORED = {"extra": "forbid", "strict": True}
"""`__pydantic_config__` of what is read from disk: no unknown fields, no conversions such as "5" -> 5."""
OPEN = {"extra": "ignore", "strict": True}
"""The same, of what other versions may have added fields to."""


def validated(kind: type[T], data: Mapping[str, Any], what: str, hint: str) -> T:
    """Make a dataclass of what JSON held; lists become tuples.

    Args:
        what: starts the error, e.g. "plan: not a plan.json of optin-deploy".
        hint: ends it: the next step.
    Raises: BadInput: a field is missing, unknown, of the wrong type, or refused by the dataclass itself.
    """
    from pydantic import ValidationError

    known: Any = kind
    try:
        found: T = _adapter(known).validate_json(json.dumps(data))
        return found
    except ValidationError as err:
        first = err.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        said = first["msg"].removeprefix("Value error, ").removesuffix(".")
        value = first["input"]
        shown = "" if value is None or isinstance(value, dict | list | tuple) else f" (it is {ascii(value)[:60]})"
        raise BadInput(f"{what}: {where}{said}{shown}. {hint}") from err
    except (TypeError, ValueError, RecursionError) as err:
        raise BadInput(f"{what}: {err}. {hint}") from err


@cache
def _adapter(kind: type[Any]) -> Any:
    """Made once for each dataclass: that takes longer than to read a file."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def holds(path: Path, *fields: str) -> bool:
    """Is this a JSON object with these fields, such as an earlier result of the same command?"""
    from optin_deploy.files.storage import read_json

    try:
        return set(fields) <= set(read_json(path, ""))
    except (BadInput, OSError):
        return False


INT32, UINT32 = 2**31 - 1, 2**32 - 1
LARGEST_SIZE = 2**60
UNITS = {None: 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def whole_number(value: int, option: str, low: int, high: int = INT32, hint: str = "") -> int:
    """The number, if it lies in [low, high].

    Args: option: what the user calls it. hint: a sentence that ends the error.
    Raises: BadInput.
    """
    if not low <= value <= high:
        given = f"{option}{value}" if option.endswith("=") else f"{option} {value}"
        raise BadInput(f"{given}: possible are {low} to {high}. {hint}".rstrip())
    return value


def seed_of(value: object) -> int:
    """The number, if each library draws something else for it than for any other one; of -1, Python draws as of 1.

    Raises: BadInput.
    """
    return whole_number(whole(value, "--seed"), "--seed", 0, UINT32, "The default is 0.")


def positive_number(value: float, option: str, high: float, hint: str = "") -> float:
    """The number, if it lies in (0, high]; nan does not.

    Raises: BadInput.
    """
    if not 0 < value <= high:
        raise BadInput(f"{option} {value:g}: give a positive number, at most {high:,g}. {hint}".rstrip())
    return value


def parse_share(text: str) -> float:
    """Read a share such as `0.6` or `60%`.

    Raises: ValueError.
    """
    number = text.strip()
    return float(f"{number[:-1]}e-2" if number.endswith("%") else number)


def parse_size(text: str, option: str) -> int:
    """Read a size such as `4GiB`, `512MiB` or a number of bytes.

    Raises: BadInput: names the option.
    """
    match = re.fullmatch(r"\s*(\d{1,40})\s*(KiB|MiB|GiB)?\s*", text)
    found = int(match[1]) * UNITS[match[2]] if match else 0
    if not 0 < found <= LARGEST_SIZE:
        raise BadInput(f"{option} {text!r}: give a size such as 512MiB or 4GiB, from 1 byte to 1073741824GiB.")
    return found
