"""`optin inspect`: tables, JSON on stdout alone, and a picture that stays readable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as Photo

import optin_deploy
from optin_deploy.common.formatting import si
from optin_deploy.errors import BadInput
from optin_deploy.reporting import network_picture
from optin_deploy.reporting.network_picture import blocks_of, draw, joined
from optin_deploy.structure.labels import KINDS
from optin_deploy.structure.shares import shares
from support.tiny_checkpoint import Shell, bert
from support.tiny_networks import HEAD, HEADS, NEURONS, Image, Text, export, inputs, made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(made(Text), tmp_path_factory.mktemp("text") / "text.onnx")


def tower(path: Path, layers: int, width: int = 16) -> Path:
    """A file of many layers with two groups each; the last layer is wider."""
    generator, weights, nodes = np.random.default_rng(0), [], []
    for layer in range(layers):
        inner = 2 * width if layer == layers - 1 else width
        for name, shape in (("up", (8, inner)), ("mid", (inner, width)), ("down", (width, 8))):
            values = generator.standard_normal(shape).astype(np.float32)
            weights.append(numpy_helper.from_array(values, f"net.layers.{layer}.{name}.weight"))
        value = "x" if layer == 0 else f"x{layer}"
        for n, name in enumerate(("up", "mid", "down")):
            made_of = value if n == 0 else f"r{layer}.{n - 1}"
            nodes.append(helper.make_node("MatMul", [made_of, f"net.layers.{layer}.{name}.weight"], [f"m{layer}.{n}"]))
            nodes.append(helper.make_node("Relu", [f"m{layer}.{n}"], [f"r{layer}.{n}"]))
        nodes.append(helper.make_node("Add", [value, f"r{layer}.2"], [f"x{layer + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 8))],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ("batch", 8))],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_json_is_all_that_stdout_gets(shell: Shell, text: Path) -> None:
    ran = shell("optin", "inspect", text, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert list(found) == ["groups", "frozen"]
    heads = next(group for group in found["groups"] if group["name"] == "layers.1.attention: heads")
    assert (heads["kind"], heads["units"], heads["width"]) == ("heads", HEADS, HEAD)
    assert 0 < heads["macs"] < 1
    assert 0 < heads["weights"] < 1
    assert {group["kind"] for group in found["groups"]} <= set(KINDS)
    assert all(each["why"] and each["weights"] for each in found["frozen"])


def test_macs_are_those_of_one_sample_at_the_sizes_that_are_named(shell: Shell, tmp_path: Path) -> None:
    path = tower(tmp_path / "tower.onnx", layers=3)  # matrices of 8 x 16, 16 x 16 and 16 x 8, the last twice as wide
    said = shell("optin", "inspect", path).out
    macs = sum(8 * inner + inner * 16 + 16 * 8 for inner in (16, 16, 32))
    assert f"{si(macs)} MACs a sample" in said
    assert "MACs are counted for x 1x8." in said


def test_tables_say_what_can_be_cut_and_what_stays_whole_and_why(shell: Shell, text: Path) -> None:
    ran = shell("optin", "inspect", text)
    assert ran.code == 0
    assert "layers.0.mlp" in ran.out
    assert f"{NEURONS}" in ran.out
    assert "LayerNormalization" in ran.out
    assert "MACs are counted for ids" in ran.out


def test_a_folder_of_a_transformers_model_is_inspected(shell: Shell) -> None:
    ran = shell("optin", "inspect", bert(), "--json")
    assert ran.code == 0, ran.err
    assert {"heads", "neurons"} <= {group["kind"] for group in json.loads(ran.out)["groups"]}


def test_the_library_takes_modules_and_files(text: Path) -> None:
    module = made(Text)
    layout = optin_deploy.inspect(module, inputs(module))
    names = {group.name for group in layout.groups}
    assert names == {group.name for group in optin_deploy.inspect(text).groups}
    assert names == {group.name for group in optin_deploy.inspect(onnx.load(text)).groups}
    in_order = optin_deploy.inspect(module, tuple(inputs(module).values()))
    assert names == {group.name for group in in_order.groups}
    neurons = sum(group.units for group in layout.groups if group.kind == "neurons")
    assert f" {neurons} neurons" in repr(layout)
    assert repr(layout).endswith(f" in {len(layout.groups)} groups>")
    with pytest.raises(BadInput, match="give example inputs"):
        optin_deploy.inspect(module)
    with pytest.raises(BadInput, match="inputs is a tuple; give a dict"):
        optin_deploy.inspect(text, (torch.zeros(1, 4),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shape", "length"), "as in height=64"),
        (("--shape", "length=0"), "possible are 1 to"),
        (("--shape", "length=²"), "as in height=64"),
        (("--shape", "length=5", "--shape", "length=7"), "twice"),
        (("--shape", "width=5"), "no free size"),
        (("--picture", "network.pdf"), "ends in .png"),
    ],
)
def test_options_that_make_no_sense_are_refused(shell: Shell, text: Path, options: tuple[str, ...], said: str) -> None:
    ran = shell("optin", "inspect", text, *options)
    assert ran.code == 2
    assert said in ran.err


def test_a_size_that_is_given_is_taken(shell: Shell, text: Path) -> None:
    ran = shell("optin", "inspect", text, "--shape", "length=11")
    assert ran.code == 0
    assert "x11." in ran.out


def test_a_file_that_is_no_network_is_refused(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    assert shell("optin", "inspect", tmp_path / "bad.onnx").code == 2
    assert shell("optin", "inspect", tmp_path / "absent.onnx").code == 2


# the picture


@pytest.mark.slow
def test_a_picture_is_drawn_again_over_its_own_and_not_over_others(shell: Shell, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "network.png"
    assert shell("optin", "inspect", text, "--picture", picture, "--dry-run").code == 0
    assert not picture.exists()
    for _ in range(2):
        ran = shell("optin", "inspect", text, "--picture", picture, "--json")
        assert ran.code == 0
        json.loads(ran.out)
    Photo.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    ran = shell("optin", "inspect", text, "--picture", tmp_path / "photo.png")
    assert ran.code == 2
    assert (tmp_path / "photo.png").read_bytes() == before
    assert shell("optin", "inspect", text, "--picture", tmp_path / "photo.png", "--force").code == 0
    assert (tmp_path / "photo.png.kept1").read_bytes() == before


def test_bars_are_as_long_as_shares_and_as_coloured_as_kinds(text: Path, tmp_path: Path) -> None:
    layout = optin_deploy.inspect(text)
    draw(layout, tmp_path / "network.png")
    with Photo.open(tmp_path / "network.png") as photo:
        pixels = np.asarray(photo.convert("RGB")).astype(int)
    found = shares(layout)
    for kind in ("heads", "neurons"):
        colour = tuple(int(network_picture.COLOURS[kind][n : n + 2], 16) for n in (1, 3, 5))
        rows = np.count_nonzero(np.abs(pixels - colour).max(-1) <= 2, axis=1)
        longest = max(share.macs for name, share in found.items() if name.endswith(kind))
        bar = rows[rows > 30].max() / longest  # pixels for all MACs
        assert bar == pytest.approx(
            pixels.shape[1] * network_picture.BAR_WIDTH / max(s.macs for s in found.values()), rel=0.06
        )


def test_blocks_are_entries_of_lists_of_layers_in_the_order_of_work(text: Path) -> None:
    blocks = blocks_of(optin_deploy.inspect(text))
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "pooler"]
    assert [name for name, _ in blocks[0].rows] == ["attention", "attention", "attention", "mlp"]
    assert [(block.name, block.alike) for block in joined(blocks)] == [("layers.0", 2), ("pooler", 1)]


def test_many_layers_that_look_the_same_are_one_block_and_columns_bound_the_picture(tmp_path: Path) -> None:
    layout = optin_deploy.inspect(tower(tmp_path / "tower.onnx", 60))
    blocks = joined(blocks_of(layout))
    assert [(block.name, block.alike) for block in blocks] == [("layers.0", 59), ("layers.59", 1)]
    draw(layout, tmp_path / "tower.png")
    with Photo.open(tmp_path / "tower.png") as photo:
        assert max(photo.size) < 1500


def test_many_layers_that_all_differ_are_drawn_in_columns(tmp_path: Path) -> None:
    layout = optin_deploy.inspect(tower(tmp_path / "tower.onnx", 60))
    keep = {group.name: range(group.units - 1 - n % 7) for n, group in enumerate(layout.groups)}
    smaller = optin_deploy.cut(tmp_path / "tower.onnx", keep)
    draw(optin_deploy.inspect(smaller), tmp_path / "tower.png")
    with Photo.open(tmp_path / "tower.png") as photo:
        width, height = photo.size
    assert 2 * height < 3 * width < 12 * height


def test_a_network_without_groups_is_told_and_drawn(shell: Shell, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 8))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "relu.onnx")
    ran = shell("optin", "inspect", tmp_path / "relu.onnx", "--picture", tmp_path / "relu.png")
    assert ran.code == 0, ran.err
    assert "Nothing can be cut in it." in ran.out
    assert (tmp_path / "relu.png").is_file()


def test_an_operator_that_is_not_known_is_a_reason(shell: Shell, tmp_path: Path) -> None:
    path = export(made(Image), tmp_path / "image.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Mystery", "own"
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    ran = shell("optin", "inspect", path)
    assert ran.code == 0, ran.err
    assert "own.Mystery is not known" in ran.out
    frozen = json.loads(shell("optin", "inspect", path, "--json").out)["frozen"]
    assert "Mystery: the operator own.Mystery is not known" in [each["why"] for each in frozen]
    assert [each["why"] for each in frozen] == [each.why for each in optin_deploy.inspect(path).frozen]
    assert "Mystery" not in ran.out[ran.out.index("What stays whole") : ran.out.index("What is not understood")]
