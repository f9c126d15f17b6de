"""Names of groups: what a person would call them, the same from every exporter, all different."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.cutting.graph import cut
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read as read_any
from optin_deploy.structure.find import find
from support.tiny_networks import Image, Text, export, made, read

LAYER = (
    "layers.{}.attention: qk-width",
    "layers.{}.attention: heads",
    "layers.{}.attention: v-width",
    "layers.{}.mlp: neurons",
)
TEXT = [*(name.format(layer) for layer in range(2) for name in LAYER), "pooler: neurons"]
IMAGE = [
    "stages.0: channels",
    "stages.0.0: channels",
    "stages.0.1: channels",
    "stages.1: channels",
    "stages.1.1: channels",
]


def names(network: Network) -> list[str]:
    return [group.name for group in find(network).groups]


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_group_is_called_by_the_module_around_all_of_its_weights(dynamo: bool) -> None:
    assert sorted(names(read(made(Text), dynamo=dynamo))) == sorted(TEXT)


def test_scopes_of_nodes_tell_modules_of_weights_with_made_up_names(tmp_path: Path) -> None:
    network = read_any(export(made(Text), tmp_path / "text.onnx"))
    assert any("::" in name for name in network.weights)
    assert sorted(names(network)) == sorted(TEXT)


@pytest.mark.parametrize("dynamo", [True, False])
def test_channels_of_a_stage_are_called_by_what_makes_them_not_by_what_reads_them(dynamo: bool) -> None:
    found = names(read(made(Image), dynamo=dynamo))
    assert len(set(found)) == len(found) == 5
    assert {"stages.0.0: channels", "stages.0.1: channels", "stages.1.1: channels"} <= set(found)


def test_a_cut_network_has_the_same_names() -> None:
    network = read(made(Text))
    layout = find(network)
    keep = {group.name: range(group.units - 1) for group in layout.groups}
    assert names(cut(layout, keep)) == [group.name for group in layout.groups]


def dense(first: str, second: str, *, nodes: tuple[str, str] = ("", "")) -> Network:
    """Two products with these names of weights and nodes, and one of another name."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in ((first, (6, 10)), (second, (10, 4)), ("model.last.weight", (4, 3)))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", first], ["h"], nodes[0]),
            helper.make_node("Relu", ["h"], ["val_9"]),
            helper.make_node("MatMul", ["val_9", second], ["val_10"], nodes[1]),
            helper.make_node("MatMul", ["val_10", "model.last.weight"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 3))],
        weights,
    )
    return read_any(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


@pytest.mark.parametrize(
    ("first", "second", "nodes", "name"),
    [
        ("mlp.up.weight", "mlp.down.weight", ("", ""), "mlp: neurons"),
        ("model.layers.7.up.weight", "model.layers.7.down.weight", ("", ""), "layers.7: neurons"),  # all have `model`
        ("layers.0.up.weight", "layers.1.down.weight", ("", ""), "layers.0: neurons"),  # not `layers`
        ("val_3", "onnx::MatMul_17", ("/mlp/up/MatMul", "/mlp/down/MatMul"), "mlp: neurons"),
        ("w", "v", ("/features/features.0/Conv", "/features/features.2/Conv"), "features.0: neurons"),
        ("dense/kernel:0", "head/kernel:0", ("", ""), "dense: neurons"),
        ("linear_29.w_0", "linear_30.w_0", ("", ""), "linear_29: neurons"),
        ("val_3", "head.weight", ("", ""), "head: neurons 1"),  # only what reads them has a name
        ("dense_weights", "val_4", ("", ""), "dense_weights: neurons"),
        ("val_3", "val_4", ("MatMul_dense", ""), "MatMul_dense: neurons"),
        ("val_3", "val_4", ("", ""), "h: neurons"),
        ("val_3", "val_4", ("node_MatMul_6/MatMulAddFusion", ""), "node_MatMul_6: neurons"),
        ("val_3", "val_4", ("/mlp/up/MatMul/MatMulAddFusion", "/mlp/down/MatMul/MatMulAddFusion"), "mlp: neurons"),
    ],
)
def test_the_best_name_that_is_there_is_taken(first: str, second: str, nodes: tuple[str, str], name: str) -> None:
    assert names(dense(first, second, nodes=nodes))[0] == name


def test_modules_in_the_metadata_of_nodes_are_read() -> None:
    network = dense("val_3", "val_4")
    for node, modules in zip(
        network.model.graph,
        (["", "m", "m.mlp", "m.mlp.up", "linear"], [], ["", "m", "m.mlp", "m.mlp.down", "linear_1"], []),
        strict=True,
    ):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(modules)
    assert names(network)[0] == "m.mlp: neurons"


def test_a_vector_that_converters_joined_names_nothing() -> None:
    """Two biases of zeros are one initializer then, under the name of a layer norm."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("val_1", (6, 6)), ("val_2", (6, 6)), ("embeddings.norm.bias", (6,)))
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "val_1", "embeddings.norm.bias"], ["h"], "/mlp/up/Gemm"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "val_2", "embeddings.norm.bias"], ["y"], "/mlp/down/Gemm"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 6)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    assert names(read_any(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))) == ["up: neurons"]


def test_groups_that_share_a_module_are_counted(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = (6, 10, 11, 12, 4)
    weights = [
        numpy_helper.from_array(generator.standard_normal(pair).astype(np.float32), f"val_{n}")
        for n, pair in enumerate(pairwise(sizes))
    ]
    nodes = []
    for n in range(4):
        nodes.append(helper.make_node("MatMul", ["x" if not n else f"r{n}", f"val_{n}"], [f"m{n}"], "/block/MatMul"))
        nodes.append(helper.make_node("Relu", [f"m{n}"], [f"r{n + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 6))],
        [helper.make_tensor_value_info("r4", TensorProto.FLOAT, ("batch", 4))],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    found = names(read_any(tmp_path / "m.onnx"))
    assert found == ["block: neurons 1", "block: neurons 2", "block: neurons 3"]
