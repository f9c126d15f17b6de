"""The files of an ONNX artifact: every data file of the model, and nothing outside of its folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.errors import BadInput
from optin_deploy.network.onnx_data import data_files, remedy


def graph_of(tensors: list[TensorProto]) -> onnx.ModelProto:
    """y = x + every stored tensor."""
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    names = ["x", *(f"s{i}" for i in range(len(tensors) - 1)), "y"]
    nodes = [
        helper.make_node("Add", [before, tensor.name], [after])
        for (before, after), tensor in zip(pairwise(names), tensors, strict=True)
    ]
    return helper.make_model(helper.make_graph(nodes, "g", entries[:1], entries[1:], tensors))


def stored(name: str, location: str, offset: int = 0) -> TensorProto:
    """Four floats that lie in another file."""
    tensor = numpy_helper.from_array(np.ones(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two data files."""
    inside = tmp_path / "folder"
    (inside / "more").mkdir(parents=True)
    for path in (inside / "a.bin", inside / "more" / "b.bin", tmp_path / "outside.bin"):
        path.write_bytes(np.ones(8, np.float32).tobytes())
    return inside


def written(folder: Path, *tensors: TensorProto) -> Path:
    """A model file there."""
    path = folder / "m.onnx"
    path.write_bytes(graph_of(list(tensors)).SerializeToString())
    return path


def test_data_files_are_named_once_each_and_a_whole_file_has_none(folder: Path) -> None:
    path = written(folder, stored("p", "a.bin"), stored("q", "more/b.bin"), stored("r", "a.bin", 16))
    assert data_files(path) == (folder / "a.bin", folder / "more" / "b.bin")
    assert data_files(written(folder, numpy_helper.from_array(np.ones(4, np.float32), "p"))) == ()


@pytest.mark.parametrize(
    ("location", "offset", "said"),
    [
        ("../outside.bin", 0, "outside of the folder"),
        ("link.bin", 0, "outside of the folder"),
        ("/etc/hostname", 0, "outside of the folder"),
        ("gone.bin", 0, "missing"),
        ("more", 0, "missing"),
        ("a.bin", 20, "too few"),
        ("", 0, "outside of the folder"),
    ],
)
def test_data_that_cannot_be_read_is_bad_input(folder: Path, location: str, offset: int, said: str) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "outside.bin")
    with pytest.raises(BadInput, match=said):
        data_files(written(folder, stored("p", "a.bin"), stored("q", location, offset)))


def test_the_next_step_is_the_command_that_makes_the_file(folder: Path) -> None:
    assert "Give an .onnx file" in remedy(folder / "model.onnx")
    (folder / "source.json").write_text("{}")
    assert f"`optin rewrite {folder}`, then `optin build {folder}`" in remedy(folder / "model.onnx")
    assert "--precision fp16`" in remedy(folder / "dense.fp16.onnx")
