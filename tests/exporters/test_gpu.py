"""Every engine on a real GPU against float32 torch on the CPU.

Runs alone: `python -m pytest tests/exporters/test_gpu.py`. Needs the checkout, torch, transformers
and onnx; the engines that are not installed are skipped by their own words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from optin_deploy.checkpoint.smaller import MANIFEST
from optin_deploy.cutting.torch import cut_and_tell
from optin_deploy.errors import MissingDependency
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.exporters.base import Artifact, DeviceExporter, ExportSpec
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.exporters.profiles import Profile
from optin_deploy.exporters.tensorrt_plan import PlanOptions
from optin_deploy.jobs.proving import relative_error
from optin_deploy.measuring.device_time import measure_device_time
from optin_deploy.measuring.timing import measure_pair
from optin_deploy.network.examples import example_of
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.unused import tidied
from optin_deploy.pruning.networks import find_in
from optin_deploy.runtimes import tensorrt as tensorrt_runtime
from optin_deploy.runtimes.device import NO_GPU, float32_mode
from optin_deploy.runtimes.tensorrt import TensorRTRuntime
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.structure.find import find
from support.tiny_forms import Tiny, form_of, samples, tiny
from support.tiny_models import main_name, outputs, tiny_batch, tiny_batches, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
    # Drivers, Inductor and transformers of whatever versions the machine has say many things; they are shown.
    pytest.mark.filterwarnings("default"),
]

DEVICE = torch.device("cuda")
PROFILE = Profile((1, 4, 16), (4, 16, 60))
CORNERS = PROFILE.corners()
OPTIONS = PlanOptions(profiles=(PROFILE,))
MODELS = ("wide", "bert", "vit+head")
TORCH = ("torch", "torch-compile")
PLANS = ("trt", "trt-rtx")
COMPILED = ("torch-compile", "aoti")
READS_RECORDS = ("aoti", *PLANS)
"""These read engine.json, for which pydantic is needed."""


def cases() -> Iterator[Any]:
    """Every precision of every engine on the wide model, and the first two on the others; compilations are few."""
    for engine in (name for name in ENGINES if name != "onnx"):
        marks = [pytest.mark.slow] if engine in COMPILED else []
        precisions = exporter(engine).precisions
        for name in MODELS:
            some = precisions if name == "wide" else precisions[: 1 if engine in COMPILED else 2]
            yield from (pytest.param(engine, name, precision, marks=marks) for precision in some)


@cache
def tiny_of(name: str) -> Tiny:
    """A model on the CPU in float32, and what of it stays; shared, not to be changed."""
    return wide() if name == "wide" else tiny(name, no_neurons=())


@cache
def model_of(name: str) -> Any:
    """What engines are compared with: the dense-shaped model in which all weights of the units that go are 0."""
    return tiny_of(name).reference


def cut_of(name: str) -> Any:
    """The smaller torch module."""
    of = tiny_of(name)
    return cut_and_tell(of.model, of.layout, of.keep).module.eval()


def wide() -> Tiny:
    """Two layers as wide as those of small released models, cut to widths that fit no kernel's tile."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=1000,
        max_position_embeddings=128,
        initializer_range=1 / 16,  # with transformers' 0.02 the output hardly depends on the layers
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.4 * torch.rand_like(parameter) - 0.2
    example = example_of(model)
    network = tidied(read_module(model, example.inputs, axes=example.axes, dynamo=False))
    layout = find(network, probes_of(network))
    heads = iter(((0, 2, 3), (2,)))
    neurons = iter([unit for unit in range(1024) if unit % 3 != layer] for layer in (0, 1))  # 682 and 683
    units = {"heads": heads, "neurons": neurons}
    some = [group for group in layout.groups if group.kind in units]
    return Tiny(model, layout, {group.name: next(units[group.kind]) for group in some})


