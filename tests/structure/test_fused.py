"""Groups are found through fused nodes, and a cut of them is what their masks are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from support.one_cut import graph, holds

RUNTIME = {"domain": "com.microsoft"}
HEADS, GROUPS, WIDTH, INNER, NEURONS = 6, 3, 4, 10, 9
RNG = np.random.default_rng(1)


def real(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


TEXTS = [{"x": real(2, 5, INNER)}, {"x": real(3, 7, INNER)}]
ROWS = [{"x": real(5, INNER)}, {"x": real(7, INNER)}]
PICTURES = [{"x": real(2, 3, 8, 7)}, {"x": real(3, 3, 8, 7)}]
PLACED = [{**feeds, "places": np.tile(np.arange(feeds["x"].shape[1]), (len(feeds["x"]), 1))} for feeds in TEXTS]
CACHED = [
    {**feeds, "last": np.full(len(feeds["x"]), length - 1, np.int32), "total": np.array([length], np.int32)}
    for feeds, length in zip(TEXTS, (5, 7), strict=True)
]


def projections(heads: int, groups: int, width: int, values: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Queries, keys and values as Q, K and V, and the matrix `o` that comes after attention."""
    weights = {"q": real(INNER, heads * width), "k": real(INNER, groups * width), "v": real(INNER, groups * values)}
    nodes = [node("MatMul", ["x", name], [name.upper()]) for name in weights]
    return nodes, {**weights, "o": real(heads * values, INNER)}


def out(name: str = "a") -> onnx.NodeProto:
    return node("MatMul", [name, "o"], ["out"])


def test_attention_with_its_projections_loses_heads() -> None:
    merged = HEADS * WIDTH
    weights = {"w": real(INNER, 3 * merged), "b": real(3 * merged), "o": real(merged, INNER)}
    nodes = [node("Attention", ["x", "w", "b"], ["a"], num_heads=HEADS, **RUNTIME), out()]
    layout = holds(graph(nodes, weights, TEXTS[0]), TEXTS, {(HEADS, "heads"): 1})
    assert any("inside a fused attention node" in each.why for each in layout.frozen)


def test_attention_that_lists_its_widths_loses_widths_of_values() -> None:
    sizes = [HEADS * WIDTH, HEADS * WIDTH, HEADS * 8]
    weights = {"w": real(INNER, sum(sizes)), "b": real(sum(sizes)), "o": real(sizes[2], INNER)}
    form: dict[str, Any] = {"num_heads": HEADS, "qkv_hidden_sizes": sizes, "unidirectional": 1, **RUNTIME}
    nodes = [node("Attention", ["x", "w", "b"], ["a"], **form), out()]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, {(HEADS, "heads"): 1, (8, "v-width"): 1})


