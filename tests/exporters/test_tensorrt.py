"""TensorRT plans, their records and their runtime, on the stand-in of fake_tensorrt.py (the CPU plays the GPU)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.gpu.engines import open_engine
from optin_deploy.common.validation import parse_size
from optin_deploy.errors import BadInput, CannotBuildHere, MissingDependency
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.exporters.profiles import Profile, parse_profile
from optin_deploy.exporters.tensorrt_plan import PlanOptions
from optin_deploy.files.storage import sha256_file
from optin_deploy.jobs.proving import relative_error
from optin_deploy.runtimes import tensorrt as runtime_module
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.runtimes.record import read_record, write_record
from optin_deploy.runtimes.tensorrt import TensorRTRuntime
from optin_deploy.runtimes.tensorrt_bindings import import_tensorrt
from support import fake_tensorrt as fake
from support.tiny_checkpoint import Shell, bert, labelled, text_options
from support.tiny_forms import Tiny, form_of, tiny
from support.tiny_models import main_name, outputs, tiny_batch

SMALL = PlanOptions(profiles=(Profile((1, 2, 4), (4, 16, 32)),))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as the installed TensorRT, and a device to run it on."""
    fake.reset()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    put_device(monkeypatch, ("Fake GPU", "9.0"))
    return fake


def put_device(monkeypatch: pytest.MonkeyPatch, described: tuple[str, str] | None) -> None:
    """Let the CPU pass for a GPU of this name and capability; None: no GPU."""
    device = None if described is None else torch.device("cpu")
    for module in ("optin_deploy.exporters.to_tensorrt", "optin_deploy.runtimes.tensorrt"):
        monkeypatch.setattr(f"{module}.current_gpu", lambda: device)
        monkeypatch.setattr(f"{module}.describe_device", lambda _: described)
    monkeypatch.setattr("optin_deploy.measuring.artifacts.current_gpu", lambda: device)


def pruned(name: str = "bert") -> Tiny:
    return tiny(name, no_neurons=())


def export(case: Tiny, out: Path, *, precision: str = "fp32", options: PlanOptions = SMALL) -> Any:
    out.parent.mkdir(exist_ok=True)
    form = form_of(case.network, out.with_name("model.onnx"), longest=64)
    return exporter("trt").export(form, ExportSpec(precision, options=options), out)


def feeds_of(case: Tiny, *, batch: int, seq_len: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny_batch(case.model, batch=batch, seq_len=seq_len).items()}


# ---- the command


