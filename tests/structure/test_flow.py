"""How axes flow through each operator: small networks around it are cut, and give what the masked ones give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.proof import prove
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.shapes import shapes_of
from optin_deploy.structure.find import find
from optin_deploy.structure.flow import walk
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs

FREE = {"n": (3, 5), "l": (7, 11), "h": (8, 12)}
"""Sizes of free axes in the two probes."""


class Net:
    """A network that is written down operator by operator: `net.MatMul(x, w(3, 4))` gives the name of the result."""

    def __init__(self, shape: Sequence[int | str], dtype: int, opset: int) -> None:
        self.x, self.shape, self.dtype, self.opset = "x", shape, dtype, opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._names = count()

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(*inputs: str | np.ndarray | list[int] | None, outputs: int = 1, **attributes: Any) -> Any:
            number = next(self._names)
            names = [f"v{number}.{place}" for place in range(outputs)]
            given = [self._name(value, number, place) for place, value in enumerate(inputs)]
            self.nodes.append(helper.make_node(op, given, names, f"node{number}", **attributes))
            return names if outputs > 1 else names[0]

        return call

    def _name(self, value: str | np.ndarray | list[int] | None, number: int, place: int) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        array = np.array(value, np.int64) if isinstance(value, list) else value
        self.weights.append(numpy_helper.from_array(array, f"w{number}.{place}"))
        return f"w{number}.{place}"

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", self.dtype, self.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        values = shapes_of(network_of(made), probes(made)[0])
        for port in made.graph.output:
            free = [f"{port.name}.{axis}" for axis, _ in enumerate(values.shape(port.name) or ())]
            port.CopyFrom(helper.make_tensor_value_info(port.name, TensorProto.FLOAT, free))
        return onnx.shape_inference.infer_shapes(made)


RNG = np.random.default_rng(1)


def w(*shape: int) -> np.ndarray:
    """A weight."""
    return RNG.standard_normal(shape).astype(np.float32)


def p(*shape: int) -> np.ndarray:
    """A weight of positive numbers."""
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


@dataclass(frozen=True)
class Example:
    """A network, and what is to be found in it."""

    name: str
    model: onnx.ModelProto
    units: tuple[int, ...]
    """Sizes of the groups, from small to large."""
    frozen: str
    """Part of the reason why something stays whole."""
    stays: tuple[int, ...]
    """Sizes of groups that cannot lose all of their units."""


def probes(model: onnx.ModelProto) -> list[dict[str, torch.Tensor]]:
    """Two inputs, with other sizes of the free axes."""
    port = model.graph.input[0]
    found = []
    for which in (0, 1):
        shape = [
            FREE[dimension.dim_param][which] if dimension.dim_param else dimension.dim_value
            for dimension in port.type.tensor_type.shape.dim
        ]
        generator = torch.Generator().manual_seed(which)
        whole = port.type.tensor_type.elem_type == TensorProto.INT64
        value = torch.randint(0, 9, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        found.append({"x": value})
    return found


def network_of(model: onnx.ModelProto) -> Network:
    return Network(ir.from_proto(model), "a test")


EXAMPLES: list[Example] = []


def example(
    *units: int,
    frozen: str = "",
    stays: tuple[int, ...] = (),
    shape: Sequence[int | str] = ("n", "l", 6),
    dtype: int = TensorProto.FLOAT,
    opset: int = 20,
) -> Callable[[Callable[[Net], Any]], None]:
    """Note a network by what is to be found in it."""

    def note(build: Callable[[Net], Any]) -> None:
        net = Net(shape, dtype, opset)
        found = build(net)
        model = net.model([found] if isinstance(found, str) else found)
        EXAMPLES.append(Example(build.__name__, model, units, frozen, stays))

    return note


PICTURE = ("n", 3, "h", "h")
SAME = [1, 1, 1, 1]
"""Paddings of a window of 3 x 3 that keep the size of a picture."""


# Element by element.


@example(12)
def a_chain_of_functions(n: Net) -> Any:
    a = n.Add(n.MatMul(n.x, w(6, 12)), w(12))
    return n.MatMul(n.Gelu(n.LeakyRelu(n.Clip(a, w() - 5, w() + 5))), w(12, 4))


@example(12)
def two_branches_are_added(n: Net) -> Any:
    a, b = n.MatMul(n.x, w(6, 12)), n.MatMul(n.x, w(6, 12))
    return n.MatMul(n.Max(n.Add(a, b), n.Mul(a, w(1, 12))), w(12, 4))


@example(12)
def a_gate(n: Net) -> Any:
    return n.MatMul(n.Mul(n.HardSwish(n.MatMul(n.x, w(6, 12))), n.MatMul(n.x, w(6, 12))), w(12, 4))


@example(12)
def a_choice_by_conditions(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    condition = n.Greater(n.x, w())
    there = n.ReduceMax(n.Cast(condition, to=1), [2], keepdims=1)
    return n.MatMul(n.Where(n.Cast(there, to=TensorProto.BOOL), a, n.Where(w(12) > 0, n.Neg(a), w(1, 12))), w(12, 4))


@example(12)
def slopes_of_each_unit(n: Net) -> Any:
    return n.MatMul(n.PRelu(n.MatMul(n.x, w(6, 12)), w(12)), w(12, 4))


@example(5, shape=PICTURE)
def slopes_of_each_channel(n: Net) -> Any:
    return n.Conv(n.PRelu(n.Conv(n.x, w(5, 3, 1, 1)), w(5, 1, 1)), w(4, 5, 3, 3), pads=SAME)


@example(12)
def one_slope_for_all(n: Net) -> Any:
    return n.MatMul(n.PRelu(n.MatMul(n.x, w(6, 12)), w(1)), w(12, 4))


@example(frozen="output")
def an_output_stays_whole(n: Net) -> Any:
    a = n.Relu(n.MatMul(n.x, w(6, 12)))
    return [a, n.MatMul(a, w(12, 4))]


# Products.


@example(12)
def a_weight_on_the_left(n: Net) -> Any:
    turned = n.Transpose(n.x, perm=[0, 2, 1])
    return n.MatMul(w(4, 12), n.Add(n.MatMul(w(12, 6), turned), w(12, 1)))


@example(12)
def a_vector_as_weight(n: Net) -> Any:
    return n.MatMul(n.Relu(n.MatMul(n.x, w(6, 12))), w(12))


@example(4, 5)
def weights_with_a_batch(n: Net) -> Any:
    a = n.MatMul(n.Unsqueeze(n.x, [1]), w(4, 6, 5))
    return n.MatMul(n.Reshape(n.Transpose(a, perm=[0, 2, 1, 3]), [0, 0, 20]), w(20, 7))


@example(8, 12, shape=("n", 6))
def gemm_in_its_forms(n: Net) -> Any:
    a = n.Relu(n.Gemm(n.x, w(12, 6), w(12), transB=1, alpha=0.5, beta=2.0))
    b = n.Relu(n.Gemm(a, w(12, 8), w(1, 8), beta=0.5))
    return n.Gemm(b, w(8, 4), w())


@example(12, shape=(6, "n"))
def gemm_with_its_first_factor_turned(n: Net) -> Any:
    return n.Gemm(n.Gemm(n.x, w(6, 12), w(12), transA=1), w(4, 12), transB=1)


@example(12, shape=(6, "n"))
def gemm_with_units_first(n: Net) -> Any:
    return n.Gemm(n.Gemm(w(6, 12), n.x, w(12, 1), transA=1), w(12, 4), w(4), transA=1)


@example(3, 4)
def sums_by_letters(n: Net) -> Any:
    a = n.Einsum(n.x, w(6, 3, 4), equation="bld,dhk->blhk")
    return n.Einsum(n.Relu(a), w(3, 4, 5), equation="blhk,hkm->blm")


@example(12)
def sums_by_letters_without_a_result(n: Net) -> Any:
    return n.Einsum(n.MatMul(n.x, w(6, 12)), w(12, 5), equation="blk,km")


@example(12)
def sums_by_letters_over_both(n: Net) -> Any:
    a, b = n.MatMul(n.x, w(6, 12)), n.MatMul(n.x, w(6, 12))
    return n.MatMul(n.Unsqueeze(n.Einsum(a, n.Relu(b), equation="blk,bmk->bl"), [2]), w(1, 5))


@example(5, 12)
def sums_by_letters_of_one_factor(n: Net) -> Any:
    a, b = n.MatMul(n.x, w(6, 12)), n.MatMul(n.x, w(6, 5))
    return n.Einsum(n.Relu(a), n.Relu(b), w(3), equation="blk,blm,c->blc")


@example(frozen="Einsum")
def sums_by_letters_of_three_factors(n: Net) -> Any:
    a = n.Relu(n.MatMul(n.x, w(6, 12)))
    return n.Add(n.Einsum(a, w(12, 5), w(12, 5), equation="blk,km,km->blm"), n.MatMul(a, w(12, 5)))


@example(12)
def sums_by_letters_with_dots(n: Net) -> Any:
    return n.Einsum(n.MatMul(n.x, w(6, 12)), w(12, 5), equation="...k,km->...m")


@example(12, shape=PICTURE)
def channels_beside_the_mean_of_all(n: Net) -> Any:
    a = n.Conv(n.x, w(12, 3, 1, 1), w(12))
    sizes = n.ReduceL2(a, [2, 3])
    among = n.Div(sizes, n.Add(n.Div(n.ReduceSum(sizes, [1]), np.float32(12)), np.float32(1e-6)))
    return n.Conv(n.Add(n.Mul(n.Mul(a, among), w(12, 1, 1)), w(12, 1, 1)), w(4, 12, 1, 1))


@example(frozen="ReduceMean", shape=PICTURE)
def channels_beside_the_mean_of_each_place(n: Net) -> Any:
    a = n.Conv(n.x, w(12, 3, 1, 1), w(12))
    return n.Conv(n.Sub(a, n.ReduceMean(a, [1])), w(4, 12, 1, 1))


@example(12, stays=(6,))
def mixed_by_frequencies(n: Net) -> Any:
    mixed = n.DFT(n.Unsqueeze(n.x, [3]), "", np.array(-2))
    real = n.Squeeze(n.Slice(mixed, [0], [1], [3]), [3])
    return n.MatMul(n.Relu(n.MatMul(n.Add(n.x, real), w(6, 12))), w(12, 6))


def attention(n: Net, q: str, k: str, v: str, heads: int, width: int) -> str:
    def split(each: str, perm: list[int]) -> str:
        return str(n.Transpose(n.Reshape(each, [0, 0, heads, width]), perm=perm))

    scores = n.Softmax(n.Mul(n.MatMul(split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1])), p()))
    mixed = n.Transpose(n.MatMul(scores, split(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    return str(n.MatMul(n.Reshape(mixed, [0, 0, heads * width]), w(heads * width, 6)))


@example(3, 4, 4)
def heads(n: Net) -> Any:
    return attention(n, *(n.Add(n.MatMul(n.x, w(6, 12)), w(12)) for _ in range(3)), heads=3, width=4)


@example(3, 4, 4)
def heads_from_one_matrix(n: Net) -> Any:
    parts = n.Split(n.Add(n.MatMul(n.x, w(6, 36)), w(36)), axis=-1, outputs=3, num_outputs=3)
    return attention(n, *parts, heads=3, width=4)


# Shapes.


@example(3, 4)
def splits_and_merges_with_a_free_size(n: Net) -> Any:
    a = n.Reshape(n.MatMul(n.x, w(6, 12)), [0, -1, 3, 4])
    return n.MatMul(n.Reshape(n.Mul(a, w(3, 1)), [0, 0, -1]), w(12, 5))


@example(3, 4)
def splits_with_the_number_of_units_free(n: Net) -> Any:
    a = n.Reshape(n.MatMul(n.x, w(6, 12)), [0, 0, -1, 4])
    return n.MatMul(n.Reshape(n.Mul(a, w(4)), [0, 0, 12]), w(12, 5))


@example(12)
def a_merge_of_batch_and_length(n: Net) -> Any:
    a = n.Reshape(n.MatMul(n.x, w(6, 12)), [-1, 12])
    return n.Reshape(n.Gemm(a, w(12, 10), w(10)), n.Concat(n.Shape(n.x, end=2), [10], axis=0))


@example(3, 4)
def a_computed_shape(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    wanted = n.Concat(n.Shape(a, end=2), [3], n.Div(n.Shape(a, start=2), [3]), axis=0)
    b = n.Mul(n.Reshape(a, wanted), w(3, 1))
    return n.MatMul(n.Reshape(b, n.Shape(a)), w(12, 5))


@example(2, 2, 3)
def splits_twice(n: Net) -> Any:
    a = n.Reshape(n.MatMul(n.x, w(6, 12)), [0, 0, 4, 3])
    b = n.Reshape(a, [0, 0, 2, 2, 3])
    return n.MatMul(n.Reshape(n.Reshape(n.Mul(b, w(2, 1, 1)), [0, 0, 2, 6]), [0, 0, 12]), w(12, 5))


@example(frozen="parts do not match")
def parts_that_do_not_fit(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    one, other = n.Mul(n.Reshape(a, [0, 0, 4, 3]), w(3)), n.Mul(n.Reshape(a, [0, 0, 3, 4]), w(4))
    return n.MatMul(n.Reshape(n.Add(n.Reshape(one, [0, 0, 12]), n.Reshape(other, [0, 0, 12])), [0, 0, 12]), w(12, 5))


@example(2, 6)
def axes_of_one_entry(n: Net) -> Any:
    a = n.Unsqueeze(n.Reshape(n.MatMul(n.x, w(6, 12)), [0, 0, 2, 6]), [2, -1])
    b = n.Squeeze(n.Mul(a, w(2, 6, 1)), [2, 5])
    return n.MatMul(n.Flatten(n.Transpose(b, perm=[1, 0, 2, 3]), axis=2), w(12, 5))


@example(5, shape=("n", 3, 4, 4))
def channels_flattened(n: Net) -> Any:
    return n.Gemm(n.Flatten(n.Conv(n.x, w(5, 3, 2, 2))), w(45, 7), w(7))


@example(2, 2, 3, 3)
def keys_for_several_queries(n: Net) -> Any:
    q = n.Transpose(n.Reshape(n.MatMul(n.x, w(6, 12)), [0, 0, 4, 3]), perm=[0, 2, 1, 3])

    def repeated() -> Any:
        k = n.Transpose(n.Reshape(n.MatMul(n.x, w(6, 6)), [0, 0, 2, 3]), perm=[0, 2, 1, 3])
        length = n.Shape(n.x, start=1, end=2)
        wide = n.Expand(n.Unsqueeze(k, [2]), n.Concat(n.Shape(n.x, end=1), [2], [2], length, [3], axis=0))
        return n.Reshape(wide, n.Concat([0], [4], length, [3], axis=0))

    scores = n.Softmax(n.MatMul(q, n.Transpose(repeated(), perm=[0, 1, 3, 2])))
    mixed = n.Transpose(n.MatMul(scores, repeated()), perm=[0, 2, 1, 3])
    return n.MatMul(n.Reshape(mixed, [0, 0, 12]), w(12, 6))


@example(12)
def an_axis_is_repeated(n: Net) -> Any:
    a = n.MatMul(n.ReduceMean(n.x, [1], keepdims=1), w(6, 12))
    return n.MatMul(n.Add(n.Expand(a, [1, 5, 12]), n.Tile(a, [1, 5, 1])), w(12, 4))


@example(2, 4)
def units_are_repeated(n: Net) -> Any:
    return n.MatMul(n.Mul(n.Tile(n.MatMul(n.x, w(6, 4)), [1, 1, 2]), w(8)), w(8, 5))


@example(12)
def a_tensor_of_a_written_size(n: Net) -> Any:
    zero = n.ConstantOfShape(n.Concat(n.Shape(n.x, end=2), [12], axis=0), value=numpy_helper.from_array(p(1)))
    return n.MatMul(n.Add(n.MatMul(n.x, w(6, 12)), zero), w(12, 4))


# Selections.


@example(3, 4, 5)
def joined_and_split_at_other_places(n: Net) -> Any:
    whole = n.Concat(n.MatMul(n.x, w(6, 3)), n.MatMul(n.x, w(6, 9)), axis=-1)
    one, other = n.Split(n.Relu(whole), [7, 5], axis=2, outputs=2)
    return n.Add(n.MatMul(one, w(7, 4)), n.MatMul(other, w(5, 4)))


@example(6)
def a_gate_from_one_matrix(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    one, other = n.Slice(a, [0], [6], [2]), n.Slice(a, [6], [2**62], [-1])
    return n.MatMul(n.Mul(one, n.Sigmoid(other)), w(6, 4))


@example(6)
def a_gate_by_split_of_equal_parts(n: Net) -> Any:
    one, other = n.Split(n.MatMul(n.x, w(6, 12)), axis=2, outputs=2, num_outputs=2)
    return n.MatMul(n.Mul(one, other), w(6, 4))


@example(5, 7)
def a_slice_by_places_from_the_end(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    first, last = n.Slice(a, [0], [-7], [2]), n.Slice(a, [-7], [12], [2], [1])
    return n.Add(n.MatMul(first, w(5, 4)), n.MatMul(last, w(7, 4)))


@example(4, 4, opset=11)
def a_split_by_attribute(n: Net) -> Any:
    one, other = n.Split(n.MatMul(n.x, w(6, 8)), axis=-1, split=[4, 4], outputs=2)
    return n.Add(n.MatMul(one, w(4, 5)), n.MatMul(n.Relu(other), w(4, 5)))


@example(12, stays=(12,))
def a_slice_of_the_length(n: Net) -> Any:
    return n.MatMul(n.Slice(n.MatMul(n.x, w(6, 12)), [1], [-1], [1], [2]), w(12, 4))


@example(6)
def a_gate_by_every_second_entry(n: Net) -> Any:
    a = n.Add(n.MatMul(n.x, w(6, 12)), w(12))
    one, other = n.Slice(a, [0], [12], [2], [2]), n.Slice(a, [-11], [2**62], [-1], [2])
    return n.MatMul(n.Mul(one, n.Sigmoid(other)), w(6, 4))


@example(4)
def pairs_of_entries_are_turned_by_angles(n: Net) -> Any:
    def turned(weight: np.ndarray) -> Any:
        a = n.Reshape(n.MatMul(n.x, weight), [0, 0, 2, 8])
        even, odd = n.Slice(a, [0], [8], [3], [2]), n.Slice(a, [1], [2**62], [3], [2])
        other = n.Concat(n.Unsqueeze(n.Neg(odd), [4]), n.Unsqueeze(even, [4]), axis=4)
        return n.Add(n.Mul(a, w(8)), n.Mul(n.Reshape(other, [0, 0, 2, 8]), w(8)))

    q, k = turned(w(6, 16)), turned(w(6, 16))
    compared = n.MatMul(n.Transpose(q, perm=[0, 2, 1, 3]), n.Transpose(k, perm=[0, 2, 3, 1]))
    return n.ReduceSum(compared, [1], keepdims=0)


@example(frozen="step")
def a_slice_with_a_step_that_leaves_some(n: Net) -> Any:
    return n.MatMul(n.Slice(n.MatMul(n.x, w(6, 12)), [0], [12], [2], [5]), w(3, 4))


@example(frozen="step")
def a_slice_backwards(n: Net) -> Any:
    return n.MatMul(n.Slice(n.MatMul(n.x, w(6, 12)), [-1], [-13], [2], [-1]), w(12, 4))


@example(3, 4)
def one_of_three_parts_is_picked(n: Net) -> Any:
    a = n.Transpose(n.Reshape(n.MatMul(n.x, w(6, 36)), [0, 0, 3, 3, 4]), perm=[2, 0, 1, 3, 4])
    one, other = n.Gather(a, np.array(0), axis=0), n.Squeeze(n.Gather(a, [2], axis=0), [0])
    b = n.Mul(n.Mul(one, n.Sigmoid(other)), w(3, 1))
    return n.MatMul(n.Reshape(b, [0, 0, 12]), w(12, 5))


@example(frozen="Gather")
def units_are_picked(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    return n.Add(n.MatMul(n.Gather(a, [3, 1, 4, 1, 5], axis=-1), w(5, 4)), n.MatMul(a, w(12, 4)))


@example(5, 8, shape=("n", "l"), dtype=TensorProto.INT64)
def a_table(n: Net) -> Any:
    a = n.Gather(w(9, 8), n.x)
    return n.MatMul(n.Relu(n.MatMul(a, w(8, 5))), w(5, 4))


@example(frozen="GatherElements")
def units_are_picked_for_each_entry(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    places = n.ArgMax(n.x, axis=2, keepdims=1)
    return n.Add(n.MatMul(n.GatherElements(a, places, axis=2), w(1, 5)), n.MatMul(a, w(12, 5)))


@example(frozen="TopK")
def the_largest_units(n: Net) -> Any:
    values, _ = n.TopK(n.MatMul(n.x, w(6, 12)), [4], outputs=2)
    return n.MatMul(values, w(4, 5))


@example(12)
def rows_are_picked(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    b = n.GatherND(a, np.array([[0, 1], [1, 2], [2, 0]]))
    return n.MatMul(n.Concat(b, n.Gather(a, np.array(0), axis=1), axis=0), w(12, 4))


@example(12)
def rows_are_written(n: Net) -> Any:
    a, b = n.MatMul(n.x, w(6, 12)), n.MatMul(w(2, 6), w(6, 12))
    return n.MatMul(n.ScatterND(a, np.array([[0, 1], [1, 2]]), b), w(12, 4))


@example(12)
def a_first_row_is_put_elsewhere(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    first = n.Mul(n.Slice(a, [0], [1], [1]), w(12))
    return n.MatMul(n.ScatterElements(a, n.Expand(np.array(1), n.Shape(first)), first, axis=1), w(12, 4))


@example(frozen="ScatterElements")
def units_are_put_elsewhere(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    first = n.Slice(a, [0], [1], [2])
    return n.MatMul(n.ScatterElements(a, n.Expand(np.array(1), n.Shape(first)), first, axis=2), w(12, 4))


@example(frozen="ScatterElements")
def some_units_are_put_elsewhere(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    part = n.Slice(a, [0, 0], [1, 5], [1, 2])
    return n.MatMul(n.ScatterElements(a, n.Expand(np.array(1), n.Shape(part)), part, axis=1), w(12, 4))


@example(frozen="Trilu")
def a_triangle(n: Net) -> Any:
    return n.MatMul(n.Trilu(n.MatMul(n.x, w(6, 12))), w(12, 4))


# Reductions and normalisations.


@example(12)
def a_mean_of_the_length(n: Net) -> Any:
    a = n.ReduceMean(n.MatMul(n.x, w(6, 12)), [1], keepdims=0)
    return n.Gemm(n.Add(a, n.ReduceMax(n.MatMul(n.x, w(6, 12)), [-2], keepdims=0)), w(12, 4))


@example(frozen="ReduceMean")
def a_mean_of_the_units(n: Net) -> Any:
    a = n.MatMul(n.x, w(6, 12))
    return n.MatMul(n.Sub(a, n.ReduceMean(a, [2])), w(12, 4))


@example(12)
def a_running_sum_of_the_length(n: Net) -> Any:
    return n.MatMul(n.CumSum(n.MatMul(n.x, w(6, 12)), np.array(1)), w(12, 4))


@example(frozen="CumSum")
def a_running_sum_of_the_units(n: Net) -> Any:
    return n.MatMul(n.CumSum(n.MatMul(n.x, w(6, 12)), np.array(-1)), w(12, 4))


@example(frozen="LayerNormalization")
def units_are_normalised(n: Net) -> Any:
    return n.MatMul(n.LayerNormalization(n.MatMul(n.x, w(6, 12)), w(12), w(12)), w(12, 4))


@example(3, frozen="RMSNormalization", opset=23)
def heads_are_normalised(n: Net) -> Any:
    a = n.RMSNormalization(n.Reshape(n.MatMul(n.x, w(6, 12)), [0, 0, 3, 4]), w(4))
    return n.MatMul(n.Reshape(a, [0, 0, 12]), w(12, 5))


@example(frozen="Softmax")
def units_share_a_whole(n: Net) -> Any:
    return n.MatMul(n.Softmax(n.MatMul(n.x, w(6, 12))), w(12, 4))


@example(12)
def the_length_shares_a_whole(n: Net) -> Any:
    return n.MatMul(n.Softmax(n.MatMul(n.x, w(6, 12)), axis=1), w(12, 4))


@example(frozen="Softmax", opset=11)
def all_behind_an_axis_shares_a_whole(n: Net) -> Any:
    return n.MatMul(n.Softmax(n.MatMul(n.x, w(6, 12)), axis=1), w(12, 4))


@example(5, shape=PICTURE)
def a_chain_of_scales(n: Net) -> Any:
    a = n.BatchNormalization(n.Conv(n.x, w(5, 3, 3, 3), pads=SAME), p(5), w(5), w(5), p(5))
    b = n.Relu(n.BatchNormalization(n.Mul(a, w(1, 5, 1, 1)), p(5), w(5), w(5), p(5)))
    return n.Conv(b, w(4, 5, 1, 1), w(4))


@example(5, shape=PICTURE)
def each_channel_is_normalised(n: Net) -> Any:
    a = n.InstanceNormalization(n.Conv(n.x, w(5, 3, 3, 3), pads=SAME), p(5), w(5))
    return n.Conv(n.Relu(a), w(4, 5, 1, 1))


@example(3, frozen="GroupNormalization", shape=PICTURE, opset=21)
def groups_are_normalised(n: Net) -> Any:
    a = n.GroupNormalization(n.Conv(n.x, w(12, 3, 3, 3), pads=SAME), p(12), w(12), num_groups=3)
    return n.Conv(n.Relu(a), w(4, 12, 1, 1))


@example(3, frozen="GroupNormalization", shape=PICTURE, opset=18)
def groups_are_normalised_with_a_scale_each(n: Net) -> Any:
    a = n.GroupNormalization(n.Conv(n.x, w(12, 3, 3, 3), pads=SAME), p(3), w(3), num_groups=3)
    return n.Conv(n.Relu(a), w(4, 12, 1, 1))


@example(3, frozen="InstanceNormalization", shape=PICTURE)
def groups_are_normalised_by_reshapes(n: Net) -> Any:
    a = n.Conv(n.x, w(12, 3, 3, 3), pads=SAME)
    b = n.InstanceNormalization(n.Reshape(a, [0, 3, -1]), np.ones(3, np.float32), np.zeros(3, np.float32))
    return n.Conv(n.Mul(n.Reshape(b, n.Shape(a)), w(12, 1, 1)), w(4, 12, 1, 1))


@example(frozen="LRN", shape=PICTURE)
def neighbours_are_normalised(n: Net) -> Any:
    return n.Conv(n.LRN(n.Conv(n.x, w(5, 3, 3, 3), pads=SAME), size=3), w(4, 5, 1, 1))


# Layers that feed back.


@example(5, 6, frozen="feed themselves", stays=(6,))
def a_layer_that_feeds_back(n: Net) -> Any:
    a = n.Transpose(n.MatMul(n.Relu(n.MatMul(n.x, w(6, 5))), w(5, 6)), perm=[1, 0, 2])
    b, _, _ = n.LSTM(n.Relu(a), w(1, 16, 6), w(1, 16, 4), w(1, 32), hidden_size=4, outputs=3)
    return n.MatMul(n.Squeeze(b, [1]), w(4, 5))


# Pictures.


@example(5, 7, shape=PICTURE)
def convolutions(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(5, 3, 3, 3), w(5), pads=SAME))
    b = n.Relu(n.Conv(n.MaxPool(a, kernel_shape=[2, 2], strides=[2, 2]), w(7, 5, 3, 3), dilations=[1, 1]))
    return n.Conv(n.AveragePool(b, kernel_shape=[2, 2]), w(4, 7, 1, 1), w(4))


@example(5, shape=("n", 3, "h"))
def convolutions_over_one_axis(n: Net) -> Any:
    return n.Conv(n.Relu(n.Conv(n.x, w(5, 3, 3), w(5), pads=[0, 2])), w(4, 5, 3), pads=[1, 1])


@example(5, shape=("n", 3, "h", 4, 4))
def convolutions_over_three_axes(n: Net) -> Any:
    return n.Conv(n.Relu(n.Conv(n.x, w(5, 3, 3, 2, 2), w(5))), w(4, 5, 1, 1, 2))


@example(6, shape=PICTURE)
def each_channel_by_itself(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(6, 3, 1, 1)))
    b = n.Conv(a, w(6, 1, 3, 3), w(6), group=6, pads=SAME)
    return n.Conv(n.Add(n.Relu(b), a), w(4, 6, 1, 1))


@example(2, 6, shape=PICTURE)
def two_channels_from_each(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(6, 3, 1, 1)))
    return n.Conv(n.Relu(n.Conv(a, w(12, 1, 3, 3), w(12), group=6, pads=SAME)), w(4, 12, 1, 1))


@example(2, 4, 6, shape=PICTURE)
def groups_of_channels(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(8, 3, 1, 1), w(8)))
    b = n.Relu(n.Conv(a, w(12, 4, 3, 3), w(12), group=2, pads=SAME))
    return n.Conv(b, w(4, 12, 1, 1), w(4))


@example(2, 2, 3, shape=PICTURE)
def groups_of_channels_are_shuffled(n: Net) -> Any:
    a = n.Conv(n.Conv(n.x, w(4, 3, 1, 1)), w(6, 2, 1, 1), group=2)
    b = n.Transpose(n.Reshape(a, [0, 2, 3, -1]), perm=[0, 2, 1, 3])
    c = n.Reshape(b, n.Concat([0], [6], n.Shape(n.x, start=2), axis=0))
    return n.Conv(n.Relu(c), w(4, 6, 1, 1))


@example(5, 7, shape=PICTURE, stays=(5, 7))
def convolutions_the_other_way(n: Net) -> Any:
    a = n.Relu(n.ConvTranspose(n.x, w(3, 5, 2, 2), w(5), strides=[2, 2]))
    b = n.Relu(n.ConvTranspose(a, w(5, 7, 3, 3), w(7), output_padding=[1, 1], strides=[2, 2], pads=SAME))
    return n.Conv(b, w(4, 7, 1, 1))


@example(2, 4, 6, shape=PICTURE)
def groups_the_other_way(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(8, 3, 1, 1), w(8)))
    b = n.Relu(n.ConvTranspose(a, w(8, 6, 3, 3), w(12), group=2, pads=SAME))
    return n.Conv(b, w(4, 12, 1, 1), w(4))


@example(6, shape=PICTURE)
def each_channel_the_other_way(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(6, 3, 1, 1), w(6)))
    return n.Conv(n.Relu(n.ConvTranspose(a, w(6, 1, 3, 3), group=6, pads=SAME)), w(4, 6, 1, 1), w(4))


@example(2, 5, shape=PICTURE)
def squeeze_and_excite(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(5, 3, 3, 3), w(5), pads=SAME))
    s = n.Relu(n.Conv(n.GlobalAveragePool(a), w(2, 5, 1, 1), w(2)))
    return n.Conv(n.Mul(a, n.HardSigmoid(n.Conv(s, w(5, 2, 1, 1), w(5)))), w(4, 5, 1, 1))


@example(2, 5, shape=PICTURE)
def squeeze_and_excite_by_matrices(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(5, 3, 3, 3), w(5), pads=SAME))
    s = n.Relu(n.Gemm(n.ReduceMean(a, [2, 3], keepdims=0), w(2, 5), w(2), transB=1))
    g = n.Unsqueeze(n.Sigmoid(n.Gemm(s, w(5, 2), w(5), transB=1)), [2, 3])
    return n.Conv(n.Mul(a, g), w(4, 5, 1, 1))


@example(3, 5, 6, shape=PICTURE)
def channels_are_collected(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(5, 3, 1, 1)))
    b = n.Concat(a, n.Conv(a, w(6, 5, 1, 1)), axis=1)
    c = n.Relu(n.BatchNormalization(b, p(11), w(11), w(11), p(11)))
    d = n.Concat(b, n.Conv(c, w(3, 11, 1, 1)), axis=1)
    return n.Conv(n.Relu(d), w(4, 14, 1, 1))


@example(4, 5, shape=PICTURE)
def a_stage_of_residuals(n: Net) -> Any:
    a = n.Relu(n.Conv(n.x, w(5, 3, 1, 1)))
    b = n.Relu(n.Add(a, n.Conv(n.Relu(n.Conv(a, w(4, 5, 1, 1))), w(5, 4, 1, 1), w(5))))
    return n.Conv(b, w(4, 5, 1, 1))


@example(5, shape=PICTURE)
def places_are_padded(n: Net) -> Any:
    a = n.Pad(n.Conv(n.x, w(5, 3, 1, 1)), [0, 0, 1, 2, 0, 0, 0, 1], w())
    return n.Conv(n.Pad(a, [1, 1, 1, 1], None, [2, 3], mode="reflect"), w(4, 5, 3, 3), pads=SAME)


@example(frozen="Pad", shape=PICTURE)
def channels_are_padded(n: Net) -> Any:
    return n.Conv(n.Pad(n.Conv(n.x, w(5, 3, 1, 1)), [0, 1, 0, 0, 0, 2, 0, 0]), w(4, 8, 3, 3))


@example(12)
def the_length_is_padded(n: Net) -> Any:
    return n.MatMul(n.Pad(n.MatMul(n.x, w(6, 12)), [0, 1, 0, 0, 2, 0]), w(12, 4))


@example(5, shape=PICTURE, stays=(5,))
def pictures_are_resized_by_scales(n: Net) -> Any:
    scales = np.array([1, 1, 2, 2], np.float32)
    return n.Conv(n.Resize(n.Conv(n.x, w(5, 3, 1, 1)), None, scales, mode="linear"), w(4, 5, 3, 3))


@example(5, shape=PICTURE, stays=(5,))
def pictures_are_resized_by_sizes(n: Net) -> Any:
    sizes = n.Concat(n.Shape(n.x, end=1), [5, 9, 10], axis=0)
    return n.Conv(n.Resize(n.Conv(n.x, w(5, 3, 1, 1)), None, None, sizes, mode="nearest"), w(4, 5, 3, 3))


@example(5, shape=PICTURE, stays=(5,))
def pictures_are_resized_to_the_size_of_others(n: Net) -> Any:
    a = n.Conv(n.x, w(5, 3, 1, 1))
    sizes = n.Concat(n.Shape(a, end=2), n.Mul(n.Shape(a, start=2), [2]), axis=0)
    return n.Conv(n.Resize(a, None, None, sizes, mode="nearest"), w(4, 5, 3, 3), pads=SAME)


@example(3, shape=PICTURE, stays=(3,))
def channels_become_places(n: Net) -> Any:
    return n.Conv(n.DepthToSpace(n.Conv(n.x, w(12, 3, 1, 1)), blocksize=2), w(4, 3, 3, 3))


@example(3, shape=PICTURE, stays=(3,))
def channels_become_places_in_the_other_order(n: Net) -> Any:
    return n.Conv(n.DepthToSpace(n.Conv(n.x, w(12, 3, 1, 1)), blocksize=2, mode="CRD"), w(4, 3, 3, 3))


@example(5, shape=PICTURE, stays=(5,))
def places_become_channels(n: Net) -> Any:
    return n.Conv(n.SpaceToDepth(n.Conv(n.x, w(5, 3, 1, 1)), blocksize=2), w(4, 20, 3, 3))


@example(3, shape=("n", "l", 6), stays=(3,))
def blocks_become_a_picture(n: Net) -> Any:
    a = n.Transpose(n.MatMul(n.Slice(n.x, [0], [4], [1]), w(6, 12)), perm=[0, 2, 1])
    return n.Conv(n.Col2Im(a, [4, 4], [2, 2], strides=[2, 2]), w(4, 3, 1, 1))


@example(5, shape=PICTURE)
def pictures_are_sampled(n: Net) -> Any:
    grid = n.Tile(RNG.uniform(-1, 1, (1, 2, 3, 2)).astype(np.float32), n.Concat(n.Shape(n.x, end=1), [1, 1, 1], axis=0))
    return n.Conv(n.GridSample(n.Conv(n.x, w(5, 3, 1, 1)), grid), w(4, 5, 1, 1))


@example(5, shape=PICTURE)
def norms_of_windows(n: Net) -> Any:
    a = n.LpPool(n.Conv(n.x, w(5, 3, 1, 1)), kernel_shape=[2, 2])
    return n.Conv(n.Mul(a, n.Add(n.GlobalMaxPool(a), n.GlobalLpPool(a))), w(4, 5, 1, 1))


@example(5, shape=PICTURE)
def patches_become_tokens(n: Net) -> Any:
    a = n.Conv(n.x, w(5, 3, 2, 2), w(5), strides=[2, 2])
    tokens = n.Transpose(n.Reshape(a, [0, 0, -1]), perm=[0, 2, 1])
    first = n.Expand(w(1, 1, 5), n.Concat(n.Shape(n.x, end=1), [1], [5], axis=0))
    return n.MatMul(n.Concat(first, tokens, axis=1), w(5, 4))


# What is asked of every example.


def by_runtime(model: onnx.ModelProto, feeds: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in feeds.items()}))


def with_masks(model: onnx.ModelProto, layout: Layout, keep: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The same graph with a Mul before each contraction that consumes units that go."""
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    nodes = list(masked.graph.node)
    for (index, place), mask in masks(layout, keep).items():
        name = f"mask{index}.{place}"
        masked.graph.initializer.append(numpy_helper.from_array(mask.numpy(), name))
        product = helper.make_node("Mul", [nodes[index].input[place], name], [f"{name}.product"])
        masked.graph.node.insert(list(masked.graph.node).index(nodes[index]), product)
        nodes[index].input[place] = f"{name}.product"
    return masked


