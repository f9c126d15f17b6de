"""Groups that lose all of their units: what is left is what ONNX Runtime computes of the masked graph, at two sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.helper import make_node as node

from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.proof import prove
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from support.one_cut import Feeds, graph, run, tensors

RNG = np.random.default_rng(3)


def real(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


TEXTS = [{"x": real(2, 5, 10)}, {"x": real(3, 7, 10)}]
PICTURES = [{"x": real(2, 3, 13, 11)}, {"x": real(5, 3, 18, 11)}]
SQUARE = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def masked(layout: Layout, keep: Mapping[str, Sequence[int]]) -> Network:
    """The graph with a product in front of each contraction over units that go."""
    model = layout.structure.network.model.clone()
    copies = list(model.graph)
    for number, ((index, place), mask) in enumerate(masks(layout, keep).items()):
        value = ir.Value(name=f"mask{number}", const_value=ir.tensor(mask.numpy()))
        value.shape, value.dtype = ir.Shape(mask.shape), ir.DataType.FLOAT
        model.graph.register_initializer(value)
        product = ir.node("Mul", [copies[index].inputs[place], value])
        model.graph.insert_before(copies[index], product)
        copies[index].replace_input_with(place, product.outputs[0])
    return Network(model, "masked")


def empties(
    nodes: Sequence[onnx.NodeProto], weights: Feeds, probes: Sequence[Feeds], groups: int, refused: Sequence[str] = ()
) -> list[Network]:
    """Empty each group alone, then each two, and all of them; returns the graphs that are left.

    Args: refused: plans that cannot be done, each as the places of its groups.
    """
    model = graph(nodes, weights, probes[0])
    layout = find(Network(ir.from_proto(model), "a test"), [tensors(feeds) for feeds in probes])
    assert len(layout.groups) == groups, [group.name for group in layout.groups]
    found = []
    for count in range(1, groups + 1):
        for places in combinations(range(groups), count):
            keep: dict[str, list[int]] = {layout.groups[place].name: [] for place in places}
            if "".join(map(str, places)) in refused:
                with pytest.raises(BadInput, match="Keep one unit"):
                    cut(layout, keep)
                continue
            smaller = cut(layout, keep)
            assert not [name for name, weight in smaller.weights.items() if 0 in weight.shape.numpy()]
            for feeds in probes:
                expected, dense = run(masked(layout, keep), feeds), run(layout.structure.network, feeds)
                for one, other, before in zip(run(smaller, feeds), expected, dense, strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-5)
                    assert one.shape == other.shape
                    assert np.abs(other - before).max() > 1e-4
            found.append(smaller)
    return found


def operators(network: Network) -> list[str]:
    return [each.op for each in network.nodes]


@pytest.fixture
def kernels() -> dict[str, np.ndarray]:
    """Weights and biases of convolutions that follow each other, and a matrix behind them."""
    return {
        **{"u": real(8, 3, 3, 3), "ub": real(8), "v": real(6, 8, 3, 3), "vb": real(6)},
        **{"w": real(5, 6, 3, 3), "wb": real(5), "g": real(6, 4), "gb": real(4)},
    }


def convolutions(**second: object) -> list[onnx.NodeProto]:
    """Two of them; what the second gives is `b`."""
    return [
        node("Conv", ["x", "u", "ub"], ["a"], **SQUARE),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "v", "vb"], ["b"], **{**SQUARE, **second}),
    ]


def test_a_padded_convolution_reads_the_whole_picture(kernels: dict[str, np.ndarray]) -> None:
    nodes = [
        *convolutions(strides=[2, 2]),
        node("Sigmoid", ["b"], ["br"]),
        node("Conv", ["br", "w", "wb"], ["out"], **SQUARE),
    ]
    first, second, both = empties(nodes, kernels, PICTURES, 2)
    assert operators(first).count("Conv") == 1
    assert operators(first).count("Expand") == 1
    assert "Conv" not in operators(second) + operators(both)


def test_a_concatenation_reads_the_whole_picture(kernels: dict[str, np.ndarray]) -> None:
    nodes = [
        *convolutions(),
        node("Concat", ["b", "x"], ["c"], axis=1),
        node("Conv", ["c", "z"], ["out"], kernel_shape=[1, 1]),
    ]
    first, second, _ = empties(nodes, {**kernels, "z": real(4, 9, 1, 1)}, PICTURES, 2)
    assert "Concat" in operators(first), "the bias of the second is still there"
    assert [each for each in second.nodes if each.op == "Concat" and len(each.inputs) == 1]


def test_a_resize_reads_the_whole_picture(kernels: dict[str, np.ndarray]) -> None:
    nodes = [
        *convolutions(),
        node("Resize", ["b", "", "s"], ["c"], mode="linear"),
        node("Conv", ["c", "w"], ["out"], **SQUARE),
    ]
    weights = {**kernels, "s": np.array([1, 1, 2, 2], np.float32)}
    (first,) = empties(nodes, weights, PICTURES, 2, refused=["1", "01"])
    assert "Expand" in operators(first)


def test_a_pool_over_the_whole_picture_before_a_matrix(kernels: dict[str, np.ndarray]) -> None:
    nodes = [
        *convolutions(strides=[2, 2]),
        node("GlobalAveragePool", ["b"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "g", "gb"], ["out"], beta=0.5),
    ]
    empties(nodes, kernels, PICTURES, 2)


def test_a_pad_and_a_pool_on_the_way_are_counted(kernels: dict[str, np.ndarray]) -> None:
    nodes = [
        *convolutions(pads=[0, 0, 0, 0], dilations=[2, 1]),
        node("Pad", ["b", "amounts"], ["bp"]),
        node("MaxPool", ["bp"], ["p"], kernel_shape=[3, 2], strides=[2, 1]),
        node("Conv", ["p", "w", "wb"], ["out"], **SQUARE),
    ]
    empties(nodes, {**kernels, "amounts": whole(0, 0, 1, 0, 0, 0, 2, 1)}, PICTURES, 2)


def test_a_batch_normalization_and_slopes(kernels: dict[str, np.ndarray]) -> None:
    """Without a bias what is left is zero; its channels are all there, as a BatchNormalization asks."""
    norm = {"s": real(6), "t": real(6), "m": real(6), "n": np.abs(real(6)) + 1, "slope": real(6, 1, 1)}
    nodes = [
        *convolutions()[:2],
        node("Conv", ["ar", "v"], ["b"], **SQUARE),
        node("BatchNormalization", ["b", "s", "t", "m", "n"], ["bn"]),
        node("PRelu", ["bn", "slope"], ["br"]),
        node("Conv", ["br", "w"], ["out"], **SQUARE),
    ]
    empties(nodes, {**kernels, **norm}, PICTURES, 2)


def test_what_is_scaled_for_each_sample_and_added_to_what_is_emptied_too(kernels: dict[str, np.ndarray]) -> None:
    """A scale of one entry for each channel makes nothing whole: both sides of the sum have one entry for a picture."""
    nodes = [
        *convolutions(),
        node("GlobalAveragePool", ["x"], ["p"]),
        node("Conv", ["p", "r"], ["scale"], kernel_shape=[1, 1]),
        node("Mul", ["b", "scale"], ["bs"]),
        node("Conv", ["x", "u2"], ["a2"], **SQUARE),
        node("Tanh", ["a2"], ["a2r"]),
        node("Conv", ["a2r", "v2", "vb"], ["b2"], **SQUARE),
        node("Add", ["bs", "b2"], ["sum"]),
        node("Conv", ["sum", "w"], ["out"], **SQUARE),
    ]
    empties(nodes, {**kernels, "r": real(6, 3, 1, 1), "u2": real(7, 3, 3, 3), "v2": real(6, 7, 3, 3)}, PICTURES, 3)


def test_parts_of_a_split() -> None:
    weights = {"u": real(10, 24), "sizes": whole(9, 8, 7), **{f"v{n}": real(9 - n, 10) for n in range(3)}}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Split", ["h", "sizes"], ["p0", "p1", "p2"], axis=-1),
        *(node("Tanh", [f"p{n}"], [f"t{n}"]) for n in range(3)),
        *(node("MatMul", [f"t{n}", f"v{n}"], [f"y{n}"]) for n in range(3)),
        node("Sum", ["y0", "y1", "y2", "x"], ["out"]),
    ]
    found = [operators(each) for each in empties(nodes, weights, TEXTS, 3)]
    assert [each.count("MatMul") for each in found] == [3, 3, 3, 2, 2, 2, 0]
    assert [each.count("Split") for each in found] == [1, 1, 1, 0, 0, 0, 0]
    assert not any("Expand" in each for each in found)


def test_a_gated_layer_that_adds_to_what_is_there_leaves_only_its_bias() -> None:
    weights = {"u": real(10, 9), "w": real(10, 9), "v": real(9, 10), "b": real(10)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("MatMul", ["x", "w"], ["g"]),
        node("Sigmoid", ["g"], ["s"]),
        node("Mul", ["h", "s"], ["hs"]),
        node("MatMul", ["hs", "v"], ["y"]),
        node("Add", ["y", "b"], ["yb"]),
        node("Add", ["yb", "x"], ["out"]),
    ]
    (small,) = empties(nodes, weights, TEXTS, 1)
    assert operators(small) == ["Add", "Add"]


def viewed(source: str, target: str, like: str, last: str) -> list[onnx.NodeProto]:
    """A Reshape as TorchScript writes a view: batch and length of another value, and a width."""
    return [
        node("Shape", [like], [f"{target}.s"]),
        node("Slice", [f"{target}.s", "0", "2"], [f"{target}.bt"]),
        node("Concat", [f"{target}.bt", last], [f"{target}.n"], axis=0),
        node("Reshape", [source, f"{target}.n"], [target]),
    ]


def test_the_shape_of_an_emptied_value_is_that_before_the_cut() -> None:
    """Matrix products of flattened tokens, whose results are viewed by the shape of what went in."""
    weights = {"u": real(10, 9), "ub": real(9), "v": real(9, 10), "vb": real(10)}
    numbers = {"0": whole(0), "2": whole(2), "9": whole(9), "10": whole(10), "f9": whole(-1, 9), "f10": whole(-1, 10)}
    nodes = [
        node("Reshape", ["x", "f10"], ["x2"]),
        node("Gemm", ["x2", "u", "ub"], ["h2"]),
        *viewed("h2", "h", "x", "9"),
        node("Erf", ["h"], ["k"]),
        node("Reshape", ["k", "f9"], ["k2"]),
        node("Gemm", ["k2", "v", "vb"], ["y2"]),
        *viewed("y2", "y", "k", "10"),
        node("Mul", ["y", "x"], ["out"]),
    ]
    (small,) = empties(nodes, {**weights, **numbers}, TEXTS, 1)
    assert "Gemm" not in operators(small)


def attention(heads: int, width: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Heads behind Reshape and Transpose, with sizes that are computed, and a projection."""
    weights = {name: real(10, heads * width) for name in ("q", "k", "v")}
    numbers = {"0": whole(0), "2": whole(2), "heads": whole(heads, width), "all": whole(heads * width)}
    nodes = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["x", name], [f"{name}1"]),
            *viewed(f"{name}1", f"{name}2", f"{name}1", "heads"),
            node("Transpose", [f"{name}2"], [f"{name}3"], perm=order),
        ]
    nodes += [
        node("MatMul", ["q3", "k3"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "v3"], ["c"]),
        node("Transpose", ["c"], ["ct"], perm=[0, 2, 1, 3]),
        *viewed("ct", "cj", "ct", "all"),
        node("MatMul", ["cj", "o"], ["y"]),
    ]
    return nodes, {**weights, **numbers, "o": real(heads * width, 10), "b": real(10)}