def test_one_command_builds_proves_and_measures_plans(trt: Any, tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "job"
    options = [*text_options(labelled(), out), "--engine", "trt", "--profile", "batch=1,2,4", "seq=4,16,32"]
    ran = shell("optin-export", bert(), *options)
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["parity"]["torch_vs_engine"] < 2e-2
    assert report["parity"]["torch_vs_onnx_fp32"] < 1e-4
    kinds = ("engine", "precision", "dense_engine", "dense_precision")
    rows = [tuple(row[kind] for kind in kinds) for row in report["latency"]]
    assert rows == [("trt", "fp16", "trt", "fp16"), ("trt", "fp16", "torch", "fp32")]
    judged = [(row["engine"], row["precision"], row["which"]) for row in report["artifacts"]]
    typed = [(engine, "fp16", which) for engine in ("onnx", "trt") for which in ("dense", "pruned")]
    assert judged == [("torch", "fp32", "dense"), ("torch", "fp32", "pruned"), *typed]
    names = {"model.engine", "dense.engine", "model.fp16.onnx", "dense.fp16.onnx", "model.onnx", "dense.onnx"}
    assert names <= set(report["hashes"])
    assert names | {"engine.json", "model.engine.log", "timing.cache"} <= {path.name for path in out.iterdir()}
    assert (out / "model.engine").stat().st_size < (out / "dense.engine").stat().st_size
    assert "INFO: building" in (out / "model.engine.log").read_text()


def test_bench_runs_the_plans_that_build_left(trt: Any, tmp_path: Path, shell: Shell, finished: Path) -> None:
    sizes = ["--profile", "batch=1,2,4 seq=4,16,32"]
    assert shell("optin", "build", finished, "--engine", "trt", *sizes).code == 0
    ran = shell("optin", "bench", finished, "--engine", "trt", "--at", "batch=2,seq=16")
    assert ran.code == 0, ran.err
    outside = shell("optin", "bench", finished, "--engine", "trt", "--at", "batch=8,seq=16")
    assert outside.code == 2
    assert "(4, 32)" in outside.err
    assert "--profile" in outside.err


def test_bench_times_both_plans_on_the_device_with_and_without_graphs(
    trt: Any, monkeypatch: pytest.MonkeyPatch, shell: Shell, finished: Path
) -> None:
    opened: list[tuple[str, bool]] = []

    class Noting(TensorRTRuntime):
        def __init__(self, path: Path, *, engine: str, cuda_graph: bool) -> None:
            super().__init__(path, engine=engine, cuda_graph=cuda_graph)
            opened.append((path.name, cuda_graph))

        @property
        def replays(self) -> bool:  # the stand-in records no graphs
            return opened[-1][1]

    monkeypatch.setattr("optin_deploy.exporters.to_tensorrt.TensorRTRuntime", Noting)
    monkeypatch.setattr("optin_deploy.measuring.timing.MAX_ROUNDS", 3)
    monkeypatch.setattr("optin_deploy.measuring.device_clock.STRETCH_MS", 0.0)
    assert shell("optin", "build", finished, "--engine", "trt", "--profile", "batch=1,2,4 seq=4,16,32").code == 0
    opened.clear()
    ran = shell("optin", "bench", finished, "--engine", "trt", "--at", "batch=2,seq=16", "--device-time")
    assert ran.code == 0, ran.err
    assert "Transfers in and out are in the ordinary figures and not in these" in ran.out
    (row,) = json.loads((finished / "measurements.json").read_text())["latency"]
    found = row["device_time"]
    assert set(found) == {"cuda_graph", "no_cuda_graph", "transfers_ms"}
    assert all(found[way][name]["p50_ms"] > 0 for way in list(found)[:2] for name in ("dense", "pruned"))
    # Each of 2 blocks opens dense twice; the ordinary figures are with graphs too.
    assert Counter(opened) == {
        ("dense.engine", True): 8,
        ("model.engine", True): 4,
        ("dense.engine", False): 4,
        ("model.engine", False): 2,
    }


def test_a_runtime_of_the_stand_in_replays_nothing(trt: Any, tmp_path: Path) -> None:
    model = pruned()
    path = export(model, tmp_path / "model.engine").path
    with exporter("trt").open_device(path, cuda_graph=True) as runtime:
        assert not runtime.replays
        runtime.launcher(tiny_batch(model.model, batch=1, seq_len=4))
        assert not runtime.replays
        next(iter(runtime._bound.values())).graph = object()
        assert runtime.replays


def test_a_point_outside_of_every_profile_is_refused_before_the_work(trt: Any, tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "job"
    options = [*text_options(labelled(), out), "--engine", "trt", "--profile", "batch=4", "seq=16"]
    ran = shell("optin-export", bert(), *options)
    assert ran.code == 2
    assert "batch=1,seq=16" in ran.err
    assert "batch=4,4,4 seq=16,16,16" in ran.err
    assert not out.exists()


@pytest.mark.parametrize("engine", ["onnx", "torch", "aoti", "ort-cuda"])
def test_options_of_plans_are_refused_by_engines_without_plans(shell: Shell, finished: Path, engine: str) -> None:
    ran = shell("optin", "build", finished, "--engine", engine, "--weights", "stripped")
    assert ran.code == 2
    assert f"engine {engine} has none" in ran.err


# ---- what the builder is told


def test_profiles_reach_the_builder_and_end_at_the_position_table(trt: Any, tmp_path: Path) -> None:
    profiles = (parse_profile("batch=1,8,32 seq=16,48,384"), parse_profile("batch=64 seq=8"))
    artifact = export(pruned(), tmp_path / "model.engine", options=PlanOptions(profiles=profiles))
    first, second = (profile._shapes["input_ids"] for profile in trt.built[-1]._profiles)
    assert first == [[1, 16], [8, 48], [32, 64]]  # the tiny table holds 64 positions
    assert second == [[64, 8]] * 3
    assert artifact.shapes == ((1, 16), (8, 48), (32, 64), (64, 8), (64, 8), (64, 8))


def test_images_have_profiles_of_the_batch_alone(trt: Any, tmp_path: Path) -> None:
    export(pruned("vit+head"), tmp_path / "model.engine")
    assert trt.built[-1]._profiles[0]._shapes["pixel_values"] == [[b, 3, 32, 32] for b in (1, 2, 4)]


def test_options_reach_the_builder(trt: Any, tmp_path: Path) -> None:
    given = PlanOptions(SMALL.profiles, parse_size("512MiB", "--workspace"), ("version", "hardware"), "stripped")
    export(pruned(), tmp_path / "model.engine", options=given)
    config = trt.built[-1]
    assert config._workspace == 512 * 2**20
    assert config._flags == {trt.BuilderFlag.VERSION_COMPATIBLE, trt.BuilderFlag.STRIP_PLAN}
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("tf32", True)])
def test_float32_is_rounded_to_tf32_only_when_asked(trt: Any, tmp_path: Path, precision: str, rounded: bool) -> None:
    export(pruned(), tmp_path / "model.engine", precision=precision)
    assert (trt.BuilderFlag.TF32 in trt.built[-1]._flags) is rounded


