"""A model file is checked before any work: names are defined once, sizes fit their bytes, functions come to an end.

What is refused here would otherwise be an exception, a hang or a full memory somewhere below. Whether an operator is
known, and gets what it needs, is for its row to say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from typing import Any

import onnx
import onnx_ir as ir

from optin_deploy.errors import BadInput
from optin_deploy.network.onnx_data import named, nodes_below

MOST_NODES = 2**16
"""Nodes of a model, also after its functions took the place of their calls."""
MOST_NAMES_TRIED = 10**8
"""Steps of the inliner, which tries one number after the other until a name is free: some seconds."""
MOST_ENTRIES = 2**48
"""Entries of a tensor that a graph may speak of."""
ONNX = ("", "ai.onnx")
"""The domain of ONNX's own operators."""
OLDEST_VERSION = 11
"""Oldest version of ONNX's own operators; in older ones Slice and others took their sizes as attributes."""
NEWEST_VERSION = 1000
"""No operator set has as many versions."""

_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}
"""Field in which a tensor holds its entries if not as bytes; all other types use `int32_data`."""
_ALL_FIELDS = ("raw_data", "int32_data", *dict.fromkeys(_FIELDS.values()))
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
_SPARSE = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)

_FunctionId = tuple[str, str, str]
"""Domain, name and overload."""


class _Fault(ValueError):
    """What is wrong, as a clause that goes behind the name of the file."""


def check_model(proto: onnx.ModelProto, source: str) -> None:
    """Check everything in a model but the files beside it.

    Raises: BadInput: it names the file, the value and what is wrong with it.
    """
    try:
        _check_texts(proto)
        for entry in chain(proto.opset_import, *(function.opset_import for function in proto.functions)):
            if not 1 <= entry.version <= NEWEST_VERSION:
                raise _Fault(f"it asks for version {entry.version} of the operators {named(entry.domain or 'ai.onnx')}")
            if entry.domain in ONNX and entry.version < OLDEST_VERSION:
                raise BadInput(
                    f"{source} is written with opset {entry.version}; possible are {OLDEST_VERSION} and newer. Export "
                    "it again, or convert it by `onnx.version_converter.convert_version(model, 17)`."
                )
        _check_graph(proto.graph, ())
        for function in proto.functions:
            names = _once(function.input, "input of a function")
            _check_body(function.node, names, function.output, (), in_function=True)
        _check_calls(proto)
    except _Fault as err:
        raise BadInput(f"{source}: {err}. Export the model again; `onnx.checker.check_model` tells more.") from err


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the entries of a stored tensor take, by its type and sizes."""
    bits: int = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
    return (bits + 7) // 8


def _check_texts(proto: Any) -> None:
    """protobuf hands out a text that is not UTF-8 as bytes."""
    waiting = [proto]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting.extend((value,) if hasattr(value, "ListFields") else value)
            elif field.type == field.TYPE_STRING:
                for text in (value,) if isinstance(value, (str, bytes)) else value:
                    if isinstance(text, bytes):
                        raise _Fault(f"its {field.name} {named(text)} is no text")


def _check_graph(graph: onnx.GraphProto, outer: tuple[set[str], ...], *, in_function: bool = False) -> None:
    if graph.sparse_initializer:
        raise _Fault(f"weight {named(graph.sparse_initializer[0].values.name)} is sparse; store it as a dense tensor")
    for value in chain(graph.input, graph.output, graph.value_info):
        _check_sizes(value)
    for tensor in graph.initializer:
        _check_tensor(tensor, tensor.name)
    names = _once((value.name for value in graph.input), "input of a graph")
    names |= _once((tensor.name for tensor in graph.initializer), "weight")
    _check_body(graph.node, names, [value.name for value in graph.output], outer, in_function=in_function)


def _check_body(
    nodes: Sequence[onnx.NodeProto],
    names: set[str],
    outputs: Iterable[str],
    outer: tuple[set[str], ...],
    *,
    in_function: bool,
) -> None:
    """Check nodes that may read the names of their own graph, in any order, and those of the graphs around it."""
    computed = [name for node in nodes for name in node.output if name]
    for name in computed:
        if name in names:
            raise _Fault(f"value {named(name)} is defined twice")
        names.add(name)
    scopes = (*outer, names)
    for node in nodes:
        if not node.op_type:
            raise _Fault(f"node {named(node.name)} names no operator")
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise _Fault(f"node {_node(node)} reads {named(name)}, which nothing defines")
        _once((attribute.name for attribute in node.attribute), f"attribute of {_node(node)}")
        for attribute in node.attribute:
            _check_attribute(attribute, node, scopes, in_function=in_function)
    for name in outputs:  # one value may be several outputs
        if name not in names:
            raise _Fault(f"output {named(name)} is computed by nothing")


def _check_attribute(
    attribute: onnx.AttributeProto, node: onnx.NodeProto, scopes: tuple[set[str], ...], *, in_function: bool
) -> None:
    where = f"attribute {named(attribute.name)} of {_node(node)}"
    if attribute.ref_attr_name:
        if not in_function:
            raise _Fault(f"{where} refers to an attribute of a function, but is in none")
        return
    if attribute.type == onnx.AttributeProto.UNDEFINED:
        raise _Fault(f"{where} is of an unknown type")
    declared = _declared(node.op_type).get(attribute.name) if node.domain in ONNX else None
    if declared is not None and declared != attribute.type:
        kinds = onnx.AttributeProto.AttributeType
        raise _Fault(f"{where} is of type {kinds.Name(attribute.type)}, not {kinds.Name(declared)}")
    if attribute.type in _SPARSE:
        raise _Fault(f"{where} is a sparse tensor; store it as a dense one")
    if attribute.type == onnx.AttributeProto.TENSOR:
        _check_tensor(attribute.t, attribute.name)
    for tensor in attribute.tensors:
        _check_tensor(tensor, attribute.name)
    for graph in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs):
        _check_graph(graph, scopes, in_function=in_function)


@cache
def _declared(op: str) -> Mapping[str, int]:
    """Types of the attributes of one of ONNX's own operators, as protobuf numbers them; none of one that is unknown."""
    if not onnx.defs.has(op):
        return {}
    attributes = onnx.defs.get_schema(op).attributes
    return {name: attribute.type.value for name, attribute in attributes.items()}  # type: ignore[attr-defined]


