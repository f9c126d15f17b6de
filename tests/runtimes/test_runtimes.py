"""The ONNX Runtime and PyTorch runtimes give what numpy gives, and clean up."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.cuda_graph import WARMUP_RUNS
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.runtimes.torch import TorchRuntime

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3)).astype(np.float32)
BIAS = RNG.standard_normal((2, 4)).astype(np.float32)
WEIGHT = RNG.standard_normal((3, 4)).astype(np.float32)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """hidden = x @ WEIGHT + bias (batch free); logits = relu(hidden); both are outputs."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 3), ("bias", 4))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("logits", "hidden")],
        [helper.make_tensor("weight", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel().tolist())],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Tiny(nn.Module):
    """hidden = x @ WEIGHT, offered under the names in `outputs`."""

    def __init__(self, *outputs: str) -> None:
        super().__init__()
        self.outputs = outputs
        self.dense = nn.Linear(3, 4, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.inference = False
        with torch.no_grad():
            self.dense.weight.copy_(torch.from_numpy(WEIGHT.T))
        self.eval()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        self.inference = torch.is_inference_mode_enabled()
        hidden = self.dropout(self.dense(x))
        return {"cache": object(), **{name: hidden + shift for shift, name in enumerate(self.outputs)}}


@pytest.mark.parametrize("threads", [0, 1])
def test_onnx_runtime_agrees_with_numpy(onnx_file: Path, threads: int) -> None:
    with OrtRuntime(onnx_file, threads=threads) as runtime:
        outputs = runtime.run({"x": X, "bias": BIAS})
        runtime.synchronize()
    hidden = X @ WEIGHT + BIAS
    assert list(outputs) == ["logits", "hidden"]
    np.testing.assert_allclose(outputs["hidden"], hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs["logits"], np.maximum(hidden, 0), rtol=0, atol=1e-6)


def test_feeds_that_the_graph_does_not_take_are_left_out(onnx_file: Path) -> None:
    with OrtRuntime(onnx_file) as runtime:
        outputs = runtime.run({"x": X, "token_type_ids": X, "bias": BIAS})
    np.testing.assert_allclose(outputs["hidden"], X @ WEIGHT + BIAS, rtol=0, atol=1e-6)


def test_missing_inputs_are_named(onnx_file: Path) -> None:
    with OrtRuntime(onnx_file) as runtime, pytest.raises(BadInput, match="needs bias, but the feeds are x, other"):
        runtime.run({"x": X, "other": X})


def test_leaving_frees_the_session_also_after_an_error(onnx_file: Path) -> None:
    runtime = OrtRuntime(onnx_file)
    session = weakref.ref(runtime._session)
    with pytest.raises(BadInput), runtime:
        runtime.run({})
    gc.collect()
    assert session() is None
    runtime.close()
    with pytest.raises(BadInput, match="closed"):
        runtime.run({"x": X, "bias": BIAS})


def test_session_options_are_those_of_the_protocol(onnx_file: Path) -> None:
    with OrtRuntime(onnx_file, threads=2) as runtime:
        options = runtime._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
        assert options.graph_optimization_level.name == "ORT_ENABLE_ALL"
        assert runtime._session.get_providers() == ["CPUExecutionProvider"]


def test_a_missing_file_and_negative_threads_are_bad_input(tmp_path: Path, onnx_file: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.onnx"):
        OrtRuntime(tmp_path / "absent.onnx")
    with pytest.raises(BadInput, match="-1"):
        OrtRuntime(onnx_file, threads=-1)
    with pytest.raises(BadInput, match="-1"):
        TorchRuntime(Tiny("logits"), threads=-1)


def test_another_provider_is_refused(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["CUDAExecutionProvider"])
    with pytest.raises(MissingDependency, match="CUDAExecutionProvider"):
        OrtRuntime(onnx_file)


def test_without_onnxruntime_the_error_says_how_to_install_it(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'optin-deploy\[cpu\]'"):
        OrtRuntime(onnx_file)


def test_two_onnxruntimes_are_refused(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = onnx_file.parent / "site"
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (site / f"{name}-1.32.0.dist-info").mkdir(parents=True)
        (site / f"{name}-1.32.0.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.32.0\n"
        )
    monkeypatch.syspath_prepend(site)
    with pytest.raises(MissingDependency, match="pip uninstall -y onnxruntime onnxruntime-gpu && pip install"):
        OrtRuntime(onnx_file)


@pytest.mark.parametrize("names", [("logits",), ("last_hidden_state", "logits"), ("a name of its own",)])
def test_torch_runtime_agrees_with_numpy_in_all_outputs_that_are_tensors(names: tuple[str, ...]) -> None:
    model = Tiny(*names)
    runtime: Runtime = TorchRuntime(model)
    with runtime:
        result = runtime.run({"x": X})
        runtime.synchronize()
    assert tuple(result) == names
    for shift, name in enumerate(names):
        np.testing.assert_allclose(result[name], X @ WEIGHT + shift, rtol=0, atol=1e-6)
    assert model.inference
    assert not torch.is_inference_mode_enabled()


def test_read_only_and_strided_feeds_run_without_a_warning() -> None:
    frozen = np.asfortranarray(X)[::-1]
    frozen.flags.writeable = False
    with TorchRuntime(Tiny("logits")) as runtime:
        result = runtime.run({"x": frozen})
    np.testing.assert_allclose(result["logits"], X[::-1] @ WEIGHT, rtol=0, atol=1e-6)


def test_bfloat16_comes_back_as_float32() -> None:
    class Half(Tiny):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return super().forward(x.bfloat16())

    with TorchRuntime(Half("logits").bfloat16()) as runtime:
        result = runtime.run({"x": X})["logits"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, X @ WEIGHT, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["", "dropout"])
def test_a_model_in_training_mode_is_refused(name: str) -> None:
    model = Tiny("logits")
    model.get_submodule(name).train()
    with pytest.raises(BadInput, match=r"model\.eval\(\)"):
        TorchRuntime(model)
    assert model.get_submodule(name).training


@pytest.mark.parametrize("names", [(), None])
def test_a_model_that_gives_no_tensors_by_name_is_refused(names: tuple[str, ...] | None) -> None:
    class Nameless(Tiny):
        def forward(self, x: torch.Tensor) -> Any:
            return self.dense(x) if names is None else super().forward(x)

    with TorchRuntime(Nameless(*names or ())) as runtime, pytest.raises(BadInput, match="a module that returns a dict"):
        runtime.run({"x": X})


def test_threads_are_set_inside_and_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = before + 1
    with pytest.raises(KeyError), TorchRuntime(Tiny("logits"), threads=inside):
        assert torch.get_num_threads() == inside
        raise KeyError
    assert torch.get_num_threads() == before


def test_nested_runtimes_restore_the_first_number_of_threads() -> None:
    before = torch.get_num_threads()
    model = Tiny("logits")
    with TorchRuntime(model, threads=before + 1), TorchRuntime(model, threads=before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


# ---- launches without transfers


def test_a_launch_of_onnx_runtime_reads_and_writes_bound_memory(onnx_file: Path) -> None:
    given, bias = torch.from_numpy(X.copy()), torch.from_numpy(BIAS)
    with OrtRuntime(onnx_file) as runtime:
        launch = runtime.launcher({"x": given, "bias": bias, "unknown": torch.zeros(1)})
        expected = runtime.run({"x": X, "bias": BIAS})
        found = launch()
        assert not runtime.replays
        for name, values in expected.items():
            found[name].fill_(float("nan"))
            assert launch()[name] is found[name]
            np.testing.assert_array_equal(found[name].numpy(), values)
        given *= 2  # the same memory
        launch()
        doubled = runtime.run({"x": 2 * X, "bias": BIAS})
        assert all(np.array_equal(found[name].numpy(), values) for name, values in doubled.items())


def test_a_launch_of_torch_gives_what_a_run_gives_in_the_models_type() -> None:
    with TorchRuntime(Tiny("logits").bfloat16(), cuda_graph=True) as runtime:
        found = runtime.launcher({"x": torch.from_numpy(X)})()["logits"]
        assert found.dtype == torch.bfloat16
        np.testing.assert_array_equal(found.float().numpy(), runtime.run({"x": X})["logits"])
        assert not runtime.replays  # a CPU records no graph


class FakeCuda:
    """What recording a graph calls of torch.cuda, on the CPU, with a diary."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.diary: list[str] = []
        self.fails = fails
        fakes = {
            "Stream": lambda device: self,
            "current_stream": lambda device: "before",
            "set_stream": lambda stream: self.diary.append(f"back to {stream}"),
            "stream": lambda stream: self.noted("warm-up"),
            "CUDAGraph": lambda: self,
            "graph": lambda graph, **options: self.noted("capture"),
            "synchronize": lambda device: self.diary.append("wait"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    device = torch.device("cpu")

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        self.diary.append(f"{name} on")
        yield
        if self.fails and name == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.diary.append(f"{name} off")

    def synchronize(self) -> None:
        self.diary.append("stream done")

    def replay(self) -> None:
        self.diary.append("replay")


def launcher_with_graph(fake: FakeCuda) -> tuple[TorchRuntime, Any]:
    class Noting(Tiny):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            fake.diary.append("run")
            return super().forward(x)

    runtime = TorchRuntime(Noting("logits"))
    runtime._cuda_graph = True  # the CPU plays the GPU
    return runtime, runtime.launcher({"x": torch.from_numpy(X)})


def test_a_graph_is_recorded_after_warming_up_and_then_only_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    runtime, launch = launcher_with_graph(fake)
    assert runtime.replays
    warm = ["warm-up on", *["run"] * WARMUP_RUNS, "stream done", "warm-up off"]
    assert fake.diary == ["wait", *warm, "capture on", "run", "capture off"]
    fake.diary.clear()
    first, second = launch()["logits"], launch()["logits"]
    assert first is second
    np.testing.assert_allclose(first.numpy(), X @ WEIGHT, rtol=0, atol=1e-6)
    assert fake.diary == ["replay", "replay"]


def test_where_no_graph_can_be_recorded_each_launch_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCuda(monkeypatch, fails=True)
    runtime, launch = launcher_with_graph(fake)
    assert not runtime.replays
    assert "without a CUDA graph: operation not permitted" in caplog.text
    assert fake.diary[-1] == "back to before"
    np.testing.assert_allclose(launch()["logits"].numpy(), X @ WEIGHT, rtol=0, atol=1e-6)
    assert fake.diary[-1] == "run"


def modes() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("tf32", "inside"), [(True, ("high", True)), (False, ("highest", False))])
def test_float32_is_exact_unless_tf32_is_asked_for_and_the_modes_are_restored(
    tf32: bool, inside: tuple[str, bool]
) -> None:
    seen = []

    class Noting(Tiny):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            seen.append(modes())
            raise KeyError

    before = modes()
    runtime = TorchRuntime(Noting("logits"), tf32=tf32)
    for run in (lambda: runtime.run({"x": X}), runtime.launcher({"x": torch.from_numpy(X)})):
        with pytest.raises(KeyError):
            run()
    assert seen == [inside] * 2
    assert modes() == before
