"""The wall around foreign files: whatever a library raises on them is bad input, and says nothing of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any, TypeVar

from optin_deploy.errors import BadInput, OptinError

T = TypeVar("T")
NO_FAULT = (KeyboardInterrupt, SystemExit, GeneratorExit)
SHOWN = 200
"""Characters of a foreign value or message that are repeated."""


@contextmanager
def wall(what: str, step: str | Callable[[], str]) -> Iterator[None]:
    """Turn what a library raises into bad input, and keep its warnings to itself.

    Args: what: the file and what cannot be done with it. step: what to do next; a function is asked only then.
    Raises: BadInput: `what`, the reason, `step`.
    """
    try:
        with _silent():
            yield
    except (OptinError, MemoryError, *NO_FAULT):
        raise
    # The one wall: on foreign files libraries raise anything at all; a panic of tokenizers is not even an Exception.
    except BaseException as err:
        raise BadInput(f"{what}: {reason(err)}. {step if isinstance(step, str) else step()}") from err


@contextmanager
def _silent() -> Iterator[None]:
    """What transformers would say about a load, the loader says itself, in words that fit."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity(CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def blamed(path: object, data: Mapping[str, Any], make: Callable[[dict[str, Any]], T], step: str) -> T:
    """What `make` makes of the entries of a config; a failure names the entry without which it would succeed.

    Raises: BadInput: the file, the entry and its value, the reason.
    """
    try:
        with wall(f"{path} cannot be used", step):
            return make(dict(data))
    except BadInput as err:
        if not isinstance(err.__cause__, Exception) or isinstance(err.__cause__, OptinError):
            raise  # our own words
        with _silent():
            guilty = _guilty(err.__cause__, data, make)
        if guilty is None:
            raise
        said = f"{guilty} = {shown(data[guilty])}"
        raise BadInput(f"{path} cannot be used: {said}: {reason(err.__cause__)}. {step}") from err.__cause__


def _guilty(err: Exception, data: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]) -> str | None:
    for name in data:
        if f"for field '{name}'" in str(err):  # transformers' own check of types
            return name
    for name in data:
        try:
            make({key: value for key, value in data.items() if key != name})
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a trial: this entry was not the (only) one
            continue
        return name
    return None


def reason(err: BaseException) -> str:
    """The line of a foreign error that says most, without its full stop."""
    lines = [" ".join(line.split()) for line in str(err).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "Validation error for field 'x':" above what is wrong
        lines = lines[1:]
    said = lines[0] if lines else ""
    if isinstance(err, KeyError) or not said:
        said = f"{type(err).__name__}{f' {said}' if said else ''}"
    said = re.sub(r"<class '(\w+)'>", r"\1", said.partition(". Errors: ")[0]).removeprefix("TypeError: ")
    return ascii(said)[1:-1].rstrip(".")[:SHOWN]


def shown(value: object) -> str:
    """A foreign value in a message: on one line, not too long, without characters that a terminal cannot print."""
    text = ascii(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