def test_heads_behind_views() -> None:
    """Without widths of queries and keys every token is looked at alike, which is not nothing."""
    nodes, weights = attention(3, 4)
    small = empties([*nodes, node("Add", ["y", "x"], ["out"])], weights, TEXTS, 3)
    left = [operators(each).count("MatMul") for each in small]
    assert left == [3, 0, 0, 0, 0, 0, 0], "without keys three products go, without heads or values all six"


@pytest.mark.parametrize("op", ["BatchNormalization", "PRelu"])
def test_scores_whose_heads_are_read_as_channels(op: str) -> None:
    """Without keys scores are zero, of one entry along the heads too, which have parameters of their own."""
    nodes, weights = attention(3, 4)
    norm = {"s1": real(3), "s2": real(3), "s3": real(3), "s4": np.abs(real(3)) + 1}
    slope = {"s1": real(3, 1, 1)}
    more = norm if op == "BatchNormalization" else slope
    place = next(place for place, each in enumerate(nodes) if each.op_type == "Softmax")
    nodes[place : place + 1] = [node(op, ["s", *more], ["sc"]), node("Softmax", ["sc"], ["p"])]
    empties([*nodes, node("Add", ["y", "x"], ["out"])], {**weights, **more}, TEXTS, 3)


def test_a_width_that_is_divided_by_stays_what_it_was() -> None:
    weights = {"u": real(10, 9), "v": real(9, 10), "b": real(10), "at": np.array(2)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Shape", ["h"], ["s"]),
        node("Gather", ["s", "at"], ["width"]),
        node("Cast", ["width"], ["real"], to=1),
        node("MatMul", ["h", "v"], ["y"]),
        node("Add", ["y", "b"], ["yb"]),
        node("Div", ["yb", "real"], ["yd"]),
        node("Add", ["yd", "x"], ["out"]),
    ]
    empties(nodes, weights, TEXTS, 1)


