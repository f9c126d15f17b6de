"""What comes from outside, checked on the way in: stored JSON, and sizes as people write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from optin_deploy.errors import BadInput
from optin_deploy.storage import read_json

T = TypeVar("T")

STORED = {"extra": "forbid", "strict": True}
"""`__pydantic_config__` of what is read from disk: no unknown fields, no conversions such as "5" -> 5."""


def validated(kind: type[T], data: Mapping[str, Any], what: str, hint: str) -> T:
    """Make a dataclass of what JSON held; lists become tuples.

    Args:
        what: starts the error, e.g. "plan: not a plan.json of optin-deploy".
        hint: ends it: the next step.
    Raises: BadInput: a field is missing, unknown, of the wrong type, or refused by the dataclass itself.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "whole"
        raise BadInput(f"{what}: {where}: {first['msg']}. {hint}") from err
    except (TypeError, ValueError, RecursionError) as err:
        raise BadInput(f"{what}: {err}. {hint}") from err


def holds(path: Path, *fields: str) -> bool:
    """Is this a JSON object with these fields, such as an earlier result of the same command?"""
    try:
        return set(fields) <= set(read_json(path, ""))
    except (BadInput, OSError):
        return False


def parse_size(text: str, option: str) -> int:
    """Read a size such as `4GiB`, `512MiB` or a number of bytes.

    Raises: BadInput: names the option.
    """
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    unit = text[-3:]
    number = text.removesuffix(unit) if unit in units else text
    if not number.strip().isdigit() or int(number) == 0:
        raise BadInput(f"{option} {text!r}: give a size such as 512MiB or 4GiB.")
    return int(number) * units.get(unit, 1)