def test_multi_head_attention_with_rotations() -> None:
    nodes, weights = projections(HEADS, HEADS, WIDTH, 8)
    angles = {"cos": real(16, WIDTH // 2), "sin": real(16, WIDTH // 2)}
    rotated = [
        node("RotaryEmbedding", ["Q", "places", "cos", "sin"], ["Qr"], **RUNTIME),
        node("RotaryEmbedding", ["K", "places", "cos", "sin"], ["Kr"], num_heads=HEADS, **RUNTIME),
    ]
    attend = node("MultiHeadAttention", ["Qr", "Kr", "V", "b"], ["a"], num_heads=HEADS, **RUNTIME)
    weights["b"] = real(HEADS * (2 * WIDTH + 8))
    model = graph([*nodes, *rotated, attend, out()], {**weights, **angles}, PLACED[0])
    holds(model, PLACED, {(HEADS, "heads"): 1, (8, "v-width"): 1})


@pytest.mark.parametrize("packed", [False, True])
def test_group_query_attention_loses_groups_and_queries_of_each(packed: bool) -> None:
    width = 16
    nodes, weights = projections(HEADS, GROUPS, width, width)
    weights |= {"cos": real(16, width // 2), "sin": real(16, width // 2)}
    read = ["Q", "K", "V"]
    if packed:
        weights["p"] = np.concatenate([weights.pop(name) for name in "qkv"], 1)
        nodes, read = [node("MatMul", ["x", "p"], ["P"])], ["P", "", ""]
    form: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1, **RUNTIME}
    inputs = [*read, "", "", "last", "total", "cos", "sin"]
    attend = node("GroupQueryAttention", inputs, ["a", "keys", "values"], **form)
    holds(graph([*nodes, attend, out()], weights, CACHED[0]), CACHED, {(GROUPS, "groups"): 1, (2, "queries"): 1})


def test_attention_of_onnx_on_merged_heads() -> None:
    nodes, weights = projections(HEADS, GROUPS, WIDTH, 8)
    attend = node("Attention", ["Q", "K", "V"], ["a"], q_num_heads=HEADS, kv_num_heads=GROUPS, is_causal=1)
    expected = {(GROUPS, "groups"): 1, (2, "queries"): 1, (8, "v-width"): 1}
    holds(graph([*nodes, attend, out()], weights, TEXTS[0], version=23), TEXTS, expected)


@pytest.mark.parametrize("scale", [None, 0.4])
def test_attention_of_onnx_on_split_heads_loses_widths_where_its_scale_is_told(scale: float | None) -> None:
    nodes, weights = projections(HEADS, GROUPS, WIDTH, 8)
    for name, heads, width in (("Q", HEADS, WIDTH), ("K", GROUPS, WIDTH), ("V", GROUPS, 8)):
        weights[f"{name}s"] = np.array([0, 0, heads, width])
        nodes.append(node("Reshape", [name, f"{name}s"], [f"{name}r"]))
        nodes.append(node("Transpose", [f"{name}r"], [f"{name}t"], perm=[0, 2, 1, 3]))
    weights["merged"] = np.array([0, 0, HEADS * 8])
    nodes += [
        node("Attention", ["Qt", "Kt", "Vt"], ["split"], **({} if scale is None else {"scale": scale})),
        node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "merged"], ["a"]),
        out(),
    ]
    expected = {(GROUPS, "groups"): 1, (2, "queries"): 1, (8, "v-width"): 1}
    if scale is not None:
        expected[WIDTH, "qk-width"] = 1
    holds(graph(nodes, weights, TEXTS[0], version=23), TEXTS, expected)


def test_layers_that_share_a_bias_by_distance_lose_heads_on_their_own() -> None:
    merged = HEADS * WIDTH
    weights = {
        **{"table": real(10, HEADS), "scale": real(INNER), "zero": np.array(0), "one": np.array(1)},
        **{"first": np.array([0]), "second": np.array([1])},
    }
    nodes = [
        node("Shape", ["x"], ["size"], start=1, end=2),
        node("Squeeze", ["size"], ["length"]),
        node("Range", ["zero", "length", "one"], ["at"]),
        node("Unsqueeze", ["at", "first"], ["across"]),
        node("Unsqueeze", ["at", "second"], ["down"]),
        node("Sub", ["across", "down"], ["apart"]),
        node("Abs", ["apart"], ["distance"]),
        node("Gather", ["table", "distance"], ["looked"]),
        node("Transpose", ["looked"], ["turned"], perm=[2, 0, 1]),
        node("Unsqueeze", ["turned", "first"], ["bias"]),
    ]
    for layer, source in enumerate(("x", "between")):
        weights |= {f"w{layer}": real(INNER, 3 * merged), f"o{layer}": real(merged, INNER)}
        nodes += [
            node("Attention", [source, f"w{layer}", "", "", "", "bias"], [f"a{layer}"], num_heads=HEADS, **RUNTIME),
            node("MatMul", [f"a{layer}", f"o{layer}"], [f"y{layer}"]),
            node("SimplifiedLayerNormalization", [f"y{layer}", "scale"], ["out" if layer else "between"]),
        ]
    layout = holds(graph(nodes, weights, TEXTS[0]), TEXTS, {(HEADS, "heads"): 2})
    assert len(layout.structure.taps) == 2


def test_heads_that_lie_in_a_cache_of_the_caller_stay_whole() -> None:
    merged = HEADS * WIDTH
    probes = [
        {**feeds, "past": real(2, len(feeds["x"]), HEADS, length, WIDTH)}
        for feeds, length in zip(TEXTS, (3, 4), strict=True)
    ]
    weights = {"w": real(INNER, 3 * merged), "b": real(3 * merged), "o": real(merged, INNER)}
    nodes = [node("Attention", ["x", "w", "b", "", "past"], ["a", "present"], num_heads=HEADS, **RUNTIME), out()]
    layout = holds(graph(nodes, weights, probes[0]), probes, {})
    assert {"input past"} <= {each.why for each in layout.frozen}


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu", "QuickGelu", "Gelu"])
def test_neurons_flow_through_activations_into_normalised_sums(op: str) -> None:
    weights = {"u": real(INNER, NEURONS), "b": real(NEURONS), "v": real(NEURONS, INNER)}
    weights |= {name: real(INNER) for name in ("scale", "shift", "bias")}
    nodes = [
        node("MatMul", ["x", "u"], ["h"]),
        node(op, ["h", "b"] if op in ("BiasGelu", "FastGelu") else ["h"], ["k"], **RUNTIME),
        node("MatMul", ["k", "v"], ["y"]),
        node("SkipLayerNormalization", ["y", "x", "scale", "shift", "bias"], ["out"], **RUNTIME),
    ]
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, {(NEURONS, "neurons"): 1})


