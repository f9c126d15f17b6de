"""ONNX Runtime's GPU engines where no GPU is: what is prepared, what is refused, and what a session is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from optin_deploy.errors import BadInput, CannotBuildHere, MissingDependency
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.files.storage import sha256_file
from optin_deploy.jobs.building import forms_in
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.runtimes import ort as runtime_module
from optin_deploy.runtimes.ort import OrtRuntime
from support.tiny_checkpoint import Shell, classifier, finished_job, labelled, text_options

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
PROVIDERS = {"ort-cuda": CUDA, "ort-trt": TENSORRT}
ENGINES = tuple(PROVIDERS)
PRECISION = {"ort-cuda": "fp32", "ort-trt": "tf32"}
"""The defaults: what runs the float32 file."""


@dataclass
class StubOrt:
    """A module with the calls of onnxruntime that this project makes; its sessions run nowhere."""

    chosen: list[str]
    """What a session says it runs on."""
    known: list[str] = field(default_factory=lambda: [TENSORRT, CUDA, CPU])
    sessions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Arguments of each session."""

    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL="all")

    class SessionOptions:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    def get_available_providers(self) -> list[str]:
        return self.known

    def InferenceSession(self, path: str, **options: Any) -> Any:  # onnxruntime's own name
        self.sessions.append((path, options))
        names = [SimpleNamespace(name="x")]
        return SimpleNamespace(
            get_providers=lambda: self.chosen,
            get_inputs=lambda: names,
            get_outputs=lambda: names,
            run=lambda wanted, feeds: [feeds["x"] + 1],
        )


Stub = Callable[..., StubOrt]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Put a stub in onnxruntime's place, and a GPU in the machine."""

    def put(*chosen: str, **options: Any) -> StubOrt:
        made = StubOrt(list(chosen), **options)
        for module in ("optin_deploy.runtimes.ort", "optin_deploy.exporters.to_ort_gpu"):
            monkeypatch.setattr(f"{module}.import_onnxruntime", lambda: made)
        monkeypatch.setattr("optin_deploy.exporters.to_ort_gpu.current_gpu", lambda: torch.device("cuda", 0))
        return made

    return put


# ---- with the onnxruntime of the CPU


@pytest.mark.parametrize("engine", ENGINES)
def test_the_obstacle_names_the_provider_and_the_remedy(engine: str) -> None:
    said = str(exporter(engine).obstacle())
    assert f"no {PROVIDERS[engine]}" in said
    assert "pip uninstall -y onnxruntime && pip install 'optin-deploy[gpu]'" in said


def test_without_onnxruntime_the_obstacle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "onnxruntime is not installed" in str(exporter("ort-cuda").obstacle())


