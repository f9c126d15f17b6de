"""A stored ONNX file that is damaged or another one: every engine and command names it, and what makes it again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.doctor.doctor import check_file
from optin_deploy.errors import BadInput
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import Artifact
from optin_deploy.jobs.bench import inputs_in
from optin_deploy.jobs.building import ArtifactPair, Built
from optin_deploy.jobs.float32_dense import float32_dense, measure_beside_float32
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring import artifacts as measuring
from optin_deploy.measuring.points import Point
from optin_deploy.network import sealed
from optin_deploy.network.write import write
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import latency_rows
from support.made_timings import FakeMeasuring, made
from support.tiny_checkpoint import finished_job

if TYPE_CHECKING:
    from support.tiny_checkpoint import Shell

pytestmark = pytest.mark.usefixtures("one_thread")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")


def another_graph(path: Path) -> None:
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("pixels", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["pixels"], ["y"])], "g", entries[:1], entries[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def data_missing(path: Path) -> None:
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    path.with_name("w.bin").unlink()


def wrong_sizes(path: Path) -> None:
    proto = onnx.load(path)
    weight = next(each for each in proto.graph.initializer if len(each.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:-1, :-1].copy(), weight.name))
    onnx.save(proto, path)


KINDS = (truncated, empty, text, another_graph, data_missing, wrong_sizes)


@pytest.mark.parametrize("damage", KINDS)
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_an_engine_names_the_file_and_the_command(engine: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    path = Path(shutil.copy(finished_job() / "model.onnx", tmp_path / "model.fp16.onnx"))
    shutil.copy(finished_job() / "source.json", tmp_path)
    damage(path)
    feeds = {name: np.ones((2, 7), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with (
        pytest.raises(BadInput, match=re.escape(str(path))) as refused,
        exporter(engine).open(path, precision="fp32", threads=1) as runtime,
    ):
        runtime.run(feeds)
    said = str(refused.value)
    assert "\n" not in said
    if damage is not another_graph:  # nothing is wrong with that file, but that it takes `pixels`
        assert f"optin build {tmp_path} --engine onnx --precision fp16`" in said


def test_sizes_that_a_graph_does_not_take_are_told() -> None:
    feeds = {name: np.ones((1, 4000), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    says = r"model\.onnx does not run on engine onnx with .*input_ids 1x4000.*shorter"
    with exporter("onnx").open(finished_job() / "model.onnx", threads=1) as runtime:
        for _ in range(2):
            with pytest.raises(BadInput, match=says):
                runtime.run(feeds)


@pytest.mark.parametrize("damage", [truncated, another_graph])
def test_bench_and_gate_name_the_file_and_the_command(
    damage: Callable[[Path], None], finished: Path, shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    damage(finished / "model.onnx")
    for command in (["bench", finished], ["gate", finished / "dense.onnx", finished, "--max-ratio", "1.05"]):
        ran = shell("optin", *command, "--threads", 1)
        assert ran.code == 2
        assert "Traceback" not in ran.err
        assert str(finished / "model.onnx") in ran.err.replace("\n", "")
        assert f"optin build {finished}" in ran.err + caplog.text


def test_rewrite_and_build_make_damaged_files_again_and_above_the_limit_with_data(
    finished: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain above the limit: rewrite, build, check, doctor, bench and gate give what one file gives."""
    one_file = {name: (finished / name).stat().st_size for name in ("model.onnx", "dense.onnx")}
    truncated(finished / "model.onnx")
    empty(finished / "dense.onnx")
    monkeypatch.setattr(sealed, "write", partial(write, single_file_bytes=1000))
    for command in ("rewrite", "build"):
        ran = shell("optin", command, finished)
        assert ran.code == 0, ran.err
    for name, size_bytes in one_file.items():
        files = [finished / name, finished / f"{name}.data"]
        assert 0.9 < sum(file.stat().st_size for file in files) / size_bytes < 1.1
        assert all(Workspace(finished).record.owns(file) for file in files)
        found, expected = (answers(folder / name) for folder in (finished, finished_job()))
        np.testing.assert_array_equal(found, expected)
    fake = FakeMeasuring([made(0.9)] * 2)
    monkeypatch.setattr(measuring, "measure_pair", fake)
    assert shell("optin", "bench", finished).code == 0
    pin = finished / "baseline.json"
    ran = shell("optin", "gate", finished / "model.onnx", "--pin", pin)
    assert ran.code == 0, ran.err
    assert shell("optin", "gate", pin, finished / "model.onnx", "--max-ratio", "9").code in (0, 4)  # 4: a busy machine
    assert shell("optin", "doctor", finished).code == 0

    data = finished / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    ran = shell("optin", "gate", pin, finished / "dense.onnx", "--max-ratio", "1.05")
    assert (ran.code, "model.onnx.data, which holds weights" in ran.err.replace("\n", " ")) == (2, True)
    ran = shell("optin", "doctor", finished)
    assert ran.code == 1
    assert "was changed" in " ".join(ran.out.split())


