"""Triton's config.pbtxt as text: messages are dicts, with the names of Triton's ModelConfig message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

TYPES = {"BYTES": "TYPE_STRING"}
"""V2 datatypes that Triton names differently; for all others the name is TYPE_ and the datatype."""
Message = Mapping[str, Any]
"""Fields by name: messages, scalars, or lists of either. None and empty lists are left out."""


class Word(str):
    """An enumeration's value: written without quotes."""


def data_type(datatype: str) -> Word:
    """Triton's name of a V2 datatype."""
    return Word(TYPES.get(datatype, f"TYPE_{datatype}"))


def entries(mapping: Message) -> list[Message]:
    """A field that is a map, as it is written: one message of key and value for each entry."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def lines(message: Message, indent: str = "") -> Iterator[str]:
    """Lines of a message."""
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name} {{"
            yield from lines(value, indent + "  ")
            yield f"{indent}}}"
        elif isinstance(value, list | tuple):
            if all(isinstance(each, Mapping) for each in value):
                for each in value:
                    yield from lines({name: each}, indent)
            else:
                yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
        elif value is not None:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Word():
            return str(value)
        case str():
            return json.dumps(value)  # pbtxt and JSON escape ASCII alike
    return str(value)
