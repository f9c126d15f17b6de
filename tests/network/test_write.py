"""Written networks are valid files that compute the same: whole or absent, large ones in two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import Record
from optin_deploy.network.read import read
from optin_deploy.network.write import data_path, write
from support.tiny_graphs import FORMS, WIDTH, branches, chain, feeds, model_of, outputs, value, weight

BESIDE = {"single_file_bytes": 1000}
"""As if a file held this many bytes."""


@pytest.mark.parametrize("limits", [{}, BESIDE])
@pytest.mark.parametrize("form", FORMS)
def test_a_written_network_is_valid_computes_the_same_and_is_read_again(
    form: str, limits: dict[str, int], tmp_path: Path
) -> None:
    model, path = FORMS[form](), tmp_path / "m.onnx"
    network = read(model)
    write(network, path, **limits)
    onnx.checker.check_model(str(path), full_check=True)
    assert data_path(path).exists() == bool(limits)
    for seed in (0, 1):
        inputs = feeds(model, seed)
        for expected, found in zip(outputs(model, inputs), outputs(str(path), inputs), strict=True):
            assert np.array_equal(expected, found)
    again = read(path)
    assert {name: tensor.tobytes() for name, tensor in again.weights.items()} == {
        name: tensor.tobytes() for name, tensor in network.weights.items()
    }
    assert [node.op for node in again.nodes] == [node.op for node in network.nodes]


def test_old_files_whose_weights_are_inputs_are_written_in_a_version_that_has_weights(tmp_path: Path) -> None:
    model, path = chain(11, 3), tmp_path / "m.onnx"
    write(read(model), path)
    onnx.checker.check_model(str(path))
    assert np.array_equal(outputs(str(path), feeds(model))[0], outputs(model, feeds(model))[0])


def test_shapes_of_intermediate_values_are_left_out(tmp_path: Path) -> None:
    model, path = branches(), tmp_path / "m.onnx"
    model.graph.value_info.append(value("h", "stale", 99))
    for branch in model.graph.node[-1].attribute:
        branch.g.value_info.append(value("p", "stale", 99))
    write(read(model), path)
    assert b"stale" not in path.read_bytes()
    assert [port.name for port in onnx.load(path).graph.output] == ["y"]


@pytest.mark.parametrize("limits", [{}, BESIDE])
def test_weights_are_computed_once_each(limits: dict[str, int], tmp_path: Path) -> None:
    made = [0]

    def make() -> ir.Tensor:
        made[0] += 1
        return ir.tensor(np.full((WIDTH, WIDTH), made[0], np.float32))

    names = ["a", "b", "c"]
    stored = [weight(name, WIDTH, WIDTH) for name in names]
    model = ir.from_proto(model_of([helper.make_node("Sum", names, ["y"])], [], [value("y", WIDTH, WIDTH)], stored))
    for initializer in model.graph.initializers.values():
        initializer.const_value = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape([WIDTH, WIDTH]))
    write(read(model), tmp_path / "m.onnx", **limits)
    assert made == [3]
    assert outputs(str(tmp_path / "m.onnx"), {})[0][0, 0] == 6


@pytest.mark.parametrize("limits", [{}, BESIDE])
def test_a_network_can_be_written_over_the_file_that_it_was_read_from(limits: dict[str, int], tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", chain()
    write(read(model), path, **limits)
    network = read(path)
    write(network, path, **limits)
    write(network, path, **limits)
    assert np.array_equal(outputs(str(path), feeds(model))[0], outputs(model, feeds(model))[0])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("limits", [{}, BESIDE])
def test_a_write_that_fails_leaves_what_was_there(limits: dict[str, int], tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", chain()
    write(read(model), path, **limits)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail() -> ir.Tensor:
        raise Interrupted

    other = ir.from_proto(model)
    other.graph.initializers["v"].const_value = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([WIDTH, WIDTH]))
    with pytest.raises(Interrupted):
        write(read(other), path, **limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_older_file_never_stands_beside_the_weights_of_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    write(read(chain()), path, **BESIDE)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise Interrupted
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    other = chain()
    other.graph.initializer[0].CopyFrom(weight("w", WIDTH, WIDTH, seed=9))
    with pytest.raises(Interrupted):
        write(read(other), path, **BESIDE)
    assert not path.exists()


def test_in_a_folder_with_a_record_what_is_not_ours_is_set_aside(tmp_path: Path) -> None:
    Record(tmp_path).begin()
    path = tmp_path / "m.onnx"
    for file in (path, data_path(path)):
        file.write_text("somebody's")
    write(read(chain()), path, **BESIDE)
    assert sum(file.read_bytes() == b"somebody's" for file in tmp_path.iterdir()) == 2
    assert Record(tmp_path).owns(path)
    assert Record(tmp_path).owns(data_path(path))
    read(path)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def full() -> ir.Tensor:
        raise OSError(28, "No space left on device")

    model = ir.from_proto(chain())
    model.graph.initializers["v"].const_value = ir.LazyTensor(full, ir.DataType.FLOAT, ir.Shape([WIDTH, WIDTH]))
    with pytest.raises(BadInput, match="cannot be written: No space left"):
        write(read(model), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