@pytest.mark.parametrize(("precision", "elem_type"), [("fp32", 1), ("fp16", 10)])
def test_precision_comes_from_the_types_in_the_graph(trt: Any, tmp_path: Path, precision: str, elem_type: int) -> None:
    export(pruned(), tmp_path / "model.engine", precision=precision)
    proto = onnx.load(tmp_path / read_record(tmp_path / "model.engine").onnx)
    types = {t.data_type for t in proto.graph.initializer if len(t.dims) == 2} - {onnx.TensorProto.INT64}
    assert types == {elem_type}


def test_the_timing_cache_is_read_and_extended(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "kernels.cache"
    cache.write_bytes(b"old;")
    options = PlanOptions(SMALL.profiles, timing_cache=cache)
    export(pruned(), tmp_path / "model.engine", options=options)
    assert cache.read_bytes() == b"old;measured;"


@pytest.mark.parametrize("refusal", ["create_timing_cache", "set_timing_cache"])
def test_a_timing_cache_of_another_device_costs_no_plan(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    honest = getattr(fake.IBuilderConfig, refusal)

    def refuses(self: Any, given: Any, *rest: Any) -> Any:
        foreign = b"foreign" in (given if isinstance(given, bytes) else given._known)
        return (
            {"create_timing_cache": None, "set_timing_cache": False}[refusal] if foreign else honest(self, given, *rest)
        )

    monkeypatch.setattr(fake.IBuilderConfig, refusal, refuses)
    (tmp_path / "timing.cache").write_bytes(b"foreign")
    assert export(pruned(), tmp_path / "model.engine").size_bytes > 0
    assert (tmp_path / "timing.cache").read_bytes() == b"measured;"
    assert "timed anew" in (tmp_path / "model.engine.log").read_text()


def test_a_finished_plan_is_not_built_again_but_a_changed_one_is(trt: Any, tmp_path: Path) -> None:
    out = tmp_path / "model.engine"
    for options in (SMALL, SMALL, PlanOptions(SMALL.profiles, weights="refittable")):
        export(pruned(), out, options=options)
    assert len(trt.built) == 2
    out.write_bytes(out.read_bytes()[:-1])
    export(pruned(), out, options=PlanOptions(SMALL.profiles, weights="refittable"))
    assert len(trt.built) == 3


@pytest.mark.parametrize(
    "text", ["", "batch=8,1,2", "batch=0,1,2", "batch=1,2", "batch=a", "tokens=1", "batch=1 batch=2"]
)
def test_impossible_profiles_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--profile"):
        parse_profile(text)


@pytest.mark.parametrize("text", ["4GB", "GiB", "-1", "0", "1.5GiB", ""])
def test_impossible_workspace_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--workspace"):
        parse_size(text, "--workspace")


@pytest.mark.parametrize("options", [{"compatible": ("everything",)}, {"weights": "none"}])
def test_unknown_options_are_refused_with_what_is_possible(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="possible: "):
        PlanOptions(**options)


# ---- the runtime


@pytest.mark.parametrize("name", ["bert", "vit+head"])
def test_a_plan_computes_what_the_model_computes_at_every_corner(trt: Any, tmp_path: Path, name: str) -> None:
    model = pruned(name)
    artifact = export(model, tmp_path / "model.engine")
    with TensorRTRuntime(artifact.path) as runtime:
        for batch, seq_len in artifact.shapes:
            inputs = tiny_batch(model.model, batch=batch, seq_len=seq_len)
            expected = outputs(model.reference, inputs, states=False)
            found = runtime.run({k: v.numpy() for k, v in inputs.items()})
            assert relative_error(expected[main_name(expected)].numpy(), found[artifact.outputs[0]]) < 1e-5


def test_each_profile_takes_its_own_shapes(trt: Any, tmp_path: Path) -> None:
    model = pruned()
    options = PlanOptions(profiles=(Profile((1, 1, 1), (4, 4, 4)), Profile((2, 2, 3), (8, 8, 16))))
    artifact = export(model, tmp_path / "model.engine", options=options)
    with TensorRTRuntime(artifact.path) as runtime:
        for batch, seq_len in ((1, 4), (3, 16), (1, 4)):
            feeds = feeds_of(model, batch=batch, seq_len=seq_len)
            expected = OrtRuntime(tmp_path / "model.onnx").run(feeds)["last_hidden_state"]
            np.testing.assert_array_equal(runtime.run(feeds)["last_hidden_state"], expected)
        with pytest.raises(BadInput, match=r"\(1, 4\) to \(1, 4\) or \(2, 8\) to \(3, 16\)"):
            runtime.run(feeds_of(model, batch=1, seq_len=8))


def test_of_two_fitting_profiles_the_narrower_one_is_used(trt: Any, tmp_path: Path) -> None:
    model = pruned()
    options = PlanOptions(profiles=(Profile((1, 2, 4), (4, 16, 32)), Profile((1, 1, 1), (4, 8, 8))))
    with TensorRTRuntime(export(model, tmp_path / "model.engine", options=options).path) as runtime:
        for batch, seq_len in ((1, 8), (2, 8), (1, 16)):
            runtime.run(feeds_of(model, batch=batch, seq_len=seq_len))
        assert [bound.context._profile for bound in runtime._bound.values()] == [1, 0, 0]


def test_a_closed_runtime_says_so(trt: Any, tmp_path: Path) -> None:
    runtime = TensorRTRuntime(export(pruned(), tmp_path / "model.engine").path)
    runtime.close()
    runtime.close()
    with pytest.raises(BadInput, match="closed"):
        runtime.run({})


def test_later_runs_allocate_nothing(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    with TensorRTRuntime(export(model, tmp_path / "model.engine").path) as runtime:
        first = {k: v.copy() for k, v in runtime.run(feeds_of(model, batch=2, seq_len=8)).items()}
        other = dict(feeds_of(model, batch=2, seq_len=8))
        other["input_ids"] = other["input_ids"][:, ::-1]
        for name in ("empty", "zeros", "from_numpy", "tensor"):
            monkeypatch.setattr(torch, name, None)
        again = runtime.run(other)["last_hidden_state"]
        assert not np.array_equal(first["last_hidden_state"], again)
        assert runtime.run(other)["last_hidden_state"] is again  # the same memory


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_gpu_suite_launches_plans_on_inputs_that_are_there(trt: Any, name: str) -> None:
    model = pruned(name)
    inputs = tiny_batch(model.model, batch=3, seq_len=8)
    inputs.pop("attention_mask", None)  # the suite's full inputs have none
    with open_engine("trt", model.reference, inputs, "fp32") as run:
        expected = outputs(model.reference, inputs, states=False)["last_hidden_state"]
        assert relative_error(expected.numpy(), run().numpy()) < 1e-5
        assert run() is run()
    assert [p._shapes[next(iter(inputs))][0][0] for p in trt.built[-1]._profiles] == [3]


def test_buffers_of_the_oldest_shape_are_dropped(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "KEPT_SHAPES", 2)
    model = pruned()
    with TensorRTRuntime(export(model, tmp_path / "model.engine").path) as runtime:
        for seq_len in (4, 5, 4, 6):
            runtime.run(feeds_of(model, batch=1, seq_len=seq_len))
        assert [shapes[0] for shapes in runtime._bound] == [(1, 4), (1, 6)]


def test_a_missing_input_is_named(trt: Any, tmp_path: Path) -> None:
    with (
        TensorRTRuntime(export(pruned(), tmp_path / "model.engine").path) as runtime,
        pytest.raises(BadInput, match="attention_mask"),
    ):
        runtime.run({"input_ids": np.ones((1, 4), dtype=np.int64), "token_type_ids": np.ones((1, 4), dtype=np.int64)})


def test_a_failing_launch_is_an_error_not_an_old_answer(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    with TensorRTRuntime(export(model, tmp_path / "model.engine").path) as runtime:
        feeds = feeds_of(model, batch=1, seq_len=4)
        runtime.run(feeds)
        monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(BadInput, match="failed"):
            runtime.run(feeds)


def test_a_plan_without_weights_takes_them_from_the_onnx_beside_it(trt: Any, tmp_path: Path) -> None:
    model = pruned()
    artifact = export(model, tmp_path / "model.engine", options=PlanOptions(SMALL.profiles, weights="stripped"))
    feeds = feeds_of(model, batch=2, seq_len=8)
    with TensorRTRuntime(artifact.path) as runtime:
        expected = OrtRuntime(tmp_path / "model.onnx").run(feeds)["last_hidden_state"]
        np.testing.assert_array_equal(runtime.run(feeds)["last_hidden_state"], expected)
    record, data = read_record(artifact.path), tmp_path / "model.onnx.data"
    data.write_bytes(b"weights")
    write_record(artifact.path, replace(record, onnx_data={data.name: sha256_file(data)}))
    TensorRTRuntime(artifact.path).close()
    data.write_bytes(b"other weights")
    with pytest.raises(BadInput, match=r"model\.onnx\.data is not the file they came from"):
        TensorRTRuntime(artifact.path)
    (tmp_path / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(BadInput, match=r"model\.onnx is not the file they came from"):
        TensorRTRuntime(artifact.path)


# ---- what must not be loaded


def test_a_plan_of_another_device_is_refused_before_it_is_loaded(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    put_device(monkeypatch, ("Other GPU", "8.6"))
    monkeypatch.setattr(fake.Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(BadInput, match=r"built for Fake GPU \(compute capability 9\.0\).*8\.6.*optin build"):
        TensorRTRuntime(artifact.path)


def test_a_plan_of_another_version_is_refused_before_it_is_loaded(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    monkeypatch.setattr(fake, "__version__", "10.13.0.35")
    monkeypatch.setattr(fake.Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(BadInput, match=r"version 10\.12\.0\.36, but 10\.13\.0\.35.*optin build"):
        TensorRTRuntime(artifact.path)


@pytest.mark.parametrize(("version", "loads"), [("10.14.0", True), ("10.2.0", False), ("11.4.0", False)])
def test_version_compatible_plans_load_in_later_versions_of_the_same_major(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, loads: bool
) -> None:
    artifact = export(pruned(), tmp_path / "model.engine", options=PlanOptions(SMALL.profiles, compatible=("version",)))
    monkeypatch.setattr(fake, "__version__", version)
    if not loads:
        with pytest.raises(BadInput, match="was built with version"):
            TensorRTRuntime(artifact.path)
        return
    with TensorRTRuntime(artifact.path) as runtime:
        assert runtime._runtime.engine_host_code_allowed


@pytest.mark.parametrize(("capability", "loads"), [("8.0", True), ("12.0", True), ("7.5", False)])
def test_hardware_compatible_plans_run_from_ampere_on(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, loads: bool
) -> None:
    options = PlanOptions(SMALL.profiles, compatible=("hardware",))
    artifact = export(pruned(), tmp_path / "model.engine", options=options)
    put_device(monkeypatch, ("Other GPU", capability))
    if loads:
        TensorRTRuntime(artifact.path).close()
    else:
        with pytest.raises(BadInput, match="compute capability"):
            TensorRTRuntime(artifact.path)


def test_a_file_that_was_exchanged_is_refused(trt: Any, tmp_path: Path) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    artifact.path.write_bytes(artifact.path.read_bytes()[:-1] + b"?")
    with pytest.raises(BadInput, match=r"not the file that engine\.json describes"):
        TensorRTRuntime(artifact.path)


def test_a_plan_without_a_record_is_refused(trt: Any, tmp_path: Path) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    (tmp_path / "engine.json").unlink()
    with pytest.raises(BadInput, match="does not describe"):
        TensorRTRuntime(artifact.path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 1, "engines": {"model.engine": {"engine": 5}}}'])
def test_a_damaged_record_is_refused(trt: Any, tmp_path: Path, text: str) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BadInput, match=r"engine\.json"):
        TensorRTRuntime(artifact.path)
    export(pruned(), tmp_path / "other" / "model.engine")  # elsewhere nothing is in the way


def test_a_new_build_mends_a_damaged_record(trt: Any, tmp_path: Path) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    (tmp_path / "engine.json").write_text("[]")
    export(pruned(), tmp_path / "model.engine")
    TensorRTRuntime(artifact.path).close()


def test_a_plan_passes_for_no_other_precision(trt: Any, tmp_path: Path) -> None:
    artifact = export(pruned(), tmp_path / "model.engine", precision="fp32")
    exporter("trt").open(artifact.path, precision="fp32").close()
    with pytest.raises(BadInput, match=r"a plan in fp32, not fp16.*--precision fp16"):
        exporter("trt").open(artifact.path, precision="fp16")


def test_what_tensorrt_says_of_a_plan_it_does_not_load_is_shown(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fake.Builder, "build_serialized_network", lambda self, network, config: fake.IHostMemory(b"no plan")
    )
    artifact = export(pruned(), tmp_path / "model.engine")
    with pytest.raises(BadInput, match="magic tag does not match"):
        TensorRTRuntime(artifact.path)


# ---- where no plan can be built


def test_a_builder_that_gives_no_plan_is_a_failure_with_its_words(trt: Any, tmp_path: Path) -> None:
    trt.refuse_to_build.append("could not find any implementation for node LayerNorm")
    with pytest.raises(CannotBuildHere, match="could not find any implementation for node LayerNorm"):
        export(pruned(), tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()
    assert "ERROR: could not find any" in (tmp_path / "model.engine.log").read_text()


def test_nodes_that_the_parser_does_not_know_are_named(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.OnnxParser, "parse", lambda self, model, path: self._errors.append("no importer for Gelu"))
    with pytest.raises(CannotBuildHere, match=r"parser refused.*no importer for Gelu.*optin doctor"):
        export(pruned(), tmp_path / "model.engine")


def test_without_tensorrt_the_target_gets_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CannotBuildHere) as caught:
        export(pruned(), tmp_path / "model.engine", precision="fp16")
    said = str(caught.value)
    assert "TensorRT is not installed" in said
    assert "optin build " in said
    assert '--profile "batch=1,2,4 seq=4,16,32"' in said
    assert "--optShapes=input_ids:2x16,attention_mask:2x16,token_type_ids:2x16" in said
    assert "Preflight" not in said
    assert (tmp_path / "model.fp16.onnx").is_file()


@pytest.mark.parametrize("error", [ImportError("libnvinfer.so.10: cannot open shared object file"), OSError("bad ELF")])
def test_libraries_that_do_not_load_are_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("optin_deploy.runtimes.tensorrt_bindings.import_module", fail)
    with pytest.raises(MissingDependency, match=f"{error}.*optin doctor"):
        import_tensorrt("trt")


@pytest.mark.parametrize("version", ["10.11.0.33", "8.6.1", "12.0.0"])
def test_versions_without_the_calls_used_here_are_refused(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(fake, "__version__", version)
    with pytest.raises(CannotBuildHere, match=rf"TensorRT {version} is installed; 10\.12 to 11"):
        export(pruned(), tmp_path / "model.engine")


def test_without_a_gpu_nothing_is_built_or_run(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = export(pruned(), tmp_path / "model.engine")
    put_device(monkeypatch, None)
    with pytest.raises(BadInput, match="no CUDA device is visible"):
        TensorRTRuntime(artifact.path)
    with pytest.raises(CannotBuildHere, match="no CUDA device is visible"):
        export(pruned(), tmp_path / "model.engine")