def feeds_of(model: Any, batch: int, seq_len: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, padded after the first row."""
    return {k: v.numpy() for k, v in tiny_batch(model, batch=batch, seq_len=seq_len, seed=seed).items()}


def expected_of(model: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the float32 model gives on the CPU."""
    found = outputs(model, {k: torch.from_numpy(v) for k, v in feeds.items()}, states=False)
    values: np.ndarray = found[main_name(found)].numpy()
    return values


def error_of(model: Any, feeds: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Of an engine's main output, against the CPU."""
    values = found["logits"] if "logits" in found else found["last_hidden_state"]
    assert np.isfinite(values).all()
    return relative_error(expected_of(model, feeds), values)


def need(engine: str, precision: str | None = None) -> None:
    """Skip where an engine cannot be built or run, with its own words."""
    chosen = exporter(engine)
    reason = chosen.cannot_build() or chosen.obstacle(precision)
    if reason is None and engine in READS_RECORDS and find_spec("pydantic") is None:
        reason = "pydantic, which reads engine.json, is not installed"
    if reason is None and precision == "int8" and find_spec("onnxruntime") is None:
        reason = "onnxruntime, whose quantiser makes int8, is not installed"
    if reason is not None:
        pytest.skip(f"{engine}: {reason}")


Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """(engine, model, precision) -> artifact, built once."""
    root = tmp_path_factory.mktemp("engines")

    @cache
    def built(engine: str, name: str, precision: str, options: PlanOptions | None = None) -> Artifact:
        chosen = exporter(engine)
        folder = root / f"{engine}-{name}-{precision}-{len(list(root.iterdir()))}"
        folder.mkdir()
        given = options or (OPTIONS if engine in PLANS else None)
        fed = samples(tiny_of(name).model) if precision == "int8" else ()
        spec = ExportSpec(precision, options=given, calibration=fed)
        about = {"module": cut_of(name), "longest": 128 if name == "wide" else 64}
        form = form_of(tiny_of(name).network, folder / "model.onnx", **about)
        return chosen.export(form, spec, folder / chosen.file_names(precision)[0])

    return built


@pytest.fixture
def opened(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Any]:
    """(engine, model, precision) -> a context manager of its runtime, opened as the commands open it.

    With `cuda_graph` it is opened for launches on inputs that lie on the device.
    """

    @contextmanager
    def context(engine: str, name: str, precision: str, **options: bool) -> Iterator[Any]:
        need(engine, precision)
        if engine in TORCH:
            # Stands for a saved model, which only pydantic could read; type and device are the exporter's work.
            (tmp_path / MANIFEST).touch()
            monkeypatch.setattr("optin_deploy.exporters.to_torch.load", lambda path: cut_of(name))
            path = tmp_path
        else:
            path = build(engine, name, precision).path
        try:
            runtime = (exporter(engine).open_device if options else exporter(engine).open)(
                path, precision=precision, **options
            )
        except MissingDependency as err:  # a provider that is offered, but does not load
            pytest.skip(f"{engine}: {err}")
        try:
            with runtime:
                yield runtime
        finally:
            if engine == "torch-compile":
                torch.compiler.reset()

    return context


# ---- parity


@pytest.mark.parametrize(("engine", "name", "precision"), list(cases()))
def test_an_engine_computes_what_torch_computes_on_the_cpu(
    engine: str, name: str, precision: str, opened: Callable[..., Any]
) -> None:
    model = model_of(name)
    with opened(engine, name, precision) as runtime:
        errors = {}
        for batch, seq_len in CORNERS:
            feeds = feeds_of(model, batch, seq_len)
            errors[batch, seq_len] = error_of(model, feeds, runtime.run(feeds))
        runtime.synchronize()
    assert max(errors.values()) < TOLERANCES[precision], errors
    if precision not in ("fp32", "tf32"):
        assert max(errors.values()) > 1e-5, "this is float32, not what was asked for"


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "onnx"])
def test_a_result_depends_on_the_input_that_was_given_last(engine: str, opened: Callable[..., Any]) -> None:
    precision = exporter(engine).precisions[0]
    model = model_of("bert")
    with opened(engine, "bert", precision) as runtime:
        for seed in (1, 2, 1):
            feeds = feeds_of(model, 2, 16, seed=seed)
            assert error_of(model, feeds, runtime.run(feeds)) < TOLERANCES[precision]
    first, second = (expected_of(model, feeds_of(model, 2, 16, seed=seed)) for seed in (1, 2))
    assert relative_error(first, second) > 10 * TOLERANCES[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_torch_runs_on_the_gpu_in_the_asked_type(precision: str, opened: Callable[..., Any]) -> None:
    with opened("torch", "bert", precision) as runtime:
        (place,) = {(p.device.type, p.dtype) for p in runtime._model.parameters()}
    assert place == (DEVICE.type, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])


