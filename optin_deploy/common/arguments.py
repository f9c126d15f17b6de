"""Arguments of the library: of the right type, or an error that names them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from optin_deploy.errors import BadInput, OptinError

T = TypeVar("T")
P = ParamSpec("P")


def as_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Errors of a function name its arguments, where the work behind it names the options of the command line."""
    names = {f"--{name.replace('_', '-')}": name for name in signature(function).parameters}

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except OptinError as err:
            err.args = tuple(
                re.sub(r"--[a-z-]+", lambda found: names.get(found[0], found[0]), str(arg)) for arg in err.args
            )
            raise

    return called


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
