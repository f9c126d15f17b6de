"""A changed ONNX file is never taken for finished, and large weights lie beside it: the same outputs, whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from optin_deploy.errors import BadInput
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import Artifact, ExportSpec, Form
from optin_deploy.exporters.to_onnx import OnnxExporter
from optin_deploy.files.storage import sha256_file
from optin_deploy.network import sealed
from optin_deploy.network.onnx_data import data_files
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.write import data_path, write
from support.tiny_forms import Tiny, form_of, samples, tiny
from support.tiny_models import error, outputs, tiny_batch

pytestmark = pytest.mark.usefixtures("one_thread")


def case() -> Tiny:
    return tiny("dense distilbert")


class Writing(Exception):
    """Raised where the long work would begin."""


def no_writing(*args: object, **kwargs: object) -> None:
    raise Writing


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], Artifact]:
    """(large, precision) -> an artifact, exported once; `large`: as if one file did not hold the weights."""

    @cache
    def export(large: bool, precision: str = "fp32") -> Artifact:
        folder = tmp_path_factory.mktemp("large" if large else "small")
        source = tmp_path_factory.mktemp("source") if precision != "fp32" else folder
        with pytest.MonkeyPatch.context() as patch:
            if large:
                patch.setattr(sealed, "write", partial(write, single_file_bytes=1000))
            form = form_of(case().network, source / "model.onnx")
            name, _ = OnnxExporter().file_names(precision)
            return OnnxExporter().export(form, ExportSpec(precision), folder / name)

    return export


def copied(artifact: Artifact, folder: Path) -> Path:
    """The files of an artifact in a folder."""
    for name in (artifact.path.name, *artifact.data):
        shutil.copy(artifact.path.with_name(name), folder / name)
    return folder / artifact.path.name


def answers(path: Path, engine: str = "onnx", precision: str = "fp32") -> Any:
    batch = {k: v.numpy() for k, v in tiny_batch(case().model, batch=3, seq_len=11).items()}
    with exporter(engine).open(path, precision=precision, threads=1) as runtime:
        return runtime.run(batch)["last_hidden_state"]


def flipped(path: Path, place: int) -> None:
    """One bit changes."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ---- a changed file


def other_weights(path: Path) -> None:
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    changed = numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name)
    weight.CopyFrom(changed)
    onnx.save(proto, path)


