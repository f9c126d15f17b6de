"""Choices, loops, scans and recurrent layers compute what ONNX Runtime computes, and are not followed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Program
from optin_deploy.network.shapes import shapes_of
from optin_deploy.structure.find import find
from support.one_cut import graph, holds, run, tensors
from support.one_node import model_of, ours, same

RNG = np.random.default_rng(0)


def real(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 2).astype(np.float32)


def inner(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Any],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.GraphProto:
    """A subgraph; inputs are given by their types and shapes."""
    stored = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    ports = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    return helper.make_graph(
        nodes, "inner", ports, [helper.make_empty_tensor_value_info(name) for name in outputs], stored
    )


WEIGHTS = {"w": real(4, 4), "v": real(4, 4), "most": np.array(3), "yes": np.array(True)}
COUNTED: dict[str, Any] = {"number": (TensorProto.INT64, []), "going": (TensorProto.BOOL, [])}


def choosing() -> onnx.ModelProto:
    nested = node(
        "If",
        ["big"],
        ["mixed"],
        then_branch=inner([node("MatMul", ["h", "v"], ["m1"])], {}, ["m1"]),
        else_branch=inner([node("Add", ["h", "x"], ["m2"])], {}, ["m2"]),
    )
    first = inner([node("MatMul", ["x", "w"], ["h"]), nested, node("Relu", ["mixed"], ["t"])], {}, ["t"])
    other = inner([node("Mul", ["x", "two"], ["e"])], {}, ["e"], {"two": np.array(2, np.float32)})
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["big"]),
        node("If", ["big"], ["out"], then_branch=first, else_branch=other),
    ]
    return graph(nodes, {**WEIGHTS, "zero": np.array(0, np.float32)}, {"x": real(2, 4)})


def looping(most: str, ends: bool) -> onnx.ModelProto:
    steps = [
        node("MatMul", ["state", "w"], ["next"]),
        node("Cast", ["number"], ["n"], to=TensorProto.FLOAT),
        node("Add", ["next", "n"], ["shown"]),
        node("Less", ["number", "last"], ["on"]) if ends else node("Identity", ["going"], ["on"]),
    ]
    ports = {**COUNTED, "state": (TensorProto.FLOAT, None)}
    body = inner(steps, ports, ["on", "next", "shown"], {"last": np.array(1)})
    nodes = [node("Loop", [most, "yes", "x"], ["out", "all"], body=body)]
    return graph(nodes, WEIGHTS, {"x": real(2, 4)}, outputs=["out", "all"])


def scanning(**form: Any) -> onnx.ModelProto:
    steps = [
        node("MatMul", ["state", "w"], ["m"]),
        node("Add", ["m", "cut"], ["next"]),
        node("Tanh", ["next"], ["shown"]),
    ]
    ports = {"state": (TensorProto.FLOAT, [4]), "cut": (TensorProto.FLOAT, [4])}
    body = inner(steps, ports, ["next", "shown"])
    nodes = [node("Scan", ["start", "x"], ["out", "all"], body=body, num_scan_inputs=1, **form)]
    return graph(nodes, {**WEIGHTS, "start": real(4)}, {"x": real(5, 4)}, outputs=["out", "all"])


SCANS: list[dict[str, Any]] = [
    {},
    {"scan_input_directions": [1], "scan_output_directions": [1]},
    {"scan_output_axes": [1]},
]
MODELS = [choosing(), looping("most", False), looping("", True), *(scanning(**form) for form in SCANS)]


@pytest.mark.parametrize("model", MODELS)
def test_subgraphs_compute_what_onnx_runtime_computes(model: onnx.ModelProto) -> None:
    network = Network(ir.from_proto(model), "a test")
    width = 5 if model.graph.node[0].op_type == "Scan" else 2
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(real(width, 4))}
        for dtype, atol in ((None, 1e-5), (torch.float64, 1e-5)):
            got = Program(network, dtype=dtype)(tensors(feeds)).outputs.values()
            for value, right in zip(got, run(network, feeds), strict=True):
                assert value.dtype == (dtype or torch.float32)
                np.testing.assert_allclose(value, right, atol=atol)


def test_shapes_are_found_where_no_real_number_decides() -> None:
    for model, known in ((looping("most", False), True), (choosing(), False)):
        network = Network(ir.from_proto(model), "a test")
        shapes = shapes_of(network, {"x": torch.zeros(2, 4)})
        assert (shapes.shape("out") == (2, 4)) is known
        assert bool(shapes.problems) is not known


def test_what_a_subgraph_reads_from_around_it_is_an_input_and_stays_whole() -> None:
    model = looping("most", False)
    before = node("MatMul", ["y", "u"], ["x"])
    model.graph.node.insert(0, before)
    model.graph.initializer.append(numpy_helper.from_array(real(3, 4), "u"))
    model.graph.input[0].name = "y"
    model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = 3
    network = Network(ir.from_proto(model), "a test")
    assert network.nodes[1].inputs == ("most", "yes", "x", "w")
    probes = [{"y": torch.from_numpy(real(rows, 3))} for rows in (2, 5)]
    layout = find(network, probes)
    assert not layout.groups
    assert "a subgraph is run as it is" in layout.structure.problems[1]


def test_a_loop_without_an_end_is_refused() -> None:
    body = inner([node("Identity", ["going"], ["on"])], COUNTED, ["on"])
    model = graph([node("Loop", ["", "yes"], [], body=body), node("Relu", ["x"], ["out"])], WEIGHTS, {"x": real(2, 4)})
    with pytest.raises(BadInput, match="takes more than 100000 rounds"):
        Program(Network(ir.from_proto(model), "a test"))({"x": torch.zeros(2, 4)})


def test_all_operators_of_sequences_are_refused() -> None:
    some = ("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength")
    for op in (*some, "SequenceMap", "SplitToSequence", "ConcatFromSequence"):
        with pytest.raises(Unsupported, match="sequences of tensors cannot be run"):
            rows()["", op].flow(None)  # type: ignore[arg-type]


def test_sequences_are_refused_with_what_to_do() -> None:
    model = graph([node("SequenceConstruct", ["x", "x"], ["out"])], {}, {"x": real(2, 4)})
    with pytest.raises(BadInput, match="sequences of tensors cannot be run; export the model with tensors alone"):
        Program(Network(ir.from_proto(model), "a test"))({"x": torch.zeros(2, 4)})


LENGTH, BATCH, INNER, UNITS = 5, 2, 3, 4


@pytest.mark.parametrize(("direction", "sides"), [("forward", 1), ("reverse", 1), ("bidirectional", 2)])
@pytest.mark.parametrize(
    ("op", "gates", "outputs", "form"),
    [
        ("LSTM", 4, 3, {}),
        ("GRU", 3, 2, {}),
        ("GRU", 3, 2, {"linear_before_reset": 1}),
        ("RNN", 1, 2, {}),
    ],
)
def test_recurrent_layers(op: str, gates: int, outputs: int, form: dict[str, Any], direction: str, sides: int) -> None:
    feeds = [real(LENGTH, BATCH, INNER), real(sides, gates * UNITS, INNER), real(sides, gates * UNITS, UNITS)]
    given: dict[str, Any] = {"hidden_size": UNITS, "direction": direction, "outputs": outputs, "version": 14, **form}
    bias, lengths, state = real(sides, 2 * gates * UNITS), np.array([5, 3], np.int32), real(sides, BATCH, UNITS)
    same(op, feeds, **given)
    same(op, [*feeds, bias], **given)
    same(op, [*feeds, bias, lengths, state], **given)
    if op == "LSTM":
        same(op, [*feeds, bias, lengths, state, real(sides, BATCH, UNITS), real(sides, 3 * UNITS)], **given)


@pytest.mark.parametrize(("direction", "sides"), [("forward", 1), ("reverse", 1), ("bidirectional", 2)])
@pytest.mark.parametrize("columns", [False, True])
def test_a_recurrent_layer_of_whole_numbers(direction: str, sides: int, columns: bool) -> None:
    width = 4 * UNITS
    whole = [RNG.integers(-128, 128, (sides, size, width)).astype(np.int8) for size in (INNER, UNITS)]
    shape = (sides, width) if columns else (sides,)
    scale, zero = np.full(shape, 0.01, np.float32), np.full(shape, 0 if columns else 3, np.int8)
    feeds = [real(LENGTH, BATCH, INNER), *whole, real(sides, 2 * width), None, None, None, None]
    form: dict[str, Any] = {"hidden_size": UNITS, "direction": direction, "outputs": 3, "domain": "com.microsoft"}
    same("DynamicQuantizeLSTM", [*feeds, scale, zero, scale * 2, zero], atol=0.01, stored=(1, 2, 8, 9, 10, 11), **form)


def test_recurrent_layers_of_other_forms() -> None:
    plain = [real(LENGTH, BATCH, INNER), real(1, UNITS, INNER), real(1, UNITS, UNITS)]
    same("RNN", plain, hidden_size=UNITS, activations=["Relu"], outputs=2, version=14)
    first = [real(BATCH, LENGTH, INNER), real(1, 4 * UNITS, INNER), real(1, 4 * UNITS, UNITS)]
    same("LSTM", first, hidden_size=UNITS, layout=1, outputs=3, version=14, judges="reference")
    model = model_of("RNN", plain, hidden_size=UNITS, activations=["Affine"], version=14)
    with pytest.raises(NotImplementedError, match="RNN with the activations Affine"):
        ours(model, [torch.from_numpy(feed) for feed in plain])


def test_what_a_recurrent_layer_reads_may_lose_units_but_not_its_own() -> None:
    probes = [{"x": real(LENGTH, BATCH, INNER)}, {"x": real(7, 3, INNER)}]
    weights = {"u": real(INNER, 6), "w": real(1, 4 * UNITS, 6), "r": real(1, 4 * UNITS, UNITS), "o": real(UNITS, 2)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Relu", ["h"], ["k"]),
        node("LSTM", ["k", "w", "r"], ["y"], hidden_size=UNITS),
        node("MatMul", ["y", "o"], ["out"]),
    ]
    layout = holds(graph(nodes, weights, probes[0]), probes, {(6, "neurons"): 1})
    assert any("feed themselves" in each.why for each in layout.frozen)
