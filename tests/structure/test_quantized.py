"""Groups are found among whole numbers: scales and zeros follow, masks put the zero point, and cuts equal masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from support.one_cut import graph, holds

RUNTIME = {"domain": "com.microsoft"}
HEADS, WIDTH, INNER, NEURONS = 6, 4, 10, 9
RNG = np.random.default_rng(1)


def real(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def signed(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def unsigned(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def scales(*shape: int) -> np.ndarray:
    return np.asarray(RNG.random(shape) * 0.01 + 0.005, np.float32)


def byte(value: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.array(value, dtype)


TEXTS = [{"x": real(2, 5, INNER)}, {"x": real(3, 7, INNER)}]
ROWS = [{"x": real(5, INNER)}, {"x": real(7, INNER)}]
PICTURES = [{"x": real(2, 3, 8, 7)}, {"x": real(3, 3, 8, 7)}]
FOUND = {(NEURONS, "neurons"): 1}
STEP = 0.2
"""ONNX Runtime and torch may round one number apart; a step of it shows in the output."""


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Two matrices of whole numbers, with their scales and zeros, and those of activations."""
    return {
        **{"u": signed(INNER, NEURONS), "us": scales(NEURONS), "uz": signed(NEURONS), "b": real(NEURONS)},
        **{"v": signed(NEURONS, INNER), "vs": scales(), "vz": byte(3, np.int8), "u0": np.zeros(NEURONS, np.int8)},
        **{"xs": np.array(0.02, np.float32), "xz": byte(120), "kz": byte(7)},
        **{"ys": np.array(0.05, np.float32), "yz": byte(100)},
    }


def dynamic(source: str, matrix: str, zero: str, scale: str, target: str) -> list[onnx.NodeProto]:
    """A product as dynamic quantisation writes it."""
    whole, step, point, sums, cast, both = (f"{target}.{n}" for n in range(6))
    return [
        node("DynamicQuantizeLinear", [source], [whole, step, point]),
        node("MatMulInteger", [whole, matrix, point, zero], [sums]),
        node("Cast", [sums], [cast], to=1),
        node("Mul", [step, scale], [both]),
        node("Mul", [cast, both], [target]),
    ]


def test_products_that_are_quantized_by_their_range(weights: dict[str, np.ndarray]) -> None:
    """What a cut takes away must not count for the range, so a mask belongs in front of it too."""
    nodes = [
        *dynamic("x", "u", "uz", "us", "h"),
        node("Add", ["h", "b"], ["g"]),
        node("Gelu", ["g"], ["k"]),
        *dynamic("k", "v", "vz", "vs", "out"),
    ]
    layout = holds(graph(nodes, weights, TEXTS[0]), TEXTS, FOUND, atol=STEP)
    (group,) = layout.groups
    assert [layout.structure.network.nodes[site.node].op for site in group.sites] == ["MatMulInteger"]


def test_heads_between_products_that_are_quantized_by_their_range() -> None:
    merged = HEADS * WIDTH
    stored = {name: signed(INNER, merged) for name in "qkv"} | {"o": signed(merged, INNER)}
    nodes = [each for name in "qkv" for each in dynamic("x", name, "z", "s", name.upper())]
    nodes += [
        node("MultiHeadAttention", ["Q", "K", "V"], ["a"], num_heads=HEADS, **RUNTIME),
        *dynamic("a", "o", "z", "s", "out"),
    ]
    model = graph(nodes, {**stored, "z": byte(0, np.int8), "s": scales()}, TEXTS[0])
    holds(model, TEXTS, {(HEADS, "heads"): 1, (WIDTH, "v-width"): 1}, atol=STEP)


def test_products_between_quantizing_and_back(weights: dict[str, np.ndarray]) -> None:
    def there_and_back(name: str, target: str) -> list[onnx.NodeProto]:
        return [
            node("QuantizeLinear", [name, "xs", "xz"], [f"{name}.whole"]),
            node("DequantizeLinear", [f"{name}.whole", "xs", "xz"], [target]),
        ]

    nodes = [
        *there_and_back("x", "xd"),
        node("DequantizeLinear", ["u", "us", "uz"], ["ud"], axis=1),
        node("MatMul", ["xd", "ud"], ["h"]),
        node("Add", ["h", "b"], ["g"]),
        node("Relu", ["g"], ["k"]),
        *there_and_back("k", "kd"),
        node("DequantizeLinear", ["v", "vs", "vz"], ["vd"]),
        node("MatMul", ["kd", "vd"], ["out"]),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, FOUND, atol=STEP)