def answers(path: Path) -> Any:
    ids = np.arange(5, 26).reshape(3, 7)
    with exporter("onnx").open(path, threads=1) as runtime:
        return runtime.run({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})["logits"]


def test_doctor_finds_a_changed_export_and_no_fault_in_files_of_others(finished: Path) -> None:
    def problems(path: Path) -> list[str]:
        return [found.message for found in check_file(path, {}, parser=None) if found.level == "problem"]

    path = finished / "model.onnx"
    assert problems(path) == []
    proto = onnx.load(path)
    onnx.save(proto, finished / "same.onnx")
    assert problems(finished / "same.onnx") == []  # written again without a change
    weight = next(each for each in proto.graph.initializer if len(each.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(2), weight.name))
    onnx.save(proto, path)
    assert [message for message in problems(path) if "was changed after it was exported" in message]
    del proto.metadata_props[:]
    onnx.save(proto, path)
    assert problems(path) == []


# ---- the float32 dense model


def built(engine: str, precision: str, folder: Path, *, onnx_too: bool = True) -> Built:
    """What an export left, by names alone."""
    steps = [(engine, precision)]
    if onnx_too:
        typed = "fp32" if precision in ("fp32", "tf32") else precision
        steps = list(dict.fromkeys([("onnx", "fp32"), ("onnx", typed), *steps]))
    pairs = []
    for name, kind in steps:
        files = exporter(name).file_names(kind)
        made_of = [Artifact(folder / (file or ""), name, kind, (), (), "", 0) for file in files]
        pairs.append(ArtifactPair(exporter(name), kind, made_of[0], made_of[1] if files[1] else None))
    return Built(tuple(pairs))


@pytest.mark.parametrize(
    ("engine", "precision", "expected"),
    [
        ("onnx", "fp16", ("onnx", "dense.onnx")),
        ("openvino", "bf16", ("openvino", "dense.onnx")),
        ("ort-cuda", "tf32", ("ort-cuda", "dense.onnx")),
        ("torch", "bf16", ("torch", "hub/model")),
        ("ort-trt", "fp16", ("torch", "hub/model")),  # has no float32
        ("trt", "fp16", ("torch", "hub/model")),  # builds no float32 plan beside it
        ("aoti", "fp16", ("torch", "hub/model")),
    ],
)
def test_the_float32_dense_model_is_one_that_is_there(
    engine: str, precision: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    everything = built(engine, precision, tmp_path, onnx_too=engine not in ("torch", "aoti"))
    found, path = float32_dense(everything, Source("hub/model"))
    assert (found.engine, str(path).removeprefix(f"{tmp_path}/")) == expected


def test_a_typed_artifact_is_measured_beside_the_float32_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    job, source = finished_job(), Workspace(finished_job()).source()
    inputs, everything = inputs_in(Workspace(job)), built("onnx", "int8", job)
    typed = everything.pairs[-1]  # the float32 file stands for the int8 one
    pair = replace(typed, pruned=replace(typed.pruned, path=job / "model.onnx"))
    fake = FakeMeasuring([made(0.5)] * 2)
    monkeypatch.setattr(measuring, "measure_pair", fake)
    (row,) = measure_beside_float32(Built((*everything.pairs[:-1], pair)), inputs, source, [Point(2, 8)])
    ((dense, smaller),) = fake.outputs
    (feeds,) = fake.feeds
    for name, found in (("dense.onnx", dense), ("model.onnx", smaller)):
        with exporter("onnx").open(job / name) as runtime:
            np.testing.assert_array_equal(found["logits"], runtime.run(feeds)["logits"])
    stored = row.to_json()
    assert [stored[key] for key in ("engine", "precision", "dense_engine", "dense_precision")] == [
        *("onnx", "int8", "onnx", "fp32")
    ]
    ((name, *figures),) = latency_rows([row])
    assert name == "2 x 8, beside fp32 dense"
    assert figures[3].startswith("2.00x")
    assert measure_beside_float32(built("onnx", "fp32", job), inputs, source, [Point(2, 8)]) == []


def test_a_seal_covers_every_byte(tmp_path: Path) -> None:
    path = Path(shutil.copy(finished_job() / "model.onnx", tmp_path))
    whole = path.read_bytes()
    assert sealed.finished(path) is not None
    for place in (0, 1, len(whole) // 3, len(whole) - 70, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert sealed.finished(path) is None
