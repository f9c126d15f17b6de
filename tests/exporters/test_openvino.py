"""OpenVINO on the CPU: the same numbers as torch in every precision, exact float32, no telemetry, and the commands."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from optin_deploy.doctor.doctor import engine_rows
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import Artifact, ExportSpec, Form
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.files.storage import sha256_file
from optin_deploy.runtimes import openvino as runtime_module
from optin_deploy.runtimes.openvino import COMPUTED_IN, OpenVinoRuntime
from support.tiny_checkpoint import Shell, classifier, labelled, text_options
from support.tiny_forms import form_of, samples, tiny
from support.tiny_models import error, main_name, outputs, tiny_batch

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CASES = (
    *((name, "fp32") for name in ("bert", "vit", "dinov2", "gpt2")),
    *((name, precision) for name in ("bert", "vit") for precision in PRECISIONS[1:]),
)
"""The other families are those of engine onnx."""
SIZES = ((5, 23), (1, 7), (3, 1))
"""(batch, tokens); the traced example is another."""
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
BIAS = np.linspace(2, -2, 6, dtype=np.float32).reshape(2, 3)

pytestmark = pytest.mark.usefixtures("one_thread")

Export = Callable[[str, str], Artifact]


@cache
def pruned_model(name: str) -> Any:
    """Cut unevenly; one layer lost all heads, another all neurons."""
    return tiny(name).reference


def spec_of(name: str, precision: str) -> ExportSpec:
    return ExportSpec(precision, calibration=samples(tiny(name).model))


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Form]:
    folder = tmp_path_factory.mktemp("openvino")
    return cache(lambda name: form_of(tiny(name).network, folder / f"{name}.onnx"))


@pytest.fixture(scope="module")
def exported(formed: Callable[[str], Form]) -> Export:
    """(name, precision) -> artifact of a pruned model, exported once."""

    @cache
    def export(name: str, precision: str) -> Artifact:
        form = formed(name)
        path = form.graph if precision == "fp32" else form.graph.with_suffix(f".{precision}.onnx")
        return exporter("openvino").export(form, spec_of(name, precision), path)

    return export


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """logits = x + bias, hidden = relu(x); each output is the copy of a tensor with a name of its own."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a_relu"]),
        helper.make_node("Identity", ["a_relu"], ["hidden"]),
        helper.make_node("Add", ["x", "bias"], ["a_sum"]),
        helper.make_node("Identity", ["a_sum"], ["logits"]),
    ]
    inputs, found = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in names]
        for names in (("x", "bias"), ("logits", "hidden"))
    )
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, found), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(model, path)
    return path


def setting(runtime: OpenVinoRuntime, name: str) -> Any:
    return runtime._compiled.get_property(name)


def computed_in(runtime: OpenVinoRuntime) -> str:
    return str(setting(runtime, "INFERENCE_PRECISION_HINT").to_string())


# ---- against torch


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_openvino_equals_torch_at_other_sizes_with_padding(name: str, precision: str, exported: Export) -> None:
    model, artifact = pruned_model(name), exported(name, precision)
    with exporter("openvino").open(artifact.path, precision=precision, threads=1) as runtime:
        for batch, seq_len in SIZES:
            inputs = tiny_batch(model, batch=batch, seq_len=max(3, seq_len))
            if "input_ids" in inputs:
                inputs = {name: values[:, :seq_len] for name, values in inputs.items()}
            expected = outputs(model, inputs, states=False)
            found = runtime.run({name: value.numpy() for name, value in inputs.items()})
            value = found[main_name(expected)]
            assert value.dtype == np.float32
            limit = 0.1 if precision == "int8" else TOLERANCES[precision]
            assert error(expected[main_name(expected)], torch.from_numpy(value)) < limit


def test_float32_is_computed_in_float32(exported: Export) -> None:
    """On a CPU that multiplies bfloat16, OpenVINO's own choice is thousands of times farther off than this limit."""
    model, artifact = pruned_model("vit"), exported("vit", "fp32")
    inputs = tiny_batch(model, batch=3)
    expected = outputs(model, inputs, states=False)["last_hidden_state"]
    with exporter("openvino").open(artifact.path, threads=1) as runtime:
        found = runtime.run({name: value.numpy() for name, value in inputs.items()})["last_hidden_state"]
    assert error(expected, torch.from_numpy(found)) < 1e-6