def test_products_whose_weights_are_quantized_by_blocks() -> None:
    weights = {"u": signed(INNER, 12), "us": scales(5, 12), "v": signed(12, INNER), "vs": scales(4, INNER)}
    nodes = [
        node("DequantizeLinear", ["u", "us"], ["ud"], axis=0, block_size=2),
        node("MatMul", ["x", "ud"], ["h"]),
        node("Relu", ["h"], ["k"]),
        node("DequantizeLinear", ["v", "vs", "vz"], ["vd"], axis=0, block_size=3),
        node("MatMul", ["k", "vd"], ["out"]),
    ]
    model = graph(nodes, {**weights, "vz": signed(4, INNER)}, TEXTS[0], version=21)
    holds(model, TEXTS, {(4, "neurons"): 1})


def test_products_of_whole_numbers_without_a_real_one_between(weights: dict[str, np.ndarray]) -> None:
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("QLinearMatMul", ["q", "xs", "xz", "u", "us", "uz", "ys", "yz"], ["h"]),
        node("QLinearLeakyRelu", ["h", "ys", "yz", "xs", "kz"], ["k"], alpha=0.1, **RUNTIME),
        node("QLinearMatMul", ["k", "xs", "kz", "v", "vs", "vz", "ys", "yz"], ["y"]),
        node("DequantizeLinear", ["y", "ys", "yz"], ["out"]),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, FOUND, atol=STEP)
    weights["ub"] = RNG.integers(-99, 99, NEURONS).astype(np.int32)
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("QGemm", ["q", "xs", "xz", "u", "us", "u0", "ub", "ys", "yz"], ["h"], **RUNTIME),
        node("QGemm", ["h", "ys", "yz", "v", "vs", "vz"], ["out"], **RUNTIME),
    ]
    holds(graph(nodes, weights, ROWS[0]), ROWS, FOUND, atol=STEP)


def test_fused_products_that_are_quantized_by_their_range(weights: dict[str, np.ndarray]) -> None:
    nodes = [
        node("DynamicQuantizeMatMul", ["x", "u", "us", "uz", "b"], ["h"], **RUNTIME),
        node("Relu", ["h"], ["k"]),
        node("DynamicQuantizeMatMul", ["k", "v", "vs", "vz"], ["out"], **RUNTIME),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, FOUND, atol=STEP)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
        node("MatMulIntegerToFloat", ["q", "u", "qs", "us", "qz", "uz", "b"], ["h"], **RUNTIME),
        node("Relu", ["h"], ["k"]),
        node("DynamicQuantizeLinear", ["k"], ["p", "ps", "pz"]),
        node("MatMulIntegerToFloat", ["p", "v", "ps", "vs", "pz", "vz"], ["out"], **RUNTIME),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, FOUND, atol=STEP)


def test_attention_that_projects_from_whole_numbers_loses_heads() -> None:
    merged = HEADS * WIDTH
    weights = {"w": signed(INNER, 3 * merged), "b": real(3 * merged), "ws": scales(3 * merged)}
    weights |= {"wz": np.zeros(3 * merged, np.int8), "o": real(merged, INNER)}
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
        node("QAttention", ["q", "w", "b", "qs", "ws", "", "qz", "wz"], ["a"], num_heads=HEADS, **RUNTIME),
        node("MatMul", ["a", "o"], ["out"]),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, {(HEADS, "heads"): 1}, atol=STEP)