def test_heads_that_were_the_only_way_to_the_output() -> None:
    nodes, weights = attention(3, 4)
    small = empties([*nodes, node("Add", ["y", "b"], ["out"])], weights, TEXTS, 3)
    assert "Expand" in operators(small[-1])


def test_both_paths_of_a_sum() -> None:
    """Each alone is thin beside the other; together they are not whole."""
    weights = {f"{name}{n}": real(*shape) for n in "12" for name, shape in (("u", (10, 9)), ("v", (9, 10)))}
    paths = [
        each
        for n in "12"
        for each in (
            node("MatMul", ["x", f"u{n}"], [f"h{n}"]),
            node("Gelu", [f"h{n}"], [f"k{n}"]),
            node("MatMul", [f"k{n}", f"v{n}"], [f"y{n}"]),
            node("Add", [f"y{n}", f"b{n}"], [f"yb{n}"]),
        )
    ]
    nodes = [
        *paths,
        node("Add", ["yb1", "yb2"], ["sum"]),
        node("LayerNormalization", ["sum", "s", "t"], ["n"]),
        node("MatMul", ["n", "w"], ["out"]),
    ]
    more = {"b1": real(10), "b2": real(10), "s": real(10), "t": real(10), "w": real(10, 3)}
    one, other, both = empties(nodes, {**weights, **more}, TEXTS, 2)
    assert "Expand" not in operators(one) + operators(other)
    assert operators(both).count("Expand") == 1


