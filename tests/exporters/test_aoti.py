"""AOTInductor packages: equal to the model, refused where they could crash; and compiled torch, without compiling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_deploy.checkpoint.smaller import MANIFEST
from optin_deploy.errors import BadInput, CannotBuildHere
from optin_deploy.exporters import exporter, to_aoti, to_torch
from optin_deploy.exporters.base import Artifact, ExportSpec, Form
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.files.storage import sha256_file
from optin_deploy.runtimes import aoti
from optin_deploy.runtimes import torch as torch_runtime
from optin_deploy.runtimes.aoti import AotiRuntime
from optin_deploy.runtimes.device import NO_GPU
from optin_deploy.runtimes.record import read_record
from support.tiny_forms import Tiny, form_of, module_in, tiny
from support.tiny_models import error, outputs, tiny_batch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
"""Packages are compiled as C++, which takes half a minute."""

SPEC = ExportSpec(head=EmbeddingHead("mean"))


def case() -> Tiny:
    """One layer lost all heads."""
    return tiny("bert", no_neurons=())


def pruned_bert() -> Any:
    return case().reference


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    folder = tmp_path_factory.mktemp("form")
    about = {"module": module_in(case(), folder / "model"), "longest": 64}
    return form_of(case().network, folder / "model.onnx", head=EmbeddingHead("mean"), **about)


@pytest.fixture(scope="module")
def compiled(form: Form, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The one package of this file; its C++ is compiled without optimisation, in a third of the time."""
    quick = {"debug_compile": True, "compile_wrapper_opt_level": "O0", "precompile_headers": False}
    with torch._inductor.config.patch({f"aot_inductor.{name}": value for name, value in quick.items()}):
        return exporter("aoti").export(form, SPEC, tmp_path_factory.mktemp("aoti") / "model.pt2")


@pytest.fixture
def package(compiled: Artifact, tmp_path: Path) -> Path:
    """A copy of the package with its record."""
    shutil.copytree(compiled.path.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model.pt2"


class Loading(Exception):
    """Raised where the package would be loaded, compiled or traced."""


def stopped(*args: object, **kwargs: object) -> None:
    raise Loading


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", stopped)


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", stopped)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", stopped)


# ---- what it computes


def test_a_package_computes_what_the_model_computes_at_other_sizes(package: Path) -> None:
    model = pruned_bert().eval()
    with exporter("aoti").open(package) as runtime:
        for batch, seq_len in ((1, 7), (5, 23), (3, 64), (1, 7)):  # traced with 2 x 13
            inputs = tiny_batch(model, batch=batch, seq_len=seq_len)
            expected = outputs(model, inputs, states=False)["last_hidden_state"]
            found = runtime.run({name: value.numpy() for name, value in inputs.items()})
            runtime.synchronize()
            assert list(found) == ["last_hidden_state", POOLED]
            assert error(expected, torch.from_numpy(found["last_hidden_state"])) < 1e-5
            real = inputs["attention_mask"].unsqueeze(-1)
            mean = (expected * real).sum(1) / real.sum(1)
            assert error(mean, torch.from_numpy(found[POOLED])) < 1e-5


def test_a_launch_without_transfers_gives_what_a_run_gives(package: Path) -> None:
    inputs = tiny_batch(pruned_bert(), batch=3, seq_len=9)
    with exporter("aoti").open_device(package) as runtime:
        launch = runtime.launcher(inputs)
        expected = runtime.run({name: value.numpy() for name, value in inputs.items()})
        for found in (launch(), launch()):
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name].numpy(), expected[name]) for name in expected)
        assert not runtime.replays
    with pytest.raises(BadInput, match="closed"):
        launch()


def test_pruning_shows_in_the_package(package: Path) -> None:
    model = case().model
    inputs = tiny_batch(model, batch=2, seq_len=16)
    with AotiRuntime(package) as runtime:
        found = runtime.run({name: value.numpy() for name, value in inputs.items()})["last_hidden_state"]
    assert error(outputs(model, inputs, states=False)["last_hidden_state"], torch.from_numpy(found)) > 0.1


def test_read_only_and_strided_feeds_in_any_order_run_without_a_warning(package: Path) -> None:
    model = pruned_bert().eval()
    inputs = tiny_batch(model, batch=3, seq_len=9)
    feeds = {name: np.asfortranarray(value.numpy()) for name, value in reversed(inputs.items())}
    for array in feeds.values():
        array.flags.writeable = False
    with AotiRuntime(package) as runtime:
        found = runtime.run({**feeds, "unknown": np.zeros(1)})["last_hidden_state"]
    assert error(outputs(model, inputs, states=False)["last_hidden_state"], torch.from_numpy(found)) < 1e-5


def test_a_missing_input_is_named(package: Path) -> None:
    with (
        AotiRuntime(package) as runtime,
        pytest.raises(BadInput, match=r"needs attention_mask, .*Give all of: input_ids"),
    ):
        runtime.run({name: np.ones((1, 4), dtype=np.int64) for name in ("input_ids", "token_type_ids")})