def test_the_artifact_is_the_onnx_file_of_engine_onnx(exported: Export, formed: Callable[[str], Form]) -> None:
    artifact = exported("bert", "fp32")
    before = artifact.path.stat().st_mtime_ns
    plain = exporter("onnx").export(formed("bert"), ExportSpec("fp32"), artifact.path)
    assert artifact.path.stat().st_mtime_ns == before
    assert plain.sha256 == artifact.sha256 == sha256_file(artifact.path)
    assert (artifact.engine, artifact.precision) == ("openvino", "fp32")
    assert (artifact.inputs, artifact.outputs) == (plain.inputs, plain.outputs)
    for precision in PRECISIONS:
        assert exporter("openvino").file_names(precision) == exporter("onnx").file_names(precision)


def test_int8_products_are_multiplied_in_int8(exported: Export) -> None:
    with OpenVinoRuntime(exported("bert", "int8").path, precision="int8") as runtime:
        about = [node.get_rt_info() for node in runtime._compiled.get_runtime_model().get_ops()]
    types = [str(a["runtimePrecision"].astype(str)) for a in about if a["layerType"].astype(str) == "FullyConnected"]
    assert "i8" in types or "u8" in types


# ---- the runtime


@pytest.mark.parametrize("threads", [0, 1])
def test_outputs_come_by_their_onnx_names_in_order(onnx_file: Path, threads: int) -> None:
    with OpenVinoRuntime(onnx_file, threads=threads) as runtime:
        assert runtime.engine == "openvino"
        found = runtime.run({"bias": BIAS, "not of the graph": X, "x": X})
        runtime.synchronize()
        assert setting(runtime, "PERFORMANCE_HINT") == "LATENCY"
        if threads:
            assert setting(runtime, "INFERENCE_NUM_THREADS") == threads
    assert list(found) == ["logits", "hidden"]
    np.testing.assert_array_equal(found["logits"], X + BIAS)
    np.testing.assert_array_equal(found["hidden"], np.maximum(X, 0))


def test_outputs_stay_valid_after_the_next_run_and_feeds_stay_as_they_were(onnx_file: Path) -> None:
    x, bias = X.copy(), BIAS.copy()
    with OpenVinoRuntime(onnx_file) as runtime:
        first = runtime.run({"x": x, "bias": bias})
        runtime.run({"x": -X, "bias": -BIAS})
    np.testing.assert_array_equal(first["logits"], X + BIAS)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(bias, BIAS)


def test_read_only_and_strided_feeds_run(onnx_file: Path) -> None:
    frozen = np.asfortranarray(X)[::-1]
    frozen.flags.writeable = False
    with OpenVinoRuntime(onnx_file) as runtime:
        found = runtime.run({"x": frozen, "bias": BIAS})
    np.testing.assert_array_equal(found["logits"], X[::-1] + BIAS)


def test_missing_inputs_are_named(onnx_file: Path) -> None:
    with OpenVinoRuntime(onnx_file) as runtime, pytest.raises(BadInput, match="needs bias, but the feeds are x, other"):
        runtime.run({"x": X, "other": X})


def test_leaving_frees_the_model_also_after_an_error(onnx_file: Path) -> None:
    runtime = OpenVinoRuntime(onnx_file)
    held = [weakref.ref(each) for each in (runtime._compiled, runtime._session)]
    with pytest.raises(BadInput), runtime:
        runtime.run({})
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    runtime.close()
    with pytest.raises(BadInput, match="OpenVinoRuntime is closed"):
        runtime.run({"x": X, "bias": BIAS})


