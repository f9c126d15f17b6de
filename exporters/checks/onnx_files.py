"""Read ONNX files that others made: bounded, never outside their folder; walk all nodes and tensors of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from exporters.checks.findings import named
from optin_deploy.errors import BadInput

PROTOBUF_BYTES = 2**31 - 1
"""What one protobuf message can hold; a larger file is none."""
HINT = "Give an .onnx file, or the output folder of `optin-export`."


def read_onnx(path: Path) -> onnx.ModelProto:
    """Parse a file, without its external data.

    Raises: BadInput: absent, above 2 GiB, truncated, or not an ONNX model.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not a file. {HINT}")
    if path.stat().st_size > PROTOBUF_BYTES:
        size_gib = path.stat().st_size / 2**30
        raise BadInput(
            f"{path}: {size_gib:.1f} GiB, but an ONNX file holds at most 2 GiB (more: external data). {HINT}"
        )
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, MemoryError) as err:
        raise BadInput(f"{path} is truncated or not an ONNX file ({err}). {HINT}") from err
    # protobuf accepts an empty file, and some files of other formats, as a message without fields.
    if not (proto.HasField("graph") and proto.ir_version and proto.graph.output):
        raise BadInput(f"{path} is not an ONNX model: it has no graph with outputs. {HINT}")
    return proto


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, also in the branches and loops, and in the model's own functions."""
    waiting = [*proto.graph.node[::-1], *(node for function in proto.functions for node in function.node)]
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


def values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A stored tensor as an array; `external_fault` must have found none.

    Raises: BadInput: its bytes do not fit its shape.
    """
    try:
        return onnx.numpy_helper.to_array(tensor, str(folder))
    except (ValueError, TypeError, OSError, MemoryError, KeyError) as err:
        raise BadInput(f"tensor {named(tensor.name)} is damaged: {named(str(err))}. Export the model again.") from err


def module_path(node: onnx.NodeProto) -> str:
    """Path of the torch module that a node came from, as torch's exporter noted it; empty if it did not."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    parts = scopes.strip("[]").split(", ")  # a Python list of names: the modules from outside in, then the operation
    return parts[-2].strip("'") if len(parts) > 1 else ""
