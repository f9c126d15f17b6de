"""A map that tells of each place of a picture the mean of its channels, for a convolution: a convolution itself.

Such maps are spatial attention (CBAM, Woo et al., ECCV 2018). A channel that is masked counts 0 in the mean over all,
and so does one that is cut, where each has a weight of its own: one by the number of all. Means that are subtracted or
divided by stay as they are: they normalise the stream, whose channels stay whole.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optin_deploy.network.tensors import stored_in

PASSING = ("Concat", "Unsqueeze", "Identity", "Cast")
"""Operators that maps pass through on their way to a convolution."""
FIRST = (
    "Relu",
    "LeakyRelu",
    "PRelu",
    "Clip",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Gelu",
    "BatchNormalization",
    "Dropout",
)
"""Operators whose first input has as many channels as their result."""
BOTH = ("Add", "Mul")
"""Operators of which one input has, where the other may have but one."""


def convolve_means(graph: ir.Graph) -> None:
    """Put convolutions in place of the means of channels that only convolutions read, in place."""
    for node in [node for node in graph if node.op_type == "ReduceMean" and node.domain == ""]:
        read, made = node.inputs[0], node.outputs[0]
        stored = None if read is None or _axes(node) not in ([1], [-3]) or not _is_map(made) else _filters(read)
        if stored is None:
            continue
        count = stored.shape.numpy()[0]
        values = np.full((1, count, 1, 1), 1 / count, stored.dtype.numpy())
        weight = stored_in(graph, ir.tensor(values), f"{made.name}_of_all")
        nodes = [ir.node("Conv", [read, weight], name=node.name)]
        found = nodes[0].outputs[0]
        if not node.attributes.get_int("keepdims", 1):
            along = stored_in(graph, ir.tensor([1]), f"{made.name}_channels")
            found.name, found.type = f"{made.name}_map", made.type
            nodes.append(ir.node("Squeeze", [found, along], name=f"{node.name}_squeezed"))
            found = nodes[-1].outputs[0]
        found.name, found.type, found.shape = made.name, made.type, made.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [made], [found])


def _filters(value: ir.Value) -> ir.TensorProtocol | None:
    """The weight of a convolution with as many outputs as a picture has channels; None: it is not found."""
    waiting, seen = [value], {value}
    found: list[ir.TensorProtocol] = []
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.domain or (node.op_type not in FIRST and node.op_type not in (*BOTH, "Conv")):
            return None
        held = node.inputs[1].const_value if node.op_type == "Conv" and node.inputs[1] is not None else None
        if node.op_type == "Conv" and (held is None or len(held.shape) != 4):
            return None
        if held is not None:
            found.append(held)
            continue
        read = [each for each in node.inputs[: 2 if node.op_type in BOTH else 1] if each is not None]
        waiting += [each for each in read if each not in seen]
        seen.update(read)
    return max(found, key=lambda each: each.shape.numpy()[0])


def _axes(node: ir.Node) -> list[int] | None:
    """Axes that a reduction runs over; None: they are not known."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    value = node.inputs[1] if len(node.inputs) > 1 else None
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Reshape", "Cast"):
        value = maker.inputs[0]
    held = None if value is None else value.const_value
    return None if held is None else [int(axis) for axis in held.numpy().reshape(-1)]


def _is_map(value: ir.Value) -> bool:
    """Whether only convolutions read a value in the end, and all do so as their picture."""
    readers = value.uses()
    return (
        bool(readers)
        and not value.is_graph_output()
        and all(
            (node.op_type == "Conv" and place == 0) or (node.op_type in PASSING and _is_map(node.outputs[0]))
            for node, place in readers
        )
    )
