"""Real builds with TensorRT-RTX, ahead of time and without a GPU: what is pruned is a model that its compiler takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optin_deploy.errors import BadInput, CannotBuildHere
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.exporters.preflight import build_ahead
from optin_deploy.exporters.profiles import Profile
from optin_deploy.exporters.tensorrt_plan import PlanOptions, build_engine
from optin_deploy.runtimes.record import read_record
from optin_deploy.runtimes.tensorrt import TensorRTRuntime
from optin_deploy.runtimes.tensorrt_bindings import EngineLog, import_tensorrt
from support.tiny_checkpoint import Shell, bert, lines, text_options
from support.tiny_forms import Tiny, form_of, samples, tiny

OPTIONS = PlanOptions(profiles=(Profile((1, 2, 4), (4, 16, 32)),))
MODELS = [
    ("bert", "fp32", (), ()),
    pytest.param("dynamo bert", "fp16", (1,), (), marks=pytest.mark.slow),
    ("bert+head", "bf16", (), (0,)),
    ("bert+head", "int8", (), ()),
    pytest.param("dynamo vit+head", "fp32", (0,), (2,), marks=pytest.mark.slow),
    ("vit", "fp16", (), ()),
    pytest.param("dynamo dinov2-swiglu", "fp16", (), (1,), marks=pytest.mark.slow),
    ("distilbert", "fp16", (2,), ()),
]
"""Model, precision, and the layers that lose all heads and all neurons; every layer keeps another number of them."""


def build(case: Tiny, precision: str, out: Path) -> Any:
    spec = ExportSpec(precision, options=OPTIONS, calibration=samples(case.model) if precision == "int8" else ())
    form = form_of(case.network, out.with_name(f"{out.name.partition('.')[0]}.onnx"), longest=64)
    return exporter("trt-rtx").export(form, spec, out)


def pruned(name: str) -> Tiny:
    return tiny(name, no_heads=(), no_neurons=())


@pytest.mark.parametrize(("name", "precision", "no_heads", "no_neurons"), MODELS)
def test_pruned_models_build(
    name: str, precision: str, no_heads: tuple[int, ...], no_neurons: tuple[int, ...], tmp_path: Path
) -> None:
    case = tiny(name, no_heads=no_heads, no_neurons=no_neurons)
    artifact = build(case, precision, tmp_path / "model.rtx.engine")
    record = read_record(artifact.path)
    assert artifact.size_bytes == artifact.path.stat().st_size > 100_000
    assert (record.engine, record.precision, record.capability) == ("trt-rtx", precision, "")


def test_the_dense_model_builds_with_the_same_inputs_and_outputs(tmp_path: Path) -> None:
    dense = build(tiny("dense bert"), "fp32", tmp_path / "dense.rtx.engine")
    assert dense.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert dense.outputs == ("last_hidden_state",)
    assert dense.shapes == ((1, 4), (2, 16), (4, 32))


def test_a_wrong_slice_is_refused(tmp_path: Path) -> None:
    """One column too few in a projection's weight, in an ONNX file that the builder has taken before."""
    build(pruned("bert"), "fp32", tmp_path / "model.rtx.engine")
    proto = onnx.load(tmp_path / "model.onnx")
    weights = {t.name: t for t in proto.graph.initializer if len(t.dims) == 2}
    turned = next(n for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in weights)
    wrong = weights[turned.input[0]]  # (out, in), transposed for its product
    wrong.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(wrong)[:, 1:]), wrong.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    trt = import_tensorrt("trt-rtx")
    with pytest.raises(CannotBuildHere, match=r"wrong\.onnx"):
        build_engine(trt, tmp_path / "wrong.onnx", OPTIONS, log=EngineLog("TensorRT-RTX"))


def test_operators_of_other_domains_are_named(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    node = onnx.helper.make_node("BiasGelu", ["x", "x"], ["y"], domain="com.microsoft")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "other", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "other.onnx")
    trt = import_tensorrt("trt-rtx")
    with pytest.raises(CannotBuildHere, match="BiasGelu"):
        build_engine(trt, tmp_path / "other.onnx", OPTIONS, log=EngineLog("TensorRT-RTX"))


def test_plans_are_not_loaded_without_a_gpu(tmp_path: Path) -> None:
    artifact = build(pruned("bert"), "fp32", tmp_path / "model.rtx.engine")
    with pytest.raises(BadInput, match="no CUDA device is visible"):
        TensorRTRuntime(artifact.path, engine="trt-rtx")


def test_the_names_for_the_gpu_that_is_here_exist() -> None:
    trt = import_tensorrt("trt-rtx")
    assert trt.ComputeCapability.CURRENT
    assert {"num_compute_capabilities", "set_compute_capability"} <= set(dir(trt.IBuilderConfig))


@pytest.mark.parametrize("options", [PlanOptions(compatible=("version",)), PlanOptions(weights="stripped")])
def test_what_it_cannot_do_is_refused(options: PlanOptions) -> None:
    with pytest.raises(BadInput, match="TensorRT-RTX"):
        exporter("trt-rtx").check(options)


@pytest.mark.parametrize("given", [{"weights": "stripped"}, {"weights": "refittable"}, {"compatible": ("version",)}])
def test_the_preflight_leaves_out_what_needs_a_gpu(tmp_path: Path, given: dict[str, Any]) -> None:
    form = form_of(pruned("vit").network, tmp_path / "model.onnx")
    said = build_ahead(form.graph, PlanOptions(profiles=OPTIONS.profiles, **given))
    assert said is not None
    assert said.startswith("TensorRT-RTX")


@pytest.mark.slow
def test_the_command_builds_both_plans_and_says_that_they_were_not_run(tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "job"
    ran = shell("optin-export", bert(), *text_options(lines(), out), "--engine", "trt-rtx", "--precision", "fp16")
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert report["latency"] == []
    assert any("model.rtx.engine was built but not run here" in note for note in report["notes"])
    assert {"torch_vs_engine", "torch_vs_onnx_fp32"} <= set(report["parity"])
    assert {"model.rtx.engine", "dense.rtx.engine"} <= set(report["hashes"])


def test_without_tensorrt_the_plan_is_tried_ahead_of_time(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "job"
    ran = shell("optin-export", bert(), *text_options(lines(), out), "--engine", "trt", "--no-dense")
    assert ran.code == 3
    assert "TensorRT is not installed" in ran.err
    assert "Preflight passed: TensorRT-RTX" in ran.err
    assert (out / "model.fp16.onnx").is_file()
    assert (out / "report.md").is_file()
