"""A hash by which a plan knows its network: of operators, of how they are connected, and of every weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from optin_deploy.network.graph import Network, decoded


def network_hash(network: Network) -> str:
    """Return the sha256 (hex) of a network: inputs, outputs, operators with attributes, and weights in full.

    Values are numbered in the order in which they appear, so that names of intermediate values, which readers and
    exporters make up, do not count. Weights are read one after the other.
    """
    digest, numbers = hashlib.sha256(), dict[str, int]()

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    def say(*words: object) -> None:
        digest.update(f"{words}\n".encode())

    for port in network.inputs:
        say("input", port.name, port.dtype.name, port.shape, number(port.name))
    for node in network.nodes:
        say(node.domain, node.op, node.opset, [number(name) for name in (*node.inputs, *node.outputs)])
        for name, value in sorted(node.attributes.items()):
            say(name, _attribute(value))
    for port in network.outputs:
        say("output", port.name, number(port.name))
    used = [name for name in numbers if name in network.weights]
    for name in used:
        tensor = network.weights[name]
        say("weight", numbers[name], tensor.dtype.name, tuple(tensor.shape.numpy()))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _attribute(value: Any) -> str:
    """Write an attribute down; of graphs inside, their operators and attributes."""
    if isinstance(value, ir.Graph):
        return str([_node(node) for node in value])
    if isinstance(value, ir.TensorProtocol):
        return f"{value.dtype.name} {tuple(value.shape.numpy())} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if isinstance(value, tuple):
        return str([_attribute(each) for each in value])
    return repr(value)


def _node(node: ir.Node) -> tuple[str, str, list[str]]:
    named = sorted(decoded(0, node, {}).attributes.items())
    return node.domain, node.op_type, [f"{name} {_attribute(value)}" for name, value in named]


def _bytes(tensor: ir.TensorProtocol) -> memoryview | bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def hash_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 (hex) of numbers by name, such as scores of groups; in whichever order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        values = np.ascontiguousarray(array, dtype="<f8")
        digest.update(f"{name!r} {values.shape}\n".encode() + values.tobytes())
    return digest.hexdigest()