@pytest.mark.parametrize("engine", ENGINES)
def test_with_the_provider_but_no_gpu_the_gpu_is_what_is_missing(
    engine: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(CPU)
    assert exporter(engine).obstacle() is None
    monkeypatch.setattr("optin_deploy.exporters.to_ort_gpu.current_gpu", lambda: None)
    assert exporter(engine).obstacle() == "no CUDA device is visible"


@pytest.mark.parametrize("engine", ENGINES)
def test_export_writes_the_onnx_file_and_says_what_to_run_on_the_target(engine: str, finished: Path) -> None:
    out = finished / "model.onnx"
    before = sha256_file(out)
    with pytest.raises(CannotBuildHere) as caught:
        exporter(engine).export(forms_in(Workspace(finished), None).pruned, ExportSpec(PRECISION[engine]), out)
    assert sha256_file(out) == before  # the same file as engine onnx's, found finished
    said = str(caught.value)
    assert f"{out} is written, but {engine} does not run here" in said
    assert f"no {PROVIDERS[engine]}" in said
    assert f"optin bench finished --engine {engine} --precision {PRECISION[engine]}" in said


def test_export_in_fp16_writes_a_typed_file(finished: Path) -> None:
    out = finished / "model.fp16.onnx"
    with pytest.raises(CannotBuildHere, match="--precision fp16"):
        exporter("ort-cuda").export(forms_in(Workspace(finished), None).pruned, ExportSpec("fp16"), out)
    assert onnx.TensorProto.FLOAT16 in {weight.data_type for weight in onnx.load(out).graph.initializer}


# onnxruntime warns of a provider it does not know before it goes on without it; the error that follows says the same.
@pytest.mark.filterwarnings("ignore:Specified provider .* is not in available provider names:UserWarning")
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_session_on_the_cpu_does_not_pass_for_one_on_the_gpu(provider: str) -> None:
    with pytest.raises(MissingDependency, match=provider):
        OrtRuntime(finished_job() / "model.onnx", provider=provider)


# ---- what a session is asked for


def test_a_cuda_session_is_asked_for_in_exact_float32(stub: Stub, finished: Path) -> None:
    made = stub(CUDA, CPU)
    with exporter("ort-cuda").open(finished / "model.onnx", threads=3) as runtime:
        assert runtime.engine == "ort-cuda"
        found = runtime.run({"x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(found["x"], [2, 2])
    ((path, options),) = made.sessions
    assert path == str(finished / "model.onnx")
    assert options["providers"] == [(CUDA, {"use_tf32": "0"})]
    assert options["sess_options"].intra_op_num_threads == 3
    assert options["sess_options"].graph_optimization_level == "all"


def test_only_tf32_rounds_to_tf32(stub: Stub, finished: Path) -> None:
    made = stub(CUDA, CPU)
    for precision in ("fp32", "tf32", "fp16", None):
        exporter("ort-cuda").open(finished / "model.onnx", precision=precision)
    assert [options["providers"][0][1]["use_tf32"] for _, options in made.sessions] == ["0", "1", "0", "0"]


@pytest.mark.parametrize(("precision", "fp16"), [("tf32", "False"), ("fp16", "True")])
def test_a_tensorrt_session_has_cuda_behind_it_and_keeps_its_plans(
    stub: Stub, finished: Path, precision: str, fp16: str
) -> None:
    made = stub(TENSORRT, CUDA, CPU)
    with exporter("ort-trt").open(finished / "model.onnx", precision=precision) as runtime:
        assert runtime.engine == "ort-trt"
    ((_, options),) = made.sessions
    (first, given), (second, _) = options["providers"]
    assert (first, second) == (TENSORRT, CUDA)
    folder = str(finished / "ort-trt-cache")
    assert given["trt_engine_cache_enable"] == given["trt_timing_cache_enable"] == "True"
    assert given["trt_engine_cache_path"] == given["trt_timing_cache_path"] == folder
    assert given["trt_fp16_enable"] == fp16


@pytest.mark.parametrize(
    ("engine", "chosen"),
    [
        ("ort-cuda", [CPU]),
        ("ort-cuda", [TENSORRT, CUDA, CPU]),
        ("ort-trt", [CUDA, CPU]),
        ("ort-trt", [TENSORRT, CPU]),
        ("ort-trt", [CPU]),
    ],
)
def test_a_session_that_fell_back_is_refused(stub: Stub, finished: Path, engine: str, chosen: list[str]) -> None:
    stub(*chosen)
    with pytest.raises(MissingDependency, match=f"chose .*{chosen[0]}.* where {PROVIDERS[engine]} was asked"):
        exporter(engine).open(finished / "model.onnx")


def test_an_error_in_a_run_does_not_go_on_elsewhere(stub: Stub, finished: Path) -> None:
    made = stub(CUDA, CPU)
    exporter("ort-cuda").open(finished / "model.onnx")
    assert made.sessions[0][1]["enable_fallback"] == 0


def test_a_missing_file_is_refused_before_a_session_opens(stub: Stub, tmp_path: Path) -> None:
    made = stub(CUDA, CPU)
    with pytest.raises(BadInput, match=r"absent\.onnx"):
        exporter("ort-cuda").open(tmp_path / "absent.onnx")
    assert not made.sessions


def test_the_real_session_takes_the_arguments_of_the_stub(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call on the real onnxruntime, with the CPU in the place of the GPU's provider."""
    monkeypatch.setitem(runtime_module.FALLBACKS, CPU, [])
    with OrtRuntime(finished / "model.onnx", provider=CPU, options={}) as runtime:
        assert runtime._session.get_providers() == [CPU]


# ---- the commands


@pytest.mark.parametrize("engine", ENGINES)
def test_build_prepares_and_says_by_its_exit_code_that_the_engine_is_missing(
    engine: str, finished: Path, shell: Shell
) -> None:
    ran = shell("optin", "build", finished, "--engine", engine)
    assert ran.code == 3
    assert f"optin bench finished --engine {engine}" in ran.err
    assert (finished / "model.onnx").is_file()
    only = shell("optin", "build", finished, "--engine", engine, "--prepare-only")
    assert only.code == 0, only.err
    assert "not run here" in only.out


@pytest.mark.parametrize("engine", ENGINES)
def test_export_leaves_a_report_that_says_what_is_missing(engine: str, finished: Path, shell: Shell) -> None:
    for name in ("report.json", "report.md"):
        (finished / name).unlink()
    options = [*text_options(labelled(), finished), "--threads", 1, "--engine", engine]
    ran = shell("optin-export", classifier(), *options)
    assert ran.code == 3, ran.err
    assert f"--engine {engine}" in ran.err
    assert "Traceback" not in ran.err
    assert PROVIDERS[engine] in (finished / "report.md").read_text()
    report = json.loads((finished / "report.json").read_text())
    assert report["settings"]["engine"] == engine
    assert {row["engine"] for row in report["latency"]} <= {"onnx"}  # nothing of it passes for the asked engine's
    only = shell("optin-export", classifier(), *options, "--prepare-only")
    assert only.code == 0, only.err


def test_bench_says_why_it_does_not_run(finished: Path, shell: Shell) -> None:
    ran = shell("optin", "bench", finished, "--engine", "ort-cuda")
    assert ran.code == 2
    assert f"no {CUDA}" in ran.err


def test_bench_measures_where_the_provider_is(finished: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's provider plays the GPU's: the command, the file names and the row are those of ort-cuda."""
    from optin_deploy.exporters.to_ort_gpu import OrtCudaExporter

    monkeypatch.setattr(OrtCudaExporter, "provider", CPU)
    monkeypatch.setattr("optin_deploy.exporters.to_ort_gpu.current_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(OrtCudaExporter, "open", lambda self, path, **options: OrtRuntime(path, threads=1))
    ran = shell("optin", "bench", finished, "--engine", "ort-cuda")
    assert ran.code == 0, ran.err
    (row,) = json.loads((finished / "measurements.json").read_text())["latency"]
    assert (row["engine"], row["precision"]) == ("ort-cuda", "fp32")
