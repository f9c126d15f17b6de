"""What the operators' schemas say of types: which ones an input takes, and which one an output has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.runtimes.ort import import_onnxruntime

TYPED_BY = ("to", "dtype", "output_dtype", "output_datatype")
"""Attributes that hold the number of the type of an output which no input tells."""
REPEATED = "Variadic"


@dataclass(frozen=True)
class Formal:
    """One declared input or output."""

    name: str
    kind: str
    """A type such as `tensor(float)`, or the name of a set of types."""
    repeated: bool
    """It may occur several times, as the last one."""
    alike: bool
    """Values in a place that occurs several times have one type."""


@dataclass(frozen=True)
class Signature:
    """The declared types of an operator in a version of its operator set."""

    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]
    allowed: Mapping[str, frozenset[ir.DataType]]
    """Types that each named set has; of tensors."""
    defaults: Mapping[str, Any]
    """Attributes, with their default value or None."""

    def kind(self, place: int, *, output: bool = False) -> str:
        """Name of the set of types, or the type, of an input or output; one of its own for each place of many kinds."""
        formals = self.outputs if output else self.inputs
        if not formals or (place >= len(formals) and not formals[-1].repeated):
            return ""
        formal = formals[min(place, len(formals) - 1)]
        return formal.kind if formal.alike else f"{formal.kind}.{'output' if output else 'input'}{place}"

    def takes(self, kind: str, dtype: ir.DataType) -> bool:
        """May values of this kind have this type?"""
        return dtype in self.allowed.get(kind.split(".")[0], ())


def fixed(kind: str) -> ir.DataType | None:
    """The type that `tensor(int64)` and its like name; None: it is a set of types, or no tensor."""
    return ir.DataType[kind[7:-1].upper()] if kind.startswith("tensor(") else None


def signature(node: ir.Node, opsets: Mapping[str, int]) -> Signature:
    """Find what the operator of a node declares, by versions of the operator sets.

    Raises: BadInput: neither ONNX nor ONNX Runtime knows it.
    """
    found = _declared(node.domain, node.op_type, _version(node, opsets))
    if found is None:
        raise BadInput(
            f"operator {node.domain or 'onnx'}.{node.op_type} (opset {_version(node, opsets)}) is not known, so that "
            "nothing tells which types it takes. Use --precision fp32, or export the model by ONNX's own operators."
        )
    return found


def _version(node: ir.Node, opsets: Mapping[str, int]) -> int:
    return opsets.get("" if node.domain == "ai.onnx" else node.domain, 1)


@cache
def _declared(domain: str, op: str, opset: int) -> Signature | None:
    domain = "" if domain == "ai.onnx" else domain
    if onnx.defs.has(op, opset, domain):
        schema = onnx.defs.get_schema(op, opset, domain)
        defaults = {name: _default(attribute.default_value) for name, attribute in schema.attributes.items()}
        return _signature(schema, "type_str", "is_homogeneous", defaults)
    versions = [schema for schema in _runtime(domain, op) if schema.since_version <= opset]
    if not versions:
        return None
    return _signature(max(versions, key=lambda schema: schema.since_version), "typeStr", "isHomogeneous", {})


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Graphs that a node holds, such as the branches of an If."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def types_of(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Find the types of all values of a graph and of the graphs inside; those that stay unknown are left out."""
    found: dict[ir.Value, ir.DataType] = {}
    _find(graph, graph.opset_imports, found)
    return found


def _find(graph: ir.Graph, opsets: Mapping[str, int], found: dict[ir.Value, ir.DataType]) -> None:
    for value in (*graph.inputs, *graph.initializers.values()):
        dtype = value.dtype if value.const_value is None else value.const_value.dtype
        if dtype is not None:
            found[value] = dtype
    for node in graph:
        inner = subgraphs(node)
        for each in inner:
            _find(each, opsets, found)
        declared = _declared(node.domain, node.op_type, _version(node, opsets))
        for place, value in enumerate(node.outputs):
            if inner:
                dtype = _inner_type(inner, node, place, found)
            else:
                dtype = None if declared is None else _type(declared, node, place, found)
            dtype = dtype or value.dtype
            if dtype is not None:
                found[value] = dtype


def _inner_type(
    graphs: Sequence[ir.Graph], node: ir.Node, place: int, found: Mapping[ir.Value, ir.DataType]
) -> ir.DataType | None:
    """The last outputs of a subgraph are those of its node; a loop's first one tells if it goes on."""
    outputs = graphs[0].outputs[-len(node.outputs) :]
    return found.get(outputs[place]) if place < len(outputs) else None


def _type(declared: Signature, node: ir.Node, place: int, found: Mapping[ir.Value, ir.DataType]) -> ir.DataType | None:
    kind = declared.kind(place, output=True)
    for other, value in enumerate(node.inputs):
        if value is not None and declared.kind(other) == kind and value in found and fixed(kind) is None:
            return found[value]
    allowed = declared.allowed.get(kind, frozenset())
    return fixed(kind) or (next(iter(allowed)) if len(allowed) == 1 else typed_by(declared, node)[1])


def typed_by(declared: Signature, node: ir.Node) -> tuple[str, ir.DataType | None]:
    """Which attribute of a node tells the type of its output, and the type."""
    for name in TYPED_BY:
        number = node.attributes.get_int(name, 0) or declared.defaults.get(name)
        if number:
            return name, ir.DataType(number)
    value = node.attributes.get("value")
    if value is not None and value.type == ir.AttributeType.TENSOR:
        return "value", value.as_tensor().dtype
    return "", ir.DataType.FLOAT if node.op_type == "ConstantOfShape" else None


def _signature(schema: Any, kind: str, alike: str, defaults: Mapping[str, Any]) -> Signature:
    """ONNX and ONNX Runtime hold schemas alike, under names that differ."""

    def formals(listed: Sequence[Any]) -> Iterator[Formal]:
        for each in listed:
            repeated = each.option.name == REPEATED
            yield Formal(each.name, getattr(each, kind), repeated, getattr(each, alike) or not repeated)

    allowed = {
        each.type_param_str: frozenset(filter(None, map(fixed, each.allowed_type_strs)))
        for each in schema.type_constraints
    }
    return Signature(tuple(formals(schema.inputs)), tuple(formals(schema.outputs)), allowed, defaults)


def _default(attribute: onnx.AttributeProto) -> Any:
    return onnx.helper.get_attribute_value(attribute) if attribute.type else None


def _runtime(domain: str, op: str) -> list[Any]:
    """Schemas of ONNX Runtime's own operators."""
    try:
        import_onnxruntime()
    except MissingDependency:
        return []
    return [schema for schema in _runtime_schemas() if (schema.domain, schema.name) == (domain, op)]


@cache
def _runtime_schemas() -> list[Any]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found: list[Any] = get_all_operator_schema()
    return found