def plans(layout: Layout, seed: int) -> dict[str, list[int]]:
    """Some units of every group; the first seed keeps one of each."""
    rng = np.random.default_rng(seed)
    return {
        group.name: sorted(
            rng.choice(group.units, 1 if seed == 0 else rng.integers(1, group.units), replace=False).tolist()
        )
        for group in layout.groups
    }


def agree(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(
        a.shape == b.shape and np.abs(a - b).max() <= 2e-5 * max(1, np.abs(b).max())
        for a, b in zip(one, other, strict=True)
    )


def check(model: onnx.ModelProto, layout: Layout, keep: Mapping[str, Sequence[int]]) -> bool:
    """Assert that a cut network is sound, and gives what the masked one gives: by ONNX Runtime, and in float64."""
    feeds, apart = probes(model), False
    smaller = cut(layout, keep)
    made = ir.to_proto(smaller.model)
    if all(node.op_type != "GroupNormalization" for node in made.graph.node):  # that of opset 18 is not checked
        onnx.checker.check_model(made, full_check=True)
    masked = with_masks(model, layout, keep)
    for each in feeds:
        wanted = by_runtime(masked, each)
        assert agree(by_runtime(made, each), wanted)
        apart |= not agree(by_runtime(model, each), wanted)
        values = shapes_of(smaller, each)
        assert not values.problems
        used = [name for node in smaller.nodes for name in (*node.inputs, *node.outputs) if name]
        assert all(values.tensors[name].numel() or not values.tensors[name].is_floating_point() for name in used)
    prove(layout, keep, smaller, feeds)
    sizes = {leaf: len(units) for leaf, units in layout.leaves(keep).items()}
    if all(sizes.values()):
        assert macs(layout.structure, sizes) == macs(walk(smaller, shapes_of(smaller, feeds[0])))
    return apart


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_right_groups_are_found(example: Example) -> None:
    layout = find(network_of(example.model), probes(example.model))
    assert not layout.structure.problems
    assert sorted(group.units for group in layout.groups) == sorted(example.units)
    reasons = " / ".join(each.why for each in layout.frozen)
    assert example.frozen in reasons


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.units], ids=lambda example: example.name)
def test_what_is_cut_gives_what_is_masked(example: Example) -> None:
    layout = find(network_of(example.model), probes(example.model))
    assert sum(check(example.model, layout, plans(layout, seed)) for seed in range(3))
    for group in layout.groups if len(layout.groups) > 1 else ():
        check(example.model, layout, {group.name: plans(layout, 9)[group.name]})


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.units], ids=lambda example: example.name)
def test_groups_that_lose_all_units_leave_no_tensor_without_entries(example: Example) -> None:
    layout = find(network_of(example.model), probes(example.model))
    for group in layout.groups:
        if group.units in example.stays:
            with pytest.raises(BadInput):
                cut(layout, {group.name: []})
        else:
            check(example.model, layout, {group.name: []})
            if len(layout.groups) > 1:
                check(example.model, layout, {**plans(layout, 5), group.name: []})