def test_sizes_that_nothing_tells_are_asked_for_only_where_something_reads_them() -> None:
    """A pool that rounds up hides the size of what is constant behind it; without the third group nothing needs it."""
    weights = {"u": real(8, 3, 3, 3), "v": real(6, 8, 3, 3), "vb": real(6), "w": real(5, 6, 3, 3), "wb": real(5)}
    nodes = [
        node("Conv", ["x", "u"], ["a"], **SQUARE),
        node("Tanh", ["a"], ["ar"]),
        node("MaxPool", ["ar"], ["p"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("Conv", ["p", "v", "vb"], ["b"], **SQUARE),
        node("MaxPool", ["b"], ["bp"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["bp", "w", "wb"], ["c"], **SQUARE),
        node("Tanh", ["c"], ["cr"]),
        node("Conv", ["cr", "z"], ["d"], kernel_shape=[1, 1]),
        node("Mul", ["d", "y"], ["dy"]),
        node("Add", ["dy", "y"], ["out"]),
    ]
    probes = [{"x": real(2, 3, 13, 11), "y": real(2, 4, 3, 3)}, {"x": real(5, 3, 22, 11), "y": real(5, 4, 5, 3)}]
    empties(nodes, {**weights, "z": real(4, 5, 1, 1)}, probes, 3, refused=["0"])


def test_a_bias_that_is_computed_and_thin_itself() -> None:
    weights = {"u": real(10, 9), "v": real(9, 4), "vb": real(4), "w": real(10, 7), "z": real(7, 4), "zb": real(1, 4)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("Gemm", ["t", "v", "vb"], ["bias"]),
        node("MatMul", ["x", "w"], ["h2"]),
        node("Tanh", ["h2"], ["t2"]),
        node("Gemm", ["t2", "z", "bias"], ["y"], beta=0.5),
        node("Gemm", ["t2", "z", "zb"], ["y2"]),
        node("Mul", ["y", "y2"], ["out"]),
    ]
    empties(nodes, weights, [{"x": real(5, 10)}, {"x": real(7, 10)}], 2)


def test_a_branch_that_reads_around_itself_gets_what_is_whole() -> None:
    double = helper.make_graph([node("Add", ["y", "y"], ["z"])], "then", [], [helper.make_empty_tensor_value_info("z")])
    single = helper.make_graph(
        [node("Identity", ["y"], ["z2"])], "else", [], [helper.make_empty_tensor_value_info("z2")]
    )
    weights = {"u": real(10, 9), "v": real(9, 10), "b": real(10), "limit": np.float32(0)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "v"], ["yn"]),
        node("Add", ["yn", "b"], ["y"]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "limit"], ["positive"]),
        node("If", ["positive"], ["out"], then_branch=double, else_branch=single),
    ]
    (small,) = empties(nodes, weights, TEXTS, 1)
    assert "Expand" in operators(small)


