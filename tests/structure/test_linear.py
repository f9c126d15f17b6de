"""Products as matrices: patches or rows times the matrix are what the node gives, whatever node it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from optin_deploy.network.graph import Network
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.read_onnx import read_proto
from optin_deploy.network.run import Program
from optin_deploy.structure.find import find
from optin_deploy.structure.linear import linear_of
from optin_deploy.structure.solvable import solvable
from optin_deploy.structure.structure import Structure
from support.one_cut import graph

RNG = np.random.default_rng(0)
Arrays = Mapping[str, np.ndarray]


def real(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def structure_of(nodes: Sequence[onnx.NodeProto], weights: Arrays, probe: Arrays) -> Structure:
    network = read_proto(graph(nodes, weights, probe))
    feeds = {name: torch.from_numpy(value) for name, value in probe.items()}
    return find(network, [feeds]).structure


def node_of(network: Network, op: str) -> int:
    return next(node.index for node in network.nodes if node.op == op)


MOVED = [
    helper.make_node("Cast", ["w"], ["cast"], to=1),
    helper.make_node("Transpose", ["cast"], ["turned"], perm=[1, 0]),
    helper.make_node("Identity", ["turned"], ["same"]),
    helper.make_node("MatMul", ["x", "same"], ["out"]),
]
CASES: dict[str, tuple[list[onnx.NodeProto], Arrays, np.ndarray]] = {
    "MatMul": ([helper.make_node("MatMul", ["x", "w"], ["out"])], {"w": real(6, 4)}, real(2, 5, 6)),
    "MatMul, weight first": ([helper.make_node("MatMul", ["w", "x"], ["out"])], {"w": real(4, 6)}, real(2, 6, 5)),
    "MatMul, weight of three axes": (
        [helper.make_node("MatMul", ["x", "w"], ["out"])],
        {"w": real(1, 6, 4)},
        real(2, 5, 6),
    ),
    "MatMul behind Cast, Transpose and Identity": (MOVED, {"w": real(4, 6, dtype=np.float16)}, real(2, 5, 6)),
    "Gemm": (
        [helper.make_node("Gemm", ["x", "w"], ["out"], transB=1, alpha=0.5)],
        {"w": real(4, 6)},
        real(3, 6),
    ),
    "FusedMatMul": (
        [helper.make_node("FusedMatMul", ["x", "w"], ["out"], transB=1, alpha=2.0, domain="com.microsoft")],
        {"w": real(4, 6)},
        real(2, 5, 6),
    ),
    "Conv of 1 x 1": ([helper.make_node("Conv", ["x", "w"], ["out"])], {"w": real(4, 6, 1, 1)}, real(2, 6, 5, 3)),
    "Conv of 1 x 1 in steps": (
        [helper.make_node("Conv", ["x", "w"], ["out"], strides=[2, 1])],
        {"w": real(4, 6, 1, 1)},
        real(2, 6, 5, 3),
    ),
    "Conv of 3 x 2, in steps, spread and padded": (
        [helper.make_node("Conv", ["x", "w"], ["out"], strides=[2, 1], dilations=[1, 2], pads=[1, 0, 0, 2])],
        {"w": real(4, 6, 3, 2)},
        real(2, 6, 7, 8),
    ),
    "Conv along one axis, padded to the same size": (
        [helper.make_node("Conv", ["x", "w"], ["out"], auto_pad="SAME_UPPER")],
        {"w": real(4, 6, 4)},
        real(2, 6, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_times_the_matrix_are_what_the_node_gives(case: str) -> None:
    nodes, weights, x = CASES[case]
    structure = structure_of(nodes, weights, {"x": x})
    node = structure.network.nodes[-1]
    linear = linear_of(structure, node)
    read = torch.from_numpy(x)
    given = Program(structure.network)({"x": read}).outputs["out"]
    matrix = linear.matrix(torch.from_numpy(weights["w"])).float() * linear.factor
    expected = linear.rows_in(read, len(x)) @ matrix.T
    found = linear.rows_out(given, len(x))
    assert found.shape == (len(x), linear.places(given, len(x)), 4)
    assert torch.allclose(found, expected, atol=1e-5)
    some = torch.tensor([expected.shape[1] - 1, 0])
    assert torch.equal(linear.rows_in(read, len(x), some), linear.rows_in(read, len(x))[:, some])
    assert torch.equal(linear.rows_out(given, len(x), some), found[:, some])


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_into_the_matrix_is_written_into_the_stored_tensor(case: str) -> None:
    nodes, weights, x = CASES[case]
    structure = structure_of(nodes, weights, {"x": x})
    linear = linear_of(structure, structure.network.nodes[-1])
    stored = torch.from_numpy(weights["w"].copy())
    linear.matrix(stored)[1, 2] += 1
    name = linear.stored.name
    before, after = (
        linear.rows_out(Program(structure.network)({"x": torch.from_numpy(x), name: each}).outputs["out"], len(x))
        for each in (torch.from_numpy(weights["w"]), stored)
    )
    expected = linear.factor * linear.rows_in(torch.from_numpy(x), len(x))[..., 2]
    assert torch.allclose((after - before)[..., 1], expected, atol=2e-3 if stored.dtype is torch.float16 else 1e-5)
    assert torch.equal(after[..., 0], before[..., 0])


def test_samples_that_lie_along_the_second_axis_come_first_in_the_rows() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["turned", "w"], ["out"]),
    ]
    x = real(2, 5, 6)
    structure = structure_of(nodes, {"w": real(6, 4)}, {"x": x})
    linear = linear_of(structure, structure.network.nodes[1])
    assert torch.equal(linear.rows_in(torch.from_numpy(x.transpose(1, 0, 2)), 2), torch.from_numpy(x))


REFUSED: dict[str, tuple[list[onnx.NodeProto], Arrays, np.ndarray, str]] = {
    "shared": (
        [
            helper.make_node("MatMul", ["x", "w"], ["once"]),
            helper.make_node("MatMul", ["once", "w"], ["out"]),
        ],
        {"w": real(6, 6)},
        real(2, 5, 6),
        "several nodes",
    ),
    "of 8 bits": (
        [
            helper.make_node("DequantizeLinear", ["w", "scale"], ["real"]),
            helper.make_node("MatMul", ["x", "real"], ["out"]),
        ],
        {"w": np.ones((6, 4), np.int8), "scale": np.array(0.1, np.float32)},
        real(2, 5, 6),
        "DequantizeLinear",
    ),
    "of several matrices": (
        [helper.make_node("MatMul", ["x", "w"], ["out"])],
        {"w": real(2, 6, 4)},
        real(2, 5, 6),
        "more than one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_products_are_refused_with_the_reason(case: str) -> None:
    nodes, weights, x, why = REFUSED[case]
    structure = structure_of(nodes, weights, {"x": x})
    product = next(node for node in structure.network.nodes if node.op in ("MatMul", "Conv"))
    with pytest.raises(Unsupported, match=why):
        linear_of(structure, product)


@pytest.mark.parametrize(
    ("nodes", "bias", "place"),
    [
        ([helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["out"])], (4,), (1, 0)),
        ([helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["out"])], (5, 1), None),
    ],
    ids=["of outputs", "of places"],
)
def test_a_vector_behind_a_product_shifts_it_where_its_entries_are_the_outputs(
    nodes: list[onnx.NodeProto], bias: tuple[int, ...], place: tuple[int, int] | None
) -> None:
    structure = structure_of(nodes, {"w": real(6, 4), "b": real(*bias)}, {"x": real(2, 5, 6)})
    shift = solvable(structure, 0).shift
    assert (None if shift is None else shift.place) == place


ZEROS = [
    helper.make_node("Shape", ["w"], ["sizes"], end=1),
    helper.make_node("Expand", ["zero", "sizes"], ["zeros"]),
]
"""What torch's exporter adds to a convolution without bias: it reads the weight's shape, no entry."""


@pytest.mark.parametrize("before", [[], ZEROS], ids=["no vector", "zeros made of the weight's shape"])
def test_a_batch_norm_shifts_a_convolution_without_bias(before: list[onnx.NodeProto]) -> None:
    nodes = [
        *before,
        helper.make_node("Conv", ["x", "w", *(["zeros"] if before else [])], ["p"]),
        helper.make_node("BatchNormalization", ["p", "scale", "b", "mean", "variance"], ["out"]),
    ]
    weights = {name: np.abs(real(4)) + 0.5 for name in ("scale", "b", "mean", "variance")} | {"w": real(4, 6, 1, 1)}
    weights |= {"zero": np.zeros((), np.float32)} if before else {}
    structure = structure_of(nodes, weights, {"x": real(2, 6, 5, 5)})
    product = len(before)
    found = solvable(structure, product)
    assert found.shift is not None
    assert (found.shift.place, found.shift.value, found.way.scale) == ((product + 1, 2), "out", (product + 1,))


def test_a_stored_tensor_knows_its_type() -> None:
    structure = structure_of(MOVED, {"w": real(4, 6, dtype=np.float16)}, {"x": real(2, 5, 6)})
    linear = linear_of(structure, structure.network.nodes[-1])
    assert structure.network.weights[linear.stored.name].dtype == ir.DataType.FLOAT16
    assert (linear.outputs, linear.inputs) == (4, 6)