# Networks that nobody wrote.


KINDS = (
    *("linear", "act", "residual", "split", "slice", "heads", "shuffle"),
    *("repeat", "conv", "mean", "letters", "join", "join", "linear", "pairs"),
)


def random_network(seed: int) -> onnx.ModelProto:
    """Operators in an order that a seed tells, from an input of six entries to an output of four."""
    rng = np.random.default_rng(seed)
    net = Net(("n", "l", 6), TensorProto.FLOAT, 20)
    values = [("x", 6)]

    def w(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def size() -> int:
        return int(rng.choice([2, 3, 4, 6, 8, 12]))

    def linear(value: str, old: int, new: int) -> str:
        return str(net.Add(net.MatMul(value, w(old, new)), w(new)))

    def factors(number: int) -> tuple[int, int]:
        first = int(rng.choice([n for n in range(1, number + 1) if number % n == 0]))
        return first, number // first

    def step(kind: str, value: str, c: int) -> list[tuple[str, int]]:
        a, b = factors(c)
        at = int(rng.integers(1, c)) if c > 1 else 1
        if kind == "linear":
            return [(linear(value, c, new := size()), new)]
        if kind == "act":
            return [(net.Gelu(value), c)]
        if kind == "residual":
            return [(net.Add(value, linear(net.Relu(linear(value, c, new := size())), new, c)), c)]
        if kind == "split" and c > 1:
            parts = net.Split(value, [at, c - at], axis=-1, outputs=2)
            return [(parts[0], at), (parts[1], c - at)]
        if kind == "slice" and c > 1:
            first, last = net.Slice(value, [0], [at - c], [2]), net.Slice(value, [at - c], [2**40], [-1])
            return [(first, at), (last, c - at)]
        if kind == "pairs" and c % 2 == 0:
            even, odd = (net.Slice(value, [start], [2**40], [-1], [2]) for start in (0, 1))
            turned = net.Concat(net.Unsqueeze(net.Neg(odd), [-1]), net.Unsqueeze(even, [-1]), axis=-1)
            gated = (net.Mul(even, net.Sigmoid(odd)), c // 2)
            return [gated, (net.Add(value, net.Reshape(turned, [0, 0, c])), c)]
        if kind == "heads":
            wide = net.Reshape(value, [0, 0, a, b])
            scaled = net.Mul(wide, w(a, 1) if rng.random() < 0.5 else w(b))
            return [(net.Reshape(scaled, [0, 0, c] if rng.random() < 0.5 else [0, 0, -1]), c)]
        if kind == "shuffle":
            turned = net.Transpose(net.Reshape(value, [0, 0, a, -1]), perm=[0, 1, 3, 2])
            return [(net.Reshape(turned, [0, 0, c]), c)]
        if kind == "repeat" and c < 9:
            return [(net.Tile(value, [1, 1, 2]), 2 * c)]
        if kind == "conv":
            into, group = c // a, a
            turned = net.Transpose(value, perm=[0, 2, 1])
            new = group * int(rng.integers(1, 4))
            out = net.Conv(turned, w(new, into, 3), w(new), group=group, pads=[1, 1])
            return [(net.Transpose(out, perm=[0, 2, 1]), new)]
        if kind == "mean":
            return [(net.Add(value, net.ReduceMean(value, [1])), c)]
        if kind == "norm":
            return [(net.LayerNormalization(value, w(c), w(c)), c)]
        if kind == "pad":
            return [(net.Pad(value, [0, 0, 1, 0, 0, 0]), c + 1)]
        if kind == "letters":
            return [
                (net.Einsum(net.Reshape(value, [0, 0, a, b]), w(a, b, new := size()), equation="nlab,abc->nlc"), new)
            ]
        if kind == "join":
            other, d = values[rng.integers(len(values))]
            if c == d and rng.random() < 0.6:
                return [(net.Add(value, other) if rng.random() < 0.5 else net.Mul(value, net.Sigmoid(other)), c)]
            return [(net.Concat(value, other, axis=2), c + d)] if c + d < 20 else []
        return []

    for _ in range(rng.integers(5, 14)):
        kind = str(rng.choice([*KINDS, *(("norm", "pad") if rng.random() < 0.2 else ())]))
        values.extend(step(kind, *values[max(0, len(values) - 1 - int(rng.integers(0, 3)))]))
    total = linear(*values[-1], 4)
    for value, c in values[-3:-1]:
        total = net.Add(total, linear(value, c, 4))
    return ir.to_proto(RemoveUnusedNodesPass()(ir.from_proto(net.model([total]))).model)


@pytest.mark.parametrize("seed", range(30))
def test_a_random_network_is_cut_right(seed: int) -> None:
    model = random_network(seed)
    layout = find(network_of(model), probes(model))
    assert not layout.structure.problems
    if layout.groups:
        check(model, layout, plans(layout, 0))
        check(model, layout, plans(layout, seed + 1))
    for group in layout.groups:
        with suppress(BadInput):  # where nothing tells how large the result is, one unit stays
            check(model, layout, {**plans(layout, 5), group.name: []})