# ---- TensorRT: graphs, buffers, shapes


@pytest.mark.parametrize("engine", PLANS)
@pytest.mark.parametrize("name", ["wide", "vit+head"])
def test_replaying_a_graph_gives_what_a_launch_gives(engine: str, name: str, build: Build) -> None:
    need(engine, "fp16")
    path, model = build(engine, name, "fp16").path, model_of(name)
    with (
        TensorRTRuntime(path, engine=engine, cuda_graph=True) as replayed,
        TensorRTRuntime(path, engine=engine, cuda_graph=False) as launched,
    ):
        for batch, seq_len in (*CORNERS, *CORNERS):
            for seed in (1, 2):
                feeds = feeds_of(model, batch, seq_len, seed=seed)
                found, expected = copied(replayed.run(feeds)), copied(launched.run(feeds))
                for output in expected:
                    np.testing.assert_allclose(found[output], expected[output], rtol=0, atol=1e-5)
                assert error_of(model, feeds, found) < TOLERANCES["fp16"]


@pytest.mark.parametrize("engine", PLANS)
def test_each_shape_has_a_graph_of_its_own_unless_none_is_wanted(engine: str, build: Build) -> None:
    need(engine, "fp16")
    path, model = build(engine, "wide", "fp16").path, model_of("wide")
    for cuda_graph in (True, False):
        with TensorRTRuntime(path, engine=engine, cuda_graph=cuda_graph) as runtime:
            for batch, seq_len in CORNERS:
                runtime.run(feeds_of(model, batch, seq_len))
            graphs = [bound.graph for bound in runtime._bound.values()]
        assert len(graphs) == len(set(CORNERS))
        assert [graph is not None for graph in graphs] == [cuda_graph] * len(graphs)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("engine", PLANS)
def test_later_runs_allocate_nothing(engine: str, cuda_graph: bool, build: Build) -> None:
    need(engine, "fp16")
    path, model = build(engine, "wide", "fp16").path, model_of("wide")
    feeds = [feeds_of(model, *corner, seed=seed) for corner in CORNERS for seed in (1, 2)]
    with TensorRTRuntime(path, engine=engine, cuda_graph=cuda_graph) as runtime:
        for each in feeds:
            runtime.run(each)
        before = allocations()
        for each in (*feeds, *reversed(feeds)):
            runtime.run(each)
        assert allocations() == before
    assert allocations()[0] < before[0]  # closing frees the buffers