def test_channels_of_whole_numbers() -> None:
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    weights = {
        **{"a": signed(8, 3, 3, 3), "as": scales(8), "a0": np.zeros(8, np.int8), "c": signed(8, 1, 3, 3)},
        **{"ab": RNG.integers(-99, 99, 8).astype(np.int32), "e": signed(4, 16, 1, 1), "es": scales()},
        **{"e0": byte(0, np.int8), "xs": np.array(0.02, np.float32), "xz": byte(120), "f": signed(4, 8, 1, 1)},
        **{"ys": np.array(0.05, np.float32), "yz": byte(100)},
    }
    y = ["ys", "yz"]
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("QLinearConv", ["q", "xs", "xz", "a", "as", "a0", *y, "ab"], ["h"], **window),
        node("QLinearConv", ["h", *y, "c", "as", "a0", *y, "ab"], ["d"], group=8, **window),
        node("QLinearAdd", ["h", *y, "d", *y, *y], ["s"], **RUNTIME),
        node("QLinearConcat", [*y, "s", *y, "d", *y], ["both"], axis=1, **RUNTIME),
        node("QLinearConv", ["both", *y, "e", "es", "e0", *y], ["k"], kernel_shape=[1, 1]),
        node("QLinearGlobalAveragePool", ["k", *y, *y], ["p"], **RUNTIME),
        node("DequantizeLinear", ["p", *y], ["out"]),
    ]
    holds(graph(nodes, weights, PICTURES[0]), PICTURES, {(8, "channels"): 1}, atol=STEP)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
        node("ConvInteger", ["q", "a", "qz"], ["h"], **window),
        node("Cast", ["h"], ["cast"], to=1),
        node("Mul", ["cast", "qs"], ["g"]),
        node("Relu", ["g"], ["k"]),
        node("DynamicQuantizeLinear", ["k"], ["p", "ps", "pz"]),
        node("ConvInteger", ["p", "f", "pz"], ["out"], kernel_shape=[1, 1]),
    ]
    holds(graph(nodes, weights, PICTURES[0]), PICTURES, {(8, "channels"): 1}, atol=2000)


@pytest.mark.parametrize(
    ("width", "zeros", "expected"),
    [
        (96, False, {(3, "neurons"): 1}),  # three blocks of 32
        (128, True, {(2, "neurons"): 1}),  # four blocks, whose zero points lie two in a byte
        (96, True, {}),  # the third block shares its byte with nothing
    ],
)
def test_weights_of_a_few_bits_lose_whole_blocks(width: int, zeros: bool, expected: Any) -> None:
    probes = [{"x": real(2, 5, 32)}, {"x": real(3, 7, 32)}]
    blocks = width // 32
    weights = {"u": unsigned(width, 2, 8), "us": scales(width, 2), "v": unsigned(INNER, blocks, 16)}
    weights |= {"vs": scales(INNER, blocks), "ub": real(width)}
    if zeros:
        weights |= {"uz": unsigned(width, 1), "vz": unsigned(INNER, -(-blocks // 2))}
    first: dict[str, Any] = {"N": width, "K": 32, "bits": 4, "block_size": 16, **RUNTIME}
    second: dict[str, Any] = {"N": INNER, "K": width, "bits": 4, "block_size": 32, **RUNTIME}
    nodes = [
        node("MatMulNBits", ["x", "u", "us", "uz" if zeros else "", "", "ub"], ["h"], **first),
        node("Relu", ["h"], ["k"]),
        node("MatMulNBits", ["k", "v", "vs", *(["vz"] if zeros else [])], ["out"], **second),
    ]
    layout = holds(graph(nodes, weights, probes[0]), probes, expected)
    assert expected or any("share a byte" in each.why for each in layout.frozen)


def test_what_is_looked_up_in_a_table_of_whole_numbers_is_no_position_that_layers_share() -> None:
    probes = [{"ids": RNG.integers(0, 11, size)} for size in ((2, 5), (3, 7))]
    weights = {"table": signed(11, INNER), "ts": scales(), "t0": byte(0, np.int8), "g": real(INNER)}
    weights |= {"u": real(INNER, NEURONS), "v": real(NEURONS, INNER)}
    nodes = [
        node("Gather", ["table", "ids"], ["looked"]),
        node("DequantizeLinear", ["looked", "ts", "t0"], ["x"]),
        node("Mul", ["x", "g"], ["scaled"]),
        node("MatMul", ["scaled", "u"], ["h"]),
        node("Relu", ["h"], ["k"]),
        node("MatMul", ["k", "v"], ["y"]),
        node("Add", ["x", "y"], ["out"]),
    ]
    layout = holds(graph(nodes, weights, probes[0]), probes, FOUND)
    assert not layout.structure.taps
