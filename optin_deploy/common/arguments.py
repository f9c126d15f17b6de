"""Arguments of the library: of the right type, or an error that names them."""

from __future__ import annotations

import operator
from typing import TypeVar

from optin_deploy.errors import BadInput

T = TypeVar("T")


def checked(value: object, kind: type[T], name: str) -> T | None:
    """The value if it is of this type or None.

    Raises: BadInput: names the argument.
    """
    if value is not None and not isinstance(value, kind):
        raise BadInput(f"{name} is a {type(value).__name__}; give a {kind.__name__}.")
    return value


def whole(value: object, name: str) -> int:
    """An int of any kind of whole number.

    Raises: BadInput: something else, also True and 3.0; names the argument.
    """
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool_":
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # that is what it finds out
    except TypeError as err:
        raise BadInput(f"{name} {value!r}: give a whole number.") from err


def number(value: object, name: str) -> float:
    """A float of any kind of real number.

    Raises: BadInput: something else, also True and "0.6"; names the argument.
    """
    if isinstance(value, (str, bytes, bytearray, bool)) or type(value).__name__ in ("bool", "bool_"):
        raise BadInput(f"{name} {value!r}: give a number.")
    try:
        return float(value)  # type: ignore[arg-type]  # that is what it finds out
    except (TypeError, ValueError, OverflowError, RuntimeError) as err:
        raise BadInput(f"{name} {value!r}: give a number.") from err