def allocations() -> tuple[int, int]:
    """Bytes in use, and how often torch was asked for memory."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]


@pytest.mark.parametrize("engine", PLANS)
def test_going_back_to_an_earlier_shape_gives_right_results(engine: str, build: Build) -> None:
    need(engine, "fp32")
    path, model = build(engine, "wide", "fp32").path, model_of("wide")
    shapes = ((1, 4), (16, 60), (1, 4), (3, 17), (16, 60), (1, 4), (3, 17))
    with TensorRTRuntime(path, engine=engine) as runtime:
        for seed, (batch, seq_len) in enumerate(shapes):
            feeds = feeds_of(model, batch, seq_len, seed=seed)
            assert error_of(model, feeds, runtime.run(feeds)) < TOLERANCES["fp32"], (seed, batch, seq_len)


@pytest.mark.parametrize("engine", PLANS)
def test_dropping_the_graph_of_one_shape_leaves_the_others(
    engine: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(engine, "fp32")
    monkeypatch.setattr(tensorrt_runtime, "KEPT_SHAPES", 2)
    path, model = build(engine, "wide", "fp32").path, model_of("wide")
    with TensorRTRuntime(path, engine=engine) as runtime:
        for seed, seq_len in enumerate((8, 12, 8, 20, 8, 12, 60, 4, 8)):
            feeds = feeds_of(model, 2, seq_len, seed=seed)
            assert error_of(model, feeds, runtime.run(feeds)) < TOLERANCES["fp32"], (seed, seq_len)
            assert len(runtime._bound) <= 2


@pytest.mark.parametrize("engine", PLANS)
def test_two_runtimes_of_one_plan_do_not_disturb_each_other(engine: str, build: Build) -> None:
    """As dense and pruned are measured: both open, block after block."""
    need(engine, "fp32")
    path, model = build(engine, "wide", "fp32").path, model_of("wide")
    with TensorRTRuntime(path, engine=engine) as one, TensorRTRuntime(path, engine=engine) as other:
        for seed in range(4):
            for runtime in (one, other):
                feeds = feeds_of(model, 4, 16, seed=10 * seed + (runtime is one))
                assert error_of(model, feeds, runtime.run(feeds)) < TOLERANCES["fp32"]
        one.close()
        feeds = feeds_of(model, 4, 16, seed=99)
        assert error_of(model, feeds, other.run(feeds)) < TOLERANCES["fp32"]


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("engine", [name for name in ENGINES if isinstance(exporter(name), DeviceExporter)])
def test_a_launch_without_transfers_gives_what_torch_computes_on_the_cpu(
    engine: str, cuda_graph: bool, opened: Callable[..., Any]
) -> None:
    precision, model = exporter(engine).precisions[0], model_of("wide")
    with opened(engine, "wide", precision, cuda_graph=cuda_graph) as runtime:
        for seed in (1, 2):
            feeds = feeds_of(model, 4, 16, seed=seed)
            launch = runtime.launcher({k: torch.from_numpy(v).to(DEVICE) for k, v in feeds.items()})
            for _ in range(3):
                found = launch()
            torch.cuda.synchronize()
            values = {name: value.cpu().numpy() for name, value in found.items()}
            assert error_of(model, feeds, values) < TOLERANCES[precision]
        assert runtime.replays == (cuda_graph and engine in (*TORCH, *PLANS))


@pytest.mark.parametrize("engine", PLANS)
def test_the_time_on_the_device_is_positive_and_within_that_of_a_run(engine: str, build: Build) -> None:
    need(engine, "fp16")
    path, feeds = build(engine, "wide", "fp16").path, feeds_of(model_of("wide"), 16, 60)

    def opener(cuda_graph: bool) -> TensorRTRuntime:
        return TensorRTRuntime(path, engine=engine, cuda_graph=cuda_graph)

    found = measure_device_time(opener, opener, feeds, blocks=2)
    assert found.cuda_graph is not None, "no graph was recorded"
    for device, cuda_graph in ((found.cuda_graph, True), (found.no_cuda_graph, False)):
        host = measure_pair(partial(opener, cuda_graph), partial(opener, cuda_graph), feeds, blocks=2)
        assert 0 < device.dense(50) <= host.dense(50), cuda_graph
        assert 0 < device.pruned(50) <= host.pruned(50), cuda_graph


@pytest.mark.parametrize("engine", PLANS)
def test_a_plan_without_weights_takes_them_from_the_onnx_beside_it(engine: str, build: Build) -> None:
    need(engine, "fp16")
    whole = build(engine, "wide", "fp16")
    stripped = build(engine, "wide", "fp16", PlanOptions(profiles=(PROFILE,), weights="stripped"))
    assert stripped.size_bytes < whole.size_bytes
    model = model_of("wide")
    with TensorRTRuntime(stripped.path, engine=engine) as runtime:
        feeds = feeds_of(model, 4, 16)
        assert error_of(model, feeds, runtime.run(feeds)) < TOLERANCES["fp16"]


def copied(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The next run of the same shapes overwrites its outputs."""
    return {name: value.copy() for name, value in found.items()}


# ---- scores


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
@pytest.mark.parametrize("name", ["bert", "bert+head", "vit+head"])
def test_scores_on_the_gpu_are_those_on_the_cpu(name: str, scorer: str) -> None:
    model = tiny_model(name)
    example = example_of(model)
    layout = find_in(tidied(read_module(model, example.inputs, axes=example.axes, dynamo=False))).layout
    batches, settings = tiny_batches(model), ScoreSettings(scorer, probes=8, seed=3)
    expected = score_units(Subject.make(layout), batches, settings)
    there = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in batches]
    with float32_mode():  # else the image patches are rounded to TF32
        found = score_units(Subject.make(layout, device=DEVICE), there, settings)
    assert found.provenance["kl_weight"] == pytest.approx(expected.provenance["kl_weight"], rel=1e-3)
    for group, values in expected.scores.items():
        check_scores(values, found.scores[group])


def check_scores(expected: Tensor, found: Tensor) -> None:
    """To a thousandth each; what is next to nothing, to a thousandth of the usual."""
    assert found.device.type == "cpu"
    usual = float(expected.abs().median())
    assert usual > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * usual)