def other_node(path: Path) -> None:
    proto = onnx.load(path)
    next(node for node in proto.graph.node if node.op_type == "Softmax").attribute[0].i = 0
    onnx.save(proto, path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def bytes_added(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    "change", [other_weights, other_node, cut_short, bytes_added, lambda path: flipped(path, 5000), Path.unlink]
)
def test_a_changed_file_is_made_again_though_its_key_is_intact(
    change: Callable[[Path], None], exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(exported(False), tmp_path)
    known = sealed.finished(path)
    assert known is not None
    change(path)
    assert sealed.finished(path) is None
    monkeypatch.setattr(sealed, "write", no_writing)
    with pytest.raises(Writing):
        sealed.store(case().network, path, known.key)


@pytest.mark.parametrize("large", [False, True])
def test_an_untouched_file_is_reused(
    large: bool, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = exported(large), copied(exported(large), tmp_path)
    before, known = path.stat().st_mtime_ns, sealed.finished(path)
    assert known is not None
    monkeypatch.setattr(sealed, "write", no_writing)
    assert sealed.store(case().network, path, known.key) == known
    assert OnnxExporter().export(Form(path, case().network), ExportSpec(), path) == replace(first, path=path)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(Writing):
        sealed.store(case().network, path, known.key, anew=True)


@pytest.mark.parametrize("change", [lambda path: flipped(path, 4000), cut_short, bytes_added, Path.unlink])
def test_changed_or_missing_data_is_noticed(
    change: Callable[[Path], None], exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(exported(True), tmp_path)
    known = sealed.finished(path)
    assert known is not None
    change(data_path(path))
    monkeypatch.setattr(sealed, "write", no_writing)
    with pytest.raises(Writing):
        sealed.store(case().network, path, known.key)


def test_a_changed_file_of_another_type_is_made_again(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form(exported(False).path, case().network)
    path = copied(exported(False, "fp16"), tmp_path)
    monkeypatch.setattr(sealed, "write", no_writing)
    assert OnnxExporter().export(form, ExportSpec("fp16"), path).sha256 == exported(False, "fp16").sha256
    flipped(path, 5000)
    with pytest.raises(Writing):
        OnnxExporter().export(form, ExportSpec("fp16"), path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    assert sealed.finished(tmp_path / "model.onnx") is None


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_is_made_of_a_read_file_says_each_thing_once(precision: str, tmp_path: Path) -> None:
    first = form_of(case().network, tmp_path / "first.onnx")
    form = Form(first.graph, read_file(first.graph))
    path = tmp_path / f"second.{precision}.onnx"
    if precision == "fp32":
        sealed.store(form.network, path, "another", {"said": "more"})
    else:
        OnnxExporter().export(form, ExportSpec(precision, calibration=samples(case().model)), path)
    keys = [entry.key for entry in onnx.load(path).metadata_props]
    assert len(keys) == len(set(keys))
    assert {sealed.KEY, sealed.SEAL, "said" if precision == "fp32" else sealed.MADE_FROM} <= set(keys)
    assert sealed.finished(path) is not None


# ---- weights beside the graph


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("fp16", 2e-2)])
def test_large_weights_lie_beside_the_graph_and_compute_the_same(
    precision: str, tolerance: float, exported: Any
) -> None:
    large, model = exported(True, precision), case().model
    (name, sha256), *more = large.data.items()
    data = large.path.with_name(name)
    assert (name, more, exported(False).data) == (f"{large.path.name}.data", [], {})
    assert data_files(large.path) == (data,)
    assert (large.sha256, sha256) == (sha256_file(large.path), sha256_file(data))
    assert large.size_bytes == large.path.stat().st_size + data.stat().st_size
    weights_bytes = sum(p.numel() for p in model.parameters()) * (4 if precision == "fp32" else 2)
    assert 0.95 * weights_bytes < data.stat().st_size < 1.05 * weights_bytes
    assert sorted(path.name for path in large.path.parent.iterdir()) == sorted([large.path.name, name])
    np.testing.assert_allclose(answers(large.path), answers(exported(False).path), rtol=0, atol=tolerance)
    expected = outputs(model, tiny_batch(model, batch=3, seq_len=11))["last_hidden_state"]
    assert error(expected, torch.from_numpy(answers(large.path))) < max(1e-4, tolerance)


def test_openvino_reads_weights_beside_the_graph(exported: Any) -> None:
    pytest.importorskip("openvino")
    small, large = (answers(exported(large).path, "openvino") for large in (False, True))
    np.testing.assert_array_equal(small, large)


def draft_of(artifact: Artifact, folder: Path) -> Path:
    """A complete draft of `model.onnx`, made of another artifact's files."""
    folder.mkdir()
    path = copied(artifact, folder)
    for name in artifact.data:
        (folder / name).rename(folder / "model.onnx.data")
    return path.rename(folder / "model.onnx")


def test_data_that_is_no_longer_needed_goes_and_foreign_data_stays(exported: Any, tmp_path: Path) -> None:
    path = copied(exported(True), tmp_path)
    sealed.install(draft_of(exported(False), tmp_path / "first"), path)
    assert path.read_bytes() == exported(False).path.read_bytes()
    assert not (tmp_path / "model.onnx.data").exists()
    (tmp_path / "model.onnx.data").write_text("notes")
    sealed.install(draft_of(exported(False), tmp_path / "second"), path)
    assert (tmp_path / "model.onnx.data").read_text() == "notes"


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_an_interrupted_replacement_leaves_no_graph_beside_other_weights(
    moves: int, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = copied(exported(True), tmp_path), exported(True, "fp16")
    move, done = sealed._move, list[Path]()

    def interrupted(draft: Path, out: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(out)
        move(draft, out)

    monkeypatch.setattr(sealed, "_move", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        sealed.install(draft_of(other, tmp_path / "draft"), path)
    left = {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    whose = exported(True) if moves == 0 else other
    assert left.pop("model.onnx.data") == data_path(whose.path).read_bytes()
    assert left == ({"model.onnx": other.path.read_bytes()} if moves == 2 else {})


def test_int8_of_large_weights_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(case().network, tmp_path / "model.onnx")
    monkeypatch.setattr("optin_deploy.exporters.to_onnx.SINGLE_FILE_BYTES", 1000)
    monkeypatch.setattr("optin_deploy.exporters.to_onnx.quantize_int8", no_writing)
    spec = ExportSpec("int8", calibration=samples(case().model))
    with pytest.raises(BadInput, match=r"--precision int8: the float32 weights are .* GiB.*--precision fp16"):
        OnnxExporter().export(form, spec, tmp_path / "model.int8.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


# ---- shapes


def test_no_shapes_of_intermediate_values_are_written(exported: Any) -> None:
    for large in (False, True):
        graph = onnx.load(exported(large).path).graph
        assert not graph.value_info
        assert all(value.type.tensor_type.HasField("shape") for value in (*graph.input, *graph.output))