def dynamic(how: str) -> list[onnx.NodeProto]:
    """A product of whole numbers whose range is found on the way; it reads `t` and gives `y`."""
    runtime = {"domain": "com.microsoft"}
    if how == "one":
        return [node("DynamicQuantizeMatMul", ["t", "v", "vs", "", "b"], ["y"], **runtime)]
    quantized = node("DynamicQuantizeLinear", ["t"], ["tq", "ts", "tz"])
    if how == "two":
        return [quantized, node("MatMulIntegerToFloat", ["tq", "v", "ts", "vs", "tz"], ["y"], **runtime)]
    return [
        quantized,
        node("MatMulInteger", ["tq", "v", "tz"], ["sums"]),
        node("Cast", ["sums"], ["cast"], to=1),
        node("Mul", ["ts", "vs"], ["scale"]),
        node("Mul", ["cast", "scale"], ["y"]),
    ]


@pytest.mark.parametrize("how", ["one", "two", "all"])
def test_products_of_whole_numbers(how: str) -> None:
    whole_numbers = RNG.integers(-128, 128, (9, 10)).astype(np.int8)
    weights = {"u": real(10, 9), "v": whole_numbers, "vs": np.array(0.01, np.float32), "b": real(10)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        *dynamic(how),
        node("Add", ["y", "x"], ["out"]),
    ]
    layout = find(Network(ir.from_proto(graph(nodes, weights, TEXTS[0])), "a test"), [tensors(x) for x in TEXTS])
    keep: dict[str, list[int]] = {layout.groups[0].name: []}
    smaller = cut(layout, keep)
    assert prove(layout, keep, smaller, [tensors(feeds) for feeds in TEXTS]).dense > 1e-3
    for feeds in TEXTS:
        np.testing.assert_allclose(run(smaller, feeds)[0], feeds["x"] + (weights["b"] if how == "one" else 0))