def test_a_missing_file_and_negative_threads_are_bad_input(tmp_path: Path, onnx_file: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.onnx"):
        OpenVinoRuntime(tmp_path / "absent.onnx")
    with pytest.raises(BadInput, match=r"-1; use 0 \(OpenVINO's default\)"):
        OpenVinoRuntime(onnx_file, threads=-1)


def test_every_precision_has_its_type_of_computing() -> None:
    assert set(exporter("openvino").precisions) == set(COMPUTED_IN)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_16_bit_type_that_the_cpu_lacks_is_computed_in_float32(
    onnx_file: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenVinoRuntime(onnx_file, precision=precision) as runtime:
        assert computed_in(runtime) in ("f32", COMPUTED_IN[precision])  # fp16 is never bfloat16
    monkeypatch.setattr(runtime_module, "NEEDS", dict.fromkeys(runtime_module.NEEDS, "what no CPU has"))
    with OpenVinoRuntime(onnx_file, precision=precision) as runtime:
        assert computed_in(runtime) == "f32"


# ---- the package


def test_without_openvino_the_error_says_how_to_install_it(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r"openvino is not installed.*pip install 'optin-deploy\[cpu\]'"):
        OpenVinoRuntime(onnx_file)


def test_importing_openvino_reports_nothing_and_hides_nothing_afterwards(tmp_path: Path) -> None:
    """As its package comes, `import openvino` asks for www.google-analytics.com and leaves an id in ~/intel."""
    code = """
import sys
from optin_deploy.runtimes.openvino import TELEMETRY, import_openvino
import_openvino()
assert "openvino" in sys.modules
assert not [name for name in sys.modules if name.startswith(TELEMETRY)], "its telemetry was imported"
import openvino_telemetry
sys.modules["openvino_telemetry"].ours = True
import_openvino()
assert openvino_telemetry.ours and sys.modules["openvino_telemetry"] is openvino_telemetry
"""
    switches = ("CI", "TF_BUILD", "JENKINS_URL")  # under which it is silent by itself
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()


def test_the_doctor_says_whether_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = [row for row in engine_rows() if row.engine == "openvino"]
    assert row.answer == "yes"
    monkeypatch.setitem(sys.modules, "openvino", None)
    (row,) = [row for row in engine_rows() if row.engine == "openvino"]
    assert (row.answer, "openvino is not installed" in row.why) == ("build only", True)


# ---- the commands


def test_export_proves_and_measures_it(finished: Path, shell: Shell) -> None:
    for name in ("report.json", "report.md"):
        (finished / name).unlink()
    options = [*text_options(labelled(), finished), "--threads", 1, "--engine", "openvino"]
    ran = shell("optin-export", classifier(), *options)
    assert ran.code == 0, ran.err
    report = json.loads((finished / "report.json").read_text())
    assert report["settings"]["engine"] == "openvino"
    (row,) = report["latency"]
    assert (row["engine"], row["precision"], row["threads"]) == ("openvino", "fp32", 1)
    for key in ("torch_vs_engine", "torch_vs_engine_dense", "torch_vs_onnx_fp32", "torch_vs_onnx_fp32_dense"):
        assert 0 < report["parity"][key] < TOLERANCES["fp32"]
    assert set(report["hashes"]) >= {"model.onnx", "dense.onnx"}
    assert "openvino" in (finished / "report.md").read_text()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_build_proves_and_bench_measures_every_precision(precision: str, finished: Path, shell: Shell) -> None:
    """`optin build` holds pruned and dense against torch, within the tolerance of the precision."""
    options = [finished, "--engine", "openvino", "--precision", precision]
    ran = shell("optin", "build", *options)
    assert ran.code == 0, ran.err
    ran = shell("optin", "bench", *options, "--threads", 1)
    assert ran.code == 0, ran.err
    (row,) = json.loads((finished / "measurements.json").read_text())["latency"]
    assert (row["engine"], row["precision"]) == ("openvino", precision)


def test_without_openvino_the_file_is_written_and_the_exit_code_says_the_rest(
    finished: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    ran = shell("optin", "build", finished, "--engine", "openvino")
    assert ran.code == 3
    assert "openvino is not installed" in ran.err
    assert "pip install 'optin-deploy[cpu]'" in ran.err
    assert "optin bench finished --engine openvino --precision fp32" in ran.err
    only = shell("optin", "build", finished, "--engine", "openvino", "--prepare-only")
    assert only.code == 0, only.err
    ran = shell("optin", "bench", finished, "--engine", "openvino")
    assert ran.code == 2
    assert "openvino is not installed" in ran.err
