"""Sequences that exporters write for parts of a tensor become a Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.network.normal import normalise


def listed(sizes: object, places: list[int]) -> ir.Model:
    nodes = [helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=-1)]
    nodes += [helper.make_node("SequenceAt", ["parts", f"at{n}"], [f"y{n}"]) for n in range(len(places))]
    stored = [numpy_helper.from_array(np.array(sizes, dtype=np.int64), "sizes")]
    stored += [numpy_helper.from_array(np.array(place, dtype=np.int64), f"at{n}") for n, place in enumerate(places)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7])
    outputs = [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, ["batch", None]) for n in range(len(places))]
    graph = helper.make_graph(nodes, "listed", [x], outputs, stored)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    file = ir.to_proto(model).SerializeToString()
    return list(onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x}))


@pytest.mark.parametrize(("sizes", "places"), [([4, 1, 2], [0, 2]), (3, [0, 1, -1]), (3, [1, 1])])
def test_parts_taken_by_place_are_outputs_of_a_split(sizes: object, places: list[int]) -> None:
    x = np.arange(14, dtype=np.float32).reshape(2, 7)
    model = listed(sizes, places)
    expected = run(model, x)
    normalise(model, "listed")
    assert {node.op_type for node in model.graph} <= {"Split", "Identity"}
    assert [value.name for value in model.graph.outputs] == [f"y{n}" for n in range(len(places))]
    for one, other in zip(run(model, x), expected, strict=True):
        np.testing.assert_array_equal(one, other)
