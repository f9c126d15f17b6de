"""A network without nodes that follow from weights alone: their results are weights, computed when they are read."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from torch import Tensor

from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators import rows
from optin_deploy.network.shapes import Shapes, shapes_of
from optin_deploy.network.tensors import DTYPES, torch_tensor

GROWTH = 2
"""A result may take so many times what it follows from: weights that are stored in float16 become float32, but no table
for every pair of positions comes into being."""
SMALL_BYTES = 2**16
"""Results up to this size are always stored."""
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""They tell an engine to compute in integers."""
NUMBERS = {dtype: number for number, dtype in DTYPES.items() if number.bitwidth >= 16 or dtype.itemsize == 1}
"""Types of ONNX, by torch's."""
TIDY = (
    RemoveUnusedNodesPass(),
    IdentityEliminationPass(),
    DeduplicateInitializersPass(),
    CommonSubexpressionEliminationPass(),
    RemoveUnusedNodesPass(),
)
"""Passes of onnx_ir that let equal small weights, and then equal nodes, be one."""


@uncollected()
def folded(network: Network) -> Network:
    """Return a network whose nodes read weights where they read what follows from weights; equal nodes become one.

    torch's exporter leaves, unless it optimises, a Transpose between each product and its weight. Weights that stay are
    shared; new ones are computed one at a time, when the network is written or run.
    """
    shapes = shapes_of(network, {})
    model = network.model.clone()
    stored = {name: weight.nbytes for name, weight in network.weights.items() if weight.dtype in DTYPES}
    for node, copy in zip(network.nodes, list(model.graph), strict=True):
        if not _follows(network, node, stored, shapes):
            continue
        made = sum(shapes.tensors[name].nbytes for name in node.outputs if name)
        if made > max(GROWTH * sum(stored[name] for name in set(node.inputs) if name), SMALL_BYTES):
            continue
        stored.update({name: shapes.tensors[name].nbytes for name in node.outputs if name})
        for value in copy.outputs:
            if value.name and not value.is_graph_output():
                _replace(model.graph, value, _lazy(network, value.name, shapes.tensors[value.name]))
    for each in TIDY:
        each(model)
    return Network(model, network.source)


def _follows(network: Network, node: Node, stored: dict[str, int], shapes: Shapes) -> bool:
    """Can the outputs of a node be computed from what is stored?"""
    if node.domain or node.op in QUANTISED or node.op.startswith("Random"):
        return False
    if any(isinstance(value, ir.Graph) for value in node.attributes.values()):
        return False
    known = [shapes.tensors.get(name) for name in node.outputs if name]
    return (
        ("", node.op) in rows()
        and all(name in stored for name in node.inputs if name)
        and all(isinstance(tensor, Tensor) and tensor.dtype in NUMBERS for tensor in known)
    )


def _replace(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let a weight stand for a value, under its name."""
    new = ir.Value(name=value.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
    new.shape = ir.Shape(tensor.shape.numpy())
    value.replace_all_uses_with(new)
    value.name = f"{value.name}.folded"
    graph.register_initializer(new)


def _lazy(network: Network, name: str, outline: Tensor) -> ir.TensorProtocol:
    dtype = NUMBERS[outline.dtype]

    def read() -> ir.TensorProtocol:
        with torch.inference_mode():
            return ir.tensor_adapters.TorchTensor(_computed(network, name).to(outline.dtype).contiguous(), name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(outline.shape), name=name)


def _computed(network: Network, wanted: str) -> Tensor:
    """Compute a value that follows from weights."""
    values: dict[str, Tensor] = {}
    waiting = [wanted]
    while waiting:
        name = waiting[-1]
        node = network.producer.get(name)
        if name in values or node is None:
            waiting.pop()
            if node is None:
                values[name] = torch_tensor(network.weights[name])
            continue
        missing = [each for each in node.inputs if each and each not in values]
        if missing:
            waiting.extend(missing)
            continue
        found = rows()["", node.op].compute(node, *(values[each] if each else None for each in node.inputs))
        several = found if isinstance(found, tuple) else (found,)
        values.update(
            {each: value for each, value in zip(node.outputs, several, strict=False) if each and value is not None}
        )
    return values[wanted]
