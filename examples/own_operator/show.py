"""A network with an operator of one's own: what is around it stays whole until `pip install .` brings the row."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

import optin_deploy

INPUTS, NEURONS, OUTPUTS = 5, 8, 3


def network() -> onnx.ModelProto:
    """Two products of matrices with the activation Snake between them."""
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal((INPUTS, NEURONS)), draw.standard_normal((NEURONS, OUTPUTS))
    weights = [numpy_helper.from_array(w.astype("float32"), name) for name, w in (("first", first), ("second", second))]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Snake", ["a"], ["b"], domain="my.domain"),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", INPUTS])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", OUTPUTS])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.domain", 1)]
    return helper.make_model(helper.make_graph(nodes, "snake", [x], [y], weights), opset_imports=opsets, ir_version=10)


def main() -> None:
    """Say what can be cut, and cut half of it."""
    dense = network()
    layout = optin_deploy.inspect(dense)
    for node, why in layout.structure.problems.items():
        print(f"not understood: {dense.graph.node[node].op_type}: {why}")
    if not layout.groups:
        print("nothing can be cut: run `pip install .` in this folder, and this script again")
        return
    for group in layout.groups:
        print(f"can be cut: {group.name}, {group.units} of them")
    # Proven before it is returned: it computes what the network computes with the other half masked.
    smaller = optin_deploy.cut(dense, {layout.groups[0].name: range(0, NEURONS, 2)})
    for name, weight in smaller.weights.items():
        print(f"{name}: {tuple(weight.shape)}")


if __name__ == "__main__":
    main()
