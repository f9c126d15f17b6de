"""Read ONNX files and find the files that hold their weights: bounded, never outside of the model's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short

PROTOBUF_BYTES = 2**31 - 1
"""What one protobuf message can hold; a larger file is none."""
NAME_LENGTH = 80
"""Longest name out of a file that is printed whole."""
OURS = "source.json"
"""Marks an output folder, whose ONNX files `optin build` makes again."""


def read_onnx(path: Path) -> onnx.ModelProto:
    """Parse a file, without its external data.

    Raises: BadInput: absent, above 2 GiB, truncated, or not an ONNX model.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not a file. {remedy(path)}")
    if path.stat().st_size > PROTOBUF_BYTES:
        size_gib = path.stat().st_size / 2**30
        raise BadInput(
            f"{path}: {size_gib:.1f} GiB, but an ONNX file holds at most 2 GiB (more: external data). {remedy(path)}"
        )
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, MemoryError) as err:
        raise BadInput(f"{path} is truncated or not an ONNX file ({err}). {remedy(path)}") from err
    # protobuf accepts an empty file, and some files of other formats, as a message without fields.
    if not (proto.HasField("graph") and proto.ir_version and proto.graph.output):
        raise BadInput(f"{path} is not an ONNX model: it has no graph with outputs. {remedy(path)}")
    return proto


def remedy(path: Path) -> str:
    """How an ONNX file that cannot be used is made again."""
    if not path.with_name(OURS).is_file():
        return "Give an .onnx file, or the output folder of `optin-export`."
    if path.name.count(".") < 2:  # what all others are made from
        return f"Make it again with `optin rewrite {path.parent}`, then `optin build {path.parent}`."
    return f"Make it again with `optin build {path.parent} --engine onnx --precision {path.name.split('.')[1]}`."


def data_files(path: Path) -> tuple[Path, ...]:
    """The files beside an ONNX file that hold its weights, each once; none if it holds them all itself.

    Raises: BadInput: as `read_onnx` and `data_files_of`.
    """
    return data_files_of(read_onnx(path), path)


def data_files_of(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """The same for a file that was read.

    Raises: BadInput: such a file lies outside of the folder, is missing, or is too short.
    """
    found: dict[Path, None] = {}
    for tensor in all_tensors(proto):
        fault = external_fault(tensor, path.parent)
        if fault is not None:
            raise BadInput(f"{path}: weights of {named(tensor.name)} cannot be read: {fault}. {remedy(path)}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            found[path.parent / data_location(tensor)] = None
    return tuple(found)


def data_location(tensor: onnx.TensorProto) -> str:
    """Path of a tensor's external data, relative to the ONNX file's folder; empty if it has none."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, also in the branches and loops, and in the model's own functions."""
    return nodes_below([*proto.graph.node[::-1], *(node for function in proto.functions for node in function.node)])


def nodes_below(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes, the last ones first, and those of the graphs inside of them."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initializers of all graphs, and tensors inside of nodes."""
    yield from proto.graph.initializer
    for sparse in proto.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in all_nodes(proto):
        for attribute in node.attribute:
            yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer


def external_fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    """Why the external data of a tensor cannot be read; None: it can, or the tensor has none."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    inside = folder.resolve()
    try:
        path = (inside / location).resolve()
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except (ValueError, OSError, RuntimeError):  # a name with a zero byte, a text as number, a loop of links
        return f"its entry for external data is damaged: {named(str(entries))}"
    if not location or Path(location).is_absolute() or not path.is_relative_to(inside):
        return f"its data lies outside of the folder, at {named(location)}; it is not read"
    if not path.is_file():
        return f"its data file {named(location)} is missing"
    size = path.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        return f"{named(location)} has {size} bytes, too few for bytes {offset} to {offset + length}"
    return None


def named(value: object) -> str:
    """Something out of a file as messages tell it, cut short."""
    return short(value, NAME_LENGTH)