def test_threads_are_set_inside_and_restored_after_an_error(package: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), exporter("aoti").open(package, threads=before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


# ---- the record, and what must not be loaded


def test_the_record_says_what_the_package_fits(compiled: Artifact) -> None:
    artifact = compiled
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["engine.json", "model.pt2"]
    record = read_record(artifact.path)
    assert (record.engine, record.precision, record.version) == ("aoti", "fp32", torch.__version__)
    assert record.capability == torch.backends.cpu.get_cpu_capability()
    assert record.device
    assert (record.sha256, record.size_bytes) == (sha256_file(artifact.path), artifact.path.stat().st_size)
    assert (artifact.sha256, artifact.size_bytes) == (record.sha256, record.size_bytes)
    assert (artifact.engine, artifact.precision) == ("aoti", "fp32")
    assert artifact.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert artifact.outputs == ("last_hidden_state", POOLED)
    assert artifact.versions == {"torch": torch.__version__}
    assert not artifact.shapes  # every shape is taken


@pytest.mark.usefixtures("no_loading")
def test_a_package_of_another_torch_is_refused_before_it_is_loaded(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(
        BadInput, match=r"built with version 2\..*but 2\.99\.0 is installed.*optin build .*--engine aoti"
    ):
        AotiRuntime(package)


@pytest.mark.usefixtures("no_loading")
def test_a_package_for_other_instructions_is_refused_before_it_is_loaded(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "describe_device", lambda device: ("Other CPU", "NO AVX"))
    with pytest.raises(BadInput, match=r"this device has NO AVX.*optin build"):
        AotiRuntime(package)


@pytest.mark.usefixtures("no_loading")
def test_an_exchanged_or_unknown_package_is_refused_before_it_is_loaded(package: Path) -> None:
    whole = package.read_bytes()
    for other in (whole[:-1] + b"?", whole[:-1], b""):
        package.write_bytes(other)
        with pytest.raises(BadInput, match=r"not the file that engine\.json describes.*optin build"):
            AotiRuntime(package)
    package.write_bytes(whole)
    with pytest.raises(Loading):  # the right one would be
        AotiRuntime(package)
    (package.parent / "engine.json").unlink()
    with pytest.raises(BadInput, match="does not describe"):
        AotiRuntime(package)
    package.unlink()
    with pytest.raises(BadInput, match="There is no engine"):
        AotiRuntime(package)


# ---- when it is compiled


@pytest.mark.usefixtures("no_compiling")
def test_a_finished_package_is_not_compiled_again(package: Path, form: Form) -> None:
    before = package.stat().st_mtime_ns
    artifact = exporter("aoti").export(form, SPEC, package)
    assert artifact.sha256 == sha256_file(package)
    assert package.stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize(
    "spec", [ExportSpec(), ExportSpec("fp16", head=EmbeddingHead("mean"))], ids=["no pooling", "precision"]
)
def test_other_settings_compile_it_again(package: Path, form: Form, spec: ExportSpec) -> None:
    before = package.read_bytes()
    with pytest.raises(Loading):
        exporter("aoti").export(form, spec, package)
    assert package.read_bytes() == before  # a failed compilation leaves the old one


@pytest.mark.usefixtures("no_compiling")
def test_another_network_compiles_it_again(package: Path, tmp_path: Path) -> None:
    other = form_of(tiny("bert").network, tmp_path / "model.onnx", head=EmbeddingHead("mean"))
    with pytest.raises(Loading):
        exporter("aoti").export(other, SPEC, package)


@pytest.mark.usefixtures("no_compiling")
def test_another_device_compiles_it_again(package: Path, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_aoti, "describe_device", lambda device: ("Other CPU", "NO AVX"))
    with pytest.raises(Loading):
        exporter("aoti").export(form, SPEC, package)


@pytest.mark.usefixtures("no_compiling")
def test_a_failed_compilation_writes_nothing(form: Form, tmp_path: Path) -> None:
    with pytest.raises(Loading):
        exporter("aoti").export(form, SPEC, tmp_path / "out" / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_graph_without_a_module_is_not_traced_and_the_other_engines_are_named(tmp_path: Path) -> None:
    """Its sizes are tensors, on which torch.export cannot build."""
    graph = form_of(tiny("bert").network, tmp_path / "model.onnx")
    with pytest.raises(CannotBuildHere, match=r"torch\.export cannot trace.*--engine onnx, openvino or torch"):
        exporter("aoti").export(graph, ExportSpec(), tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_cannot_be_traced_is_told_and_writes_nothing(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("data-dependent\nmuch more")

    monkeypatch.setattr(torch.export, "export", refused)
    with pytest.raises(CannotBuildHere, match=r"cannot trace.*RuntimeError: data-dependent\).*--engine onnx"):
        exporter("aoti").export(form, SPEC, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("no_compiler", "no_compiling")
def test_without_a_compiler_nothing_is_written_and_the_next_step_is_said(form: Form, tmp_path: Path) -> None:
    with pytest.raises(CannotBuildHere, match=r"C\+\+ compiler.*optin build .* --engine aoti --precision fp16"):
        exporter("aoti").export(form, ExportSpec("fp16"), tmp_path / "model.fp16.pt2")
    assert not list(tmp_path.iterdir())
    assert "C++ compiler" in str(exporter("aoti").cannot_build())


@pytest.mark.usefixtures("no_compiler")
def test_a_finished_package_needs_no_compiler(package: Path, form: Form) -> None:
    assert exporter("aoti").obstacle("fp32") is None
    assert exporter("aoti").export(form, SPEC, package).path == package
    with AotiRuntime(package) as runtime:
        runtime.run({name: value.numpy() for name, value in tiny_batch(pruned_bert(), batch=1, seq_len=4).items()})


# ---- torch-compile


@pytest.fixture
def compile_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What torch.compile was asked for; it gives the function back."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def spy(function: Any, **options: Any) -> Any:
        calls.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", spy)
    return calls


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Passes for the folder of a pruned model."""
    (tmp_path / MANIFEST).touch()
    monkeypatch.setattr(to_torch, "load", lambda path: pruned_bert())
    return tmp_path


def test_compiled_torch_compiles_each_shape_by_default_on_the_cpu(
    stored: Path, compile_calls: list[tuple[Any, dict[str, Any]]]
) -> None:
    model = pruned_bert().eval()
    inputs = tiny_batch(model, batch=2, seq_len=9)
    with exporter("torch-compile").open(stored, threads=1) as runtime:
        assert runtime.engine == "torch-compile"
        found = runtime.run({name: value.numpy() for name, value in inputs.items()})["last_hidden_state"]
    ((function, options),) = compile_calls
    assert function.__self__.config.model_type == "bert"
    assert (options["mode"], options["dynamic"]) == ("default", False)
    assert error(outputs(model, inputs, states=False)["last_hidden_state"], torch.from_numpy(found)) < 1e-6


def test_compiled_torch_uses_autotuned_graphs_on_a_gpu(
    stored: Path, compile_calls: list[tuple[Any, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_torch, "current_gpu", lambda: torch.device("cpu"))  # stands for one
    exporter("torch-compile").open(stored)
    exporter("torch-compile").open_device(stored)  # a launcher records a graph of its own
    modes = [(options["mode"], options["dynamic"]) for _, options in compile_calls]
    assert modes == [("max-autotune", False), ("max-autotune-no-cudagraphs", False)]


def test_only_a_gpu_rounds_to_tf32() -> None:
    assert exporter("torch").obstacle("tf32") == exporter("torch-compile").obstacle("tf32") == NO_GPU


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_model_that_is_compiled_has_the_asked_type(
    stored: Path, compile_calls: list[tuple[Any, dict[str, Any]]], precision: str, dtype: torch.dtype
) -> None:
    exporter("torch-compile").open(stored, precision=precision)
    ((function, _),) = compile_calls
    assert {parameter.dtype for parameter in function.__self__.parameters()} == {dtype}


def test_compiled_torch_without_a_compiler_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = exporter("torch-compile")
    assert chosen.obstacle("fp32") is None
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert "C++ compiler" in str(chosen.obstacle("fp32"))
    assert chosen.cannot_build() is None  # its artifact is the model itself
    assert exporter("torch").obstacle("fp32") is None


@pytest.fixture
def quick_compiler(stored: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile with its real tracing and its real limits, but no code generation; the graphs it made."""
    real, graphs = torch.compile, []

    def compiler(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_quickly(function: Any, **options: Any) -> Any:
        return real(function, backend=compiler, **{k: v for k, v in options.items() if k != "mode"})

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=False):
        yield graphs
    torch.compiler.reset()


def run_once(stored: Path, batch: int) -> None:
    with exporter("torch-compile").open(stored) as runtime:
        inputs = tiny_batch(pruned_bert(), batch=batch, seq_len=8)
        runtime.run({name: value.numpy() for name, value in inputs.items()})


def test_more_points_than_torch_allows_by_default_are_all_compiled(stored: Path, quick_compiler: list[Any]) -> None:
    for batch in range(2, 6):
        run_once(stored, batch)
    assert len(quick_compiler) == 4


def test_past_the_limit_is_an_error_not_an_eager_run(
    stored: Path, quick_compiler: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runtime, "SHAPES", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        run_once(stored, 2)
        run_once(stored, 3)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run_once(stored, 4)
    assert len(quick_compiler) == 2


def test_both_torch_engines_refuse_pooling(form: Form, tmp_path: Path) -> None:
    for engine in ("torch", "torch-compile"):
        with pytest.raises(BadInput, match="--pool needs a graph"):
            exporter(engine).export(form, SPEC, tmp_path)


def test_the_record_is_json_that_a_person_can_read(package: Path) -> None:
    stored = json.loads((package.parent / "engine.json").read_text())
    assert stored["schema_version"] == 1
    assert stored["engines"]["model.pt2"]["version"] == torch.__version__
