"""Write a network as an ONNX file: whole or not at all, one weight after the other, large ones beside it if need be."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from optin_deploy.files.descriptors import retried
from optin_deploy.files.ownership import Record
from optin_deploy.files.storage import atomic_file
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.onnx_data import all_nodes
from optin_deploy.network.wire import LARGE_BYTES, length_delimited

SINGLE_FILE_BYTES = 2**31 - 2**26
"""protobuf holds 2 GiB; the weights of larger networks lie in a second file."""
OLDEST_IR = 4
"""First version of the format in which weights are no inputs."""
ALIGNED_BYTES = 64
"""Weights in a second file begin at multiples of this, so that they can be mapped and used in place."""


def data_path(path: Path) -> Path:
    """Path of the weights of an ONNX file that cannot hold them."""
    return path.with_name(f"{path.name}.data")


@uncollected()
def write(network: Network, path: Path, *, single_file_bytes: int = SINGLE_FILE_BYTES) -> None:
    """Write a network; weights are computed and written one at a time.

    Types and shapes of intermediate values are left out: after a cut they are stale, and every engine finds them.
    Killed half-way it leaves what was there or no ONNX file, never one beside the weights of another.
    Raises: BadInput: the disk is full.
    """
    proto, weights = _without_weights(network)
    size_bytes = proto.ByteSize() + sum(weight.nbytes + LARGE_BYTES for weight in weights.values())
    if size_bytes <= single_file_bytes:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            _write_inside(file, proto, weights)
        return
    data = data_path(path)
    with atomic_file(path) as temporary:
        with atomic_file(data) as temporary_data:
            with temporary_data.open("wb") as file:
                entries = list(_write_beside(file, data.name, weights))
            take_away(path)
        proto.graph.initializer.extend(entries)
        temporary.write_bytes(proto.SerializeToString())


def _without_weights(network: Network) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model with its small weights, and the large ones."""
    model, graph = copy.copy(network.model), network.model.graph
    large = {
        name: weight
        for name, weight in network.weights.items()
        if weight.dtype != ir.DataType.STRING and weight.nbytes >= LARGE_BYTES
    }
    model.graph = ir.GraphView(  # type: ignore[assignment]
        graph.inputs,
        graph.outputs,
        nodes=graph,
        initializers=[value for name, value in graph.initializers.items() if name not in large],
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    proto = ir.to_proto(model)
    proto.ir_version = max(proto.ir_version, OLDEST_IR)
    del proto.graph.value_info[:]
    for node in all_nodes(proto):
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                del graph.value_info[:]
    return proto, large


def _write_inside(file: BinaryIO, proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """One message, its fields in the order of their numbers: whoever reads and writes it again gets the same bytes."""
    before, after = _around(proto.graph, onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    heads = {name: _head(name, weight) for name, weight in weights.items()}
    size = len(before) + len(after) + sum(len(head) + weights[name].nbytes for name, head in heads.items())
    proto.ClearField("graph")
    first, last = _around(proto, onnx.ModelProto.GRAPH_FIELD_NUMBER)
    file.write(first + length_delimited(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + before)
    for name, head in heads.items():
        file.write(head)
        _write_values(file, weights[name])
    file.write(after + last)


def _around(message: Message, number: int) -> tuple[bytes, bytes]:
    """The fields up to a number, and those behind it."""
    parts = []
    for behind in (False, True):
        part = type(message)()
        part.CopyFrom(message)
        for field, _ in part.ListFields():
            if (field.number > number) is not behind:
                part.ClearField(field.name)
        parts.append(part.SerializeToString())
    return parts[0], parts[1]


def _head(name: str, weight: ir.TensorProtocol) -> bytes:
    """All of a weight but its values, which follow."""
    tensor: bytes = _tensor(name, weight).SerializeToString()
    raw = length_delimited(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, weight.nbytes)
    field = length_delimited(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(tensor) + len(raw) + weight.nbytes)
    return field + tensor + raw


def _write_beside(
    file: BinaryIO, location: str, weights: Mapping[str, ir.TensorProtocol]
) -> Iterator[onnx.TensorProto]:
    for name, weight in weights.items():
        file.write(bytes(-file.tell() % ALIGNED_BYTES))
        tensor = _tensor(name, weight)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", file.tell()), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        _write_values(file, weight)
        yield tensor


def _tensor(name: str, weight: ir.TensorProtocol) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=weight.dtype.value, dims=weight.shape.numpy())


def _write_values(file: BinaryIO, weight: ir.TensorProtocol) -> None:
    start = file.tell()
    if hasattr(weight, "tofile"):
        weight.tofile(file)  # without a copy where that is possible
    else:
        file.write(weight.tobytes())
    assert file.tell() - start == weight.nbytes, f"{weight.name} is not of the size that it tells"


def take_away(path: Path) -> None:
    """Remove a file before its weights are replaced; in a folder that keeps a record, only if it is ours."""
    record = Record.above(path)
    if record is None:
        retried(path.unlink, missing_ok=True)
    else:
        record.remove(os.path.relpath(path, record.root))
