"""Read ONNX files: checked before any work, weights mapped from disk and never copied.

A file is mapped once, and what lies in its folder as external data too. The map is of the file as it was: one that is
replaced while a network is in use does no harm.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from optin_deploy.errors import BadInput
from optin_deploy.network.checks import check_model
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.normal import FOREIGN, normalise, reason
from optin_deploy.network.onnx_data import PROTOBUF_BYTES, all_tensors, data_location, external_fault, remedy
from optin_deploy.network.wire import HERE, Malformed, slim

Content = mmap.mmap | bytes
"""Bytes of a file."""


@uncollected()
def read_file(path: Path) -> Network:
    """Read an .onnx file and the weights beside it.

    Raises: BadInput: no ONNX file, damaged, or it speaks of files outside of its folder.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not a file. {remedy(path)}")
    if not 0 < path.stat().st_size <= PROTOBUF_BYTES:
        raise BadInput(
            f"{path} has {path.stat().st_size} bytes, but an ONNX file has at least one and at most 2 GiB (more: "
            f"external data). {remedy(path)}"
        )
    try:
        proto, content = _parsed(_map(path), str(path))
    except (DecodeError, Malformed, MemoryError) as err:
        raise BadInput(f"{path} is truncated or not an ONNX file ({err}). {remedy(path)}") from err
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and data_location(tensor) != HERE:
            fault = external_fault(tensor, path.parent)
            if fault is not None:
                raise BadInput(f"{path}: weights of {tensor.name[:80]!r} cannot be read: {fault}. {remedy(path)}")

    @cache
    def content_of(location: str) -> Content:
        return content if location == HERE else _map(path.parent / location)

    return _network(proto, content_of, str(path))


@uncollected()
def read_proto(proto: onnx.ModelProto) -> Network:
    """Read a model in memory; its weights are copied once.

    Raises: BadInput: damaged, above 2 GiB, or its weights lie in files, which only a path tells where to find.
    """
    source = "ModelProto"
    try:
        whole = proto.SerializeToString()
    except (EncodeError, ValueError) as err:
        raise BadInput(f"{source} is too large ({err}). Save it, and give the path of the .onnx file.") from err
    parsed, content = _parsed(whole, source)
    for tensor in all_tensors(parsed):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and data_location(tensor) != HERE:
            raise BadInput(
                f"{source}: the weights {tensor.name[:80]!r} lie in another file. Give the path of the .onnx file, or "
                "load the weights with `onnx.load_external_data_for_model`."
            )
    return _network(parsed, lambda _: content, source)


def read_ir(model: ir.Model, source: str = "ir.Model") -> Network:
    """Read a model of onnx_ir; the nodes are copied, the weights are shared.

    Raises: BadInput: its nodes wait for each other, or a function does not fit its calls.
    """
    try:
        copied = model.clone()
    except FOREIGN as err:
        raise BadInput(f"{source} is not a network that can be read: {reason(err)}") from err
    normalise(copied, source)
    return Network(copied, source)


def _parsed(content: Content, source: str) -> tuple[onnx.ModelProto, Content]:
    """The checked model without its large weights, and the bytes that hold them."""
    proto = onnx.ModelProto.FromString(slim(memoryview(content)))
    # protobuf accepts an empty file, and some files of other formats, as a message without fields.
    if not (proto.HasField("graph") and proto.ir_version and proto.graph.output):
        raise BadInput(f"{source} is not an ONNX model: it has no graph with outputs.")
    del proto.graph.value_info[:]  # what it says of intermediate values may be stale, and is found anew
    check_model(proto, source)
    return proto, content


def _network(proto: onnx.ModelProto, content_of: Callable[[str], Content], source: str) -> Network:
    try:
        model = ir.from_proto(proto)
    except FOREIGN as err:
        raise BadInput(f"{source} is not a network that can be read: {reason(err)}. Export the model again.") from err
    _place_weights(model, content_of, source)
    normalise(model, source)
    return Network(model, source)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _place_weights(model: ir.Model, content_of: Callable[[str], Content], source: str) -> None:
    """Give every tensor that lies in a file its bytes of the file's map."""

    def mapped(tensor: Any) -> Any:
        return _mapped(tensor, content_of, source) if isinstance(tensor, ir.ExternalTensor) else tensor

    for graph in (*model.graphs(), *(graph for function in model.functions.values() for graph in _graphs(function))):
        for value in graph.initializers.values():
            value.const_value = mapped(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, mapped(attribute.as_tensor()))
                elif attribute.type == ir.AttributeType.TENSORS:
                    node.attributes[name] = ir.AttrTensors(name, [mapped(each) for each in attribute.as_tensors()])


def _graphs(function: ir.Function) -> tuple[ir.Graph, ...]:
    return (function.graph, *function.subgraphs())


def _mapped(tensor: ir.ExternalTensor, content_of: Callable[[str], Content], source: str) -> ir.TensorProtocol:
    shape, dtype = tensor.shape, tensor.dtype
    size_bytes = (math.prod(shape.numpy()) * dtype.bitwidth + 7) // 8
    if not size_bytes:
        return ir.Tensor(np.zeros(shape.numpy(), dtype.numpy()), dtype, name=tensor.name)
    content, start = content_of(str(tensor.location)), tensor.offset or 0
    if start + size_bytes > len(content):
        raise BadInput(
            f"{source}: tensor {(tensor.name or '')[:80]!r} takes bytes {start} to {start + size_bytes} of a file that "
            f"has {len(content)}. Export the model again."
        )
    values = np.frombuffer(content, np.uint8, size_bytes, start)
    if dtype.bitwidth < 8:
        return ir.PackedTensor(values, dtype, shape=shape, name=tensor.name)
    return ir.Tensor(values.view(dtype.numpy()).reshape(shape.numpy()), dtype, name=tensor.name)