def _check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    """Do its type and sizes fit what is stored? Of values in other files only the length is compared, if it is told."""
    where = f"tensor {named(tensor.name or name)}"
    dtype = _dtype(tensor.data_type, where)
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MOST_ENTRIES:
        raise _Fault(f"{where} has impossible sizes {named(list(tensor.dims))}")
    if tensor.HasField("segment"):
        raise _Fault(f"{where} is stored in segments, which nothing reads")
    stored = {field: len(getattr(tensor, field)) for field in _ALL_FIELDS if getattr(tensor, field)}
    entries = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), None)
        if stored or dtype == ir.DataType.STRING:
            raise _Fault(f"{where} says that it lies in another file, but holds {named(stored or 'texts')}")
        if length is not None and length != str(tensor_bytes(tensor)):
            raise _Fault(
                f"{where} of sizes {list(tensor.dims)} takes {tensor_bytes(tensor)} bytes, not {named(length)}"
            )
        return
    field = "raw_data" if tensor.raw_data else _FIELDS.get(dtype, "int32_data")
    if field == "raw_data":
        needed = tensor_bytes(tensor) if dtype != ir.DataType.STRING else -1
    elif dtype.bitwidth in (2, 4) and field == "int32_data":
        needed = tensor_bytes(tensor)
    else:
        needed = 2 * entries if dtype in _COMPLEX else entries
    if stored != ({field: needed} if needed else {}):
        raise _Fault(f"{where} of type {dtype} and sizes {named(list(tensor.dims))} does not fit its {named(stored)}")


def _check_sizes(value: onnx.ValueInfoProto) -> None:
    """A size of -1 is met in files of several exporters: it is free."""
    where = f"value {named(value.name)}"
    if not value.type.HasField("tensor_type"):
        return
    if value.type.tensor_type.elem_type:
        _dtype(value.type.tensor_type.elem_type, where)
    sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.HasField("dim_value")]
    if any(size < -1 for size in sizes) or abs(math.prod(size or 1 for size in sizes)) > MOST_ENTRIES:
        raise _Fault(f"{where} has impossible sizes {named(sizes)}")


def _dtype(number: int, where: str) -> ir.DataType:
    try:
        found = ir.DataType(number)
    except ValueError:
        found = ir.DataType.UNDEFINED
    if found == ir.DataType.UNDEFINED:
        raise _Fault(f"{where} is of the unknown type {number}")
    return found


def _check_calls(proto: onnx.ModelProto) -> None:
    """Can the functions take the place of their calls, in bounded work?"""
    functions = {_id(function.domain, function.name, function.overload): function for function in proto.functions}
    if len(functions) != len(proto.functions):
        raise _Fault("two of its functions have one name")
    bodies = {key: list(nodes_below(function.node)) for key, function in functions.items()}
    main = list(nodes_below(proto.graph.node))
    called = {key: Counter(_calls(nodes, functions)) for key, nodes in bodies.items()}
    try:
        inner_first = tuple(TopologicalSorter(called).static_order())
    except CycleError as err:
        raise _Fault(f"function {named(err.args[1][0][1])} calls itself") from err
    times = Counter(_calls(main, functions))
    for key in reversed(inner_first):
        for inner, count in called[key].items():
            times[inner] += times[key] * count
    total = len(main) + sum(times[key] * len(nodes) for key, nodes in bodies.items())
    if total > MOST_NODES:
        raise _Fault(
            f"it has {total} nodes after its functions took the place of their calls; at most {MOST_NODES} are read"
        )
    names: Counter[str] = Counter()
    for key, nodes in bodies.items():
        for name in (name for node in nodes for name in (f"node {node.name}", *node.output)):
            names[name] += times[key]
    if sum(count**2 for count in names.values()) // 2 > MOST_NAMES_TRIED:
        raise _Fault("its functions are called too often; inline them with `onnx.inliner.inline_local_functions`")


def _calls(nodes: Iterable[onnx.NodeProto], functions: Iterable[_FunctionId]) -> Iterator[_FunctionId]:
    for node in nodes:
        key = _id(node.domain, node.op_type, node.overload)
        if key in functions:
            yield key


def _id(domain: str, name: str, overload: str) -> _FunctionId:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _once(names: Iterable[str], what: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if not name or name in found:
            raise _Fault(f"{what} {named(name)} is defined twice" if name else f"the name of an {what} is empty")
        found.add(name)
    return found


def _node(node: onnx.NodeProto) -> str:
    return named(node.name or (node.output[0] if node.output else node.op_type))
