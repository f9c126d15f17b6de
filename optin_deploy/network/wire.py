"""Large weights stay in their file: an ONNX file is parsed without them, and written by streaming them.

A protobuf message is a run of fields: a tag (number times 8 plus a type), for texts and messages a length, the value.
`slim` copies a file without its large `raw_data`; each tensor says instead, as external data with the location `HERE`,
at which bytes of the file its values lie. That is what protobuf then parses, and what is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import onnx

LARGE_BYTES = 1024
"""Smaller tensors stay in the message."""
HERE = "\0"
"""Location of values that lie in the ONNX file itself; no file can have this name."""
DEEPEST = 100
"""Messages inside of messages that protobuf reads."""
MOST_PARTS = 2**20
"""Parts of one message, such as nodes of a graph: a network of a billion weights has some thousands."""

_BYTES = 2
"""Type of a field of texts, bytes and messages."""
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_EXTERNAL = (onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER, onnx.TensorProto.DATA_LOCATION_FIELD_NUMBER)
_INSIDE: Final = {
    "model": {
        onnx.ModelProto.GRAPH_FIELD_NUMBER: "graph",
        onnx.ModelProto.FUNCTIONS_FIELD_NUMBER: "function",
    },
    "graph": {onnx.GraphProto.NODE_FIELD_NUMBER: "node", onnx.GraphProto.INITIALIZER_FIELD_NUMBER: "tensor"},
    "function": {onnx.FunctionProto.NODE_FIELD_NUMBER: "node"},
    "node": {onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER: "attribute"},
    "attribute": {
        onnx.AttributeProto.T_FIELD_NUMBER: "tensor",
        onnx.AttributeProto.TENSORS_FIELD_NUMBER: "tensor",
        onnx.AttributeProto.G_FIELD_NUMBER: "graph",
        onnx.AttributeProto.GRAPHS_FIELD_NUMBER: "graph",
    },
}
"""Messages that can hold a tensor, by the message that holds them and the number of its field."""


class Malformed(ValueError):
    """Bytes that are no protobuf message."""


class _Field(NamedTuple):
    number: int
    type: int
    start: int
    """Offset of its tag."""
    value: int
    """Offset of its value."""
    end: int


def slim(file: memoryview) -> bytes:
    """The bytes of a model without its large weights.

    Raises: Malformed.
    """
    kept = _without_large(file, 0, len(file), "model", 0)
    return bytes(file) if kept is None else b"".join(kept)


def length_delimited(number: int, length: int) -> bytes:
    """Tag and length of a field that holds so many bytes; the bytes follow."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _without_large(file: memoryview, start: int, end: int, kind: str, depth: int) -> list[bytes | memoryview] | None:
    """Pieces of a message; None: nothing in it is large."""
    if depth > DEEPEST:
        raise Malformed(f"messages are nested more than {DEEPEST} deep")
    if kind == "tensor":
        return _elsewhere(file, start, end)
    pieces: list[bytes | memoryview] = []
    copied = start
    for count, field in enumerate(_fields(file, start, end)):
        if count == MOST_PARTS:
            raise Malformed(f"a {kind} has more than {MOST_PARTS} parts")
        inside = _INSIDE[kind].get(field.number) if field.type == _BYTES else None
        if inside is None or field.end - field.value < LARGE_BYTES:
            continue
        changed = _without_large(file, field.value, field.end, inside, depth + 1)
        if changed is not None:
            pieces += [file[copied : field.start], length_delimited(field.number, sum(map(len, changed))), *changed]
            copied = field.end
    return [*pieces, file[copied:end]] if pieces else None


def _elsewhere(file: memoryview, start: int, end: int) -> list[bytes | memoryview] | None:
    """A tensor that says where its values lie; None: they are few, or said twice, which is for the checks to refuse."""
    fields = list(_fields(file, start, end))
    raw = [field for field in fields if field.number == _RAW_DATA and field.type == _BYTES]
    if len(raw) != 1 or raw[0].end - raw[0].value < LARGE_BYTES or any(field.number in _EXTERNAL for field in fields):
        return None
    place = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    entries = {"location": HERE, "offset": str(raw[0].value), "length": str(raw[0].end - raw[0].value)}
    for key, value in entries.items():
        place.external_data.add(key=key, value=value)
    return [file[start : raw[0].start], file[raw[0].end : end], place.SerializeToString()]


def _fields(file: memoryview, start: int, end: int) -> Iterator[_Field]:
    place = start
    while place < end:
        tag, value = _number(file, place, end)
        match tag & 7:
            case 0:
                _, after = _number(file, value, end)
            case 1:
                after = value + 8
            case 2:
                length, value = _number(file, value, end)
                after = value + length
            case 5:
                after = value + 4
            case other:
                raise Malformed(f"byte {place} begins a field of type {other}")
        if after > end or not tag >> 3:
            raise Malformed(f"the field at byte {place} ends outside of its message")
        yield _Field(tag >> 3, tag & 7, place, value, after)
        place = after


def _number(file: memoryview, place: int, end: int) -> tuple[int, int]:
    """A varint: seven bits a byte, the lowest first; and where it ends."""
    found = shift = 0
    while True:
        if place >= end or shift > 63:
            raise Malformed(f"the number at byte {place} does not end")
        byte = file[place]
        found |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return found, place
        shift += 7


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