def test_neurons_flow_through_fused_products() -> None:
    weights = {"u": real(NEURONS, INNER), "b": real(NEURONS), "v": real(NEURONS, INNER), "c": real(INNER)}
    weights["scale"] = real(INNER)
    nodes = [
        node("FusedMatMul", ["x", "u"], ["h"], transB=1, alpha=0.7, **RUNTIME),
        node("Relu", ["h"], ["k"]),
        node("FusedMatMul", ["k", "v"], ["y"], **RUNTIME),
        node("SkipSimplifiedLayerNormalization", ["y", "x", "scale", "c"], ["out", "", "", "sum"], **RUNTIME),
    ]
    holds(graph(nodes, weights, TEXTS[0], outputs=["out", "sum"]), TEXTS, {(NEURONS, "neurons"): 1})
    leaky = {"activation": "LeakyRelu", "activation_alpha": 0.2}
    nodes = [
        node("FusedGemm", ["x", "u", "b"], ["h"], transB=1, activation="Relu", **RUNTIME),
        node("FusedGemm", ["h", "v", "c"], ["out"], **leaky, **RUNTIME),
    ]
    holds(graph(nodes, weights, ROWS[0]), ROWS, {(NEURONS, "neurons"): 1})


def test_heads_and_widths_flow_through_a_fused_product_of_queries_and_keys() -> None:
    nodes, weights = projections(HEADS, HEADS, WIDTH, WIDTH)
    weights |= {"split": np.array([0, 0, HEADS, WIDTH]), "merged": np.array([0, 0, HEADS * WIDTH])}
    for name in "QKV":
        nodes.append(node("Reshape", [name, "split"], [f"{name}r"]))
        nodes.append(node("Transpose", [f"{name}r"], [f"{name}t"], perm=[0, 2, 1, 3]))
    nodes += [
        node("FusedMatMul", ["Qt", "Kt"], ["scores"], transB=1, alpha=0.5, **RUNTIME),
        node("Softmax", ["scores"], ["weights"]),
        node("MatMul", ["weights", "Vt"], ["z"]),
        node("Transpose", ["z"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "merged"], ["a"]),
        out(),
    ]
    expected = {(HEADS, "heads"): 1, (WIDTH, "qk-width"): 1, (WIDTH, "v-width"): 1}
    holds(graph(nodes, weights, TEXTS[0]), TEXTS, expected)


def test_channels_flow_through_convolutions_with_what_is_added_to_them() -> None:
    weights = {"a": real(8, 3, 3, 3), "b": real(8), "c": real(8, 8, 3, 3), "d": real(8), "e": real(4, 8, 1, 1)}
    form: dict[str, Any] = {"activation": "Relu", "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **RUNTIME}
    nodes = [
        node("FusedConv", ["x", "a", "b"], ["h"], **form),
        node("FusedConv", ["h", "c", "d", "h"], ["y"], **form),
        node("Conv", ["y", "e"], ["out"]),
    ]
    holds(graph(nodes, weights, PICTURES[0]), PICTURES, {(8, "channels"): 1})
