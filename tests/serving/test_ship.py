"""Repositories of inference servers: what is written, that nothing is overwritten, that hostile names stay inside."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import yaml
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file
from optin_deploy.reporting.latency_rows import LatencyRow, StoredLatency, StoredSamples
from optin_deploy.runtimes.record import EngineRecord, write_record
from optin_deploy.serving import repository as repositories
from optin_deploy.serving import server, servers
from optin_deploy.serving.manifest import LARGEST_VERSION, Manifest, ServingOptions, TensorSpec
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.shipments import default_name, preferred_batches, shipments
from optin_deploy.serving.shipping import roll_back, ship_folder
from optin_deploy.serving.tensors import V2_NAMES, largest_batch, tensors_of
from optin_deploy.serving.triton import config_of
from support import tiny_checkpoint as tiny
from support.shipped import changed, everything, order, published

ORT_RUN = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.finished_job(), tmp_path / "job")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return tmp_path / "repo"


def pbtxt(path: Path) -> Any:
    """A config.pbtxt as Triton reads it."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_triton_gets_dense_and_pruned_side_by_side_as_two_models(job: Path, repo: Path) -> None:
    served, new = ship_folder(job, order(repo))
    assert new
    assert [(each.name, each.role, each.version) for each in served] == [
        ("tiny-dense", "dense", 1),
        ("tiny", "pruned", 1),
    ]
    for name, artifact in (("tiny", "model.onnx"), ("tiny-dense", "dense.onnx")):
        assert (repo / name / "1/model.onnx").read_bytes() == (job / artifact).read_bytes()
        config = pbtxt(repo / name / "config.pbtxt")
        assert (config.name, config.platform, config.max_batch_size) == (name, "onnxruntime_onnx", 32)
        assert list(config.version_policy.specific.versions) == [1]
        assert not config.response_cache.enable
        assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_CPU]


def test_the_warm_up_sends_recorded_rows_of_a_real_shape(job: Path, repo: Path) -> None:
    from safetensors.numpy import load_file

    ship_folder(job, order(repo, options=ServingOptions(max_batch=4)))
    recorded = load_file(job / "samples.safetensors")
    config = pbtxt(repo / "tiny/config.pbtxt")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 4]
    for warmup in config.model_warmup:
        assert set(warmup.inputs) == {tensor.name for tensor in config.input}
        for name, entry in warmup.inputs.items():
            values = np.frombuffer((repo / "tiny/warmup" / entry.input_data_file).read_bytes(), np.int64)
            np.testing.assert_array_equal(values.reshape(list(entry.dims)), recorded[f"input.{name}"][0])


def test_the_manifest_travels_with_hashes_plan_report_and_samples(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    found = Repository(repo).manifest("tiny", 1)
    assert set(found.sha256) == {
        "model.onnx",
        "optin/plan.json",
        "optin/report.json",
        "optin/samples.safetensors",
    }
    for name, sha256 in found.sha256.items():
        assert sha256_file(repo / "tiny/1" / name) == sha256
    assert found.made_from["plan"] == json.loads((job / "report.json").read_text())["hashes"]["plan"]
    assert str(job) not in json.dumps(found.to_json())  # a server's clients need not know where it was made


@pytest.mark.parametrize("seed", range(24))
def test_the_config_of_any_artifact_is_read_by_triton_and_fits_the_file(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "model.onnx"
    proto = random_onnx(rng)
    onnx.save(proto, path)
    inputs, outputs = tensors_of(path)
    manifest = manifest_of(inputs, outputs, ServingOptions(max_batch=rng.choice([1, 8, 64]), preferred=(1,)))
    server("triton").check(manifest)
    values = {each.name: np.ones([2 if n < 0 else n for n in each.shape], "float32") for each in inputs}
    config = text_format.Parse(config_of([manifest], values), model_config_pb2.ModelConfig())
    open_batch = all(
        entry.type.tensor_type.shape.dim[0].dim_param for entry in [*proto.graph.input, *proto.graph.output]
    )
    assert config.max_batch_size == (manifest.options.max_batch if open_batch else 0)
    for entries, tensors in ((proto.graph.input, config.input), (proto.graph.output, config.output)):
        assert [entry.name for entry in entries] == [tensor.name for tensor in tensors]
        for entry, tensor in zip(entries, tensors, strict=True):
            shape = [axis.dim_value or -1 for axis in entry.type.tensor_type.shape.dim]
            assert list(tensor.dims) == shape[1 if open_batch else 0 :]
            kind = np.dtype(helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)).name
            assert model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_") == V2_NAMES[kind]


def random_onnx(rng: random.Random) -> onnx.ModelProto:
    """A graph of one to four inputs and as many outputs, of random types and shapes."""
    kinds = [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL]
    open_batch = rng.random() < 0.8
    nodes, inputs, outputs = [], [], []
    for index in range(rng.randint(1, 4)):
        kind = rng.choice(kinds)
        rest = [rng.choice(["length", 1, 7, 384]) for _ in range(rng.randint(1, 3))]
        shape = ["batch" if open_batch else 3, *rest]
        names = f"in/{index}:x", f"out_{index}.y"
        inputs.append(helper.make_tensor_value_info(names[0], kind, shape))
        outputs.append(helper.make_tensor_value_info(names[1], kind, shape))
        nodes.append(helper.make_node("Identity", names[:1], names[1:]))
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs))


def manifest_of(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: ServingOptions | None = None
) -> Manifest:
    return Manifest(
        name="tiny",
        version=1,
        role="pruned",
        engine="onnx",
        precision="fp32",
        file="model.onnx",
        inputs=inputs,
        outputs=outputs,
        options=options or ServingOptions(),
        sha256={},
        size_bytes=1,
    )


def test_text_in_pbtxt_is_quoted_and_escaped() -> None:
    from optin_deploy.serving.triton_config import Word, entries, lines

    odd = 'quote " backslash \\ newline \n umlaut ü'
    text = "\n".join(lines({"parameters": entries({"key": {"string_value": odd}})}))
    assert text_format.Parse(text, model_config_pb2.ModelConfig()).parameters["key"].string_value == odd
    assert list(lines({"kind": Word("KIND_CPU")})) == ["kind: KIND_CPU"]


def test_texts_are_served_by_a_tokenizer_and_an_ensemble(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, text=True, options=ServingOptions(too_long="refuse")))
    ensemble = pbtxt(repo / "tiny-text/config.pbtxt")
    assert ensemble.platform == "ensemble"
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["tiny-tokenizer", "tiny"]
    assert (repo / "tiny-text/1").is_dir()  # Triton wants a version, though it is empty
    tokenizer, model = pbtxt(repo / "tiny-tokenizer/config.pbtxt"), pbtxt(repo / "tiny/config.pbtxt")
    assert [(t.name, t.data_type) for t in tokenizer.output] == [(t.name, t.data_type) for t in model.input]
    assert tokenizer.parameters["longest"].string_value == str(tiny.SEQ_LEN)
    assert tokenizer.parameters["too_long"].string_value == "refuse"
    compile((repo / "tiny-tokenizer/1/model.py").read_text(), "model.py", "exec")


def test_the_same_artifact_is_not_published_twice(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, text=True))
    before = everything(repo)
    served, new = ship_folder(job, order(repo, text=True))
    assert not new
    assert everything(repo) == before
    assert {each.version for each in served} == {1}


def test_a_new_version_is_served_and_the_old_one_stays(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    first = (repo / "tiny/1/model.onnx").read_bytes()
    changed(job)
    served, new = ship_folder(job, order(repo))
    assert new
    assert [(each.name, each.version) for each in served] == [("tiny-dense", 1), ("tiny", 2)]
    assert (repo / "tiny/1/model.onnx").read_bytes() == first
    assert (repo / "tiny/2/model.onnx").read_bytes() == (job / "model.onnx").read_bytes()
    assert list(pbtxt(repo / "tiny/config.pbtxt").version_policy.specific.versions) == [2]


def test_a_rollback_serves_the_version_before_and_deletes_nothing(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    first = (repo / "tiny/config.pbtxt").read_bytes()
    changed(job)
    ship_folder(job, order(repo))
    assert [each.version for each in roll_back(repo, "tiny")] == [1]
    assert (repo / "tiny/config.pbtxt").read_bytes() == first
    assert Repository(repo).versions("tiny") == (1, 2)
    with pytest.raises(BadInput, match="no version before 1"):
        roll_back(repo, "tiny")
    assert [each.version for each in roll_back(repo, "tiny", 2)] == [2]
    with pytest.raises(BadInput, match="no version 7; published are: 1, 2"):
        roll_back(repo, "tiny", 7)


def test_a_rollback_refuses_files_that_are_not_the_published_ones(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    changed(job)
    ship_folder(job, order(repo))
    (repo / "tiny/1/model.onnx").write_bytes(b"other")
    with pytest.raises(BadInput, match="is not the published file"):
        roll_back(repo, "tiny")
    assert Repository(repo).state("tiny").served == (2,)


def test_a_version_is_never_overwritten(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, version=5))
    before = everything(repo)
    _, new = ship_folder(job, order(repo, version=5))  # the very same: nothing to do
    assert not new
    changed(job)
    with pytest.raises(BadInput, match="never overwritten"):
        ship_folder(job, order(repo, version=5))
    assert everything(repo) == before


def test_dense_and_pruned_side_by_side_as_versions_go_back_together(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, dense="versions"))
    assert Repository(repo).names() == ("tiny",)
    roles = [(each.version, each.role) for each in Repository(repo).served("tiny")]
    assert roles == [(1, "dense"), (2, "pruned")]
    changed(job)
    ship_folder(job, order(repo, dense="versions"))
    roles = [(each.version, each.role) for each in Repository(repo).served("tiny")]
    assert roles == [(1, "dense"), (3, "pruned")]  # the dense one is the same
    assert list(pbtxt(repo / "tiny/config.pbtxt").version_policy.specific.versions) == [1, 3]
    assert [each.version for each in roll_back(repo, "tiny")] == [1, 2]


def test_a_model_of_other_inputs_or_outputs_needs_another_name(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    manifest = Repository(repo).manifest("tiny", 1)
    other = replace(manifest, outputs=(TensorSpec("logits", "FP32", (-1, 7)),))
    (repo / "tiny/1/optin/manifest.json").write_text(json.dumps(other.to_json()))
    changed(job)
    with pytest.raises(BadInput, match="other inputs or outputs"):
        ship_folder(job, order(repo))
    assert Repository(repo).versions("tiny") == (1,)


def test_a_publication_that_breaks_off_leaves_the_old_version_serving(
    job: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship_folder(job, order(repo))
    before = everything(repo)
    changed(job)

    def full(*_: object) -> None:
        raise OSError("input/output error")

    for place in ("shutil.copyfile", "os.fsync", "pathlib.Path.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="input/output"):
            patch.setattr(place, full)
            ship_folder(job, order(repo))
        assert published(everything(repo)) == published(before)
    assert list(pbtxt(repo / "tiny/config.pbtxt").version_policy.specific.versions) == [1]
    served, _ = ship_folder(job, order(repo, version=2))
    assert [each.version for each in served] == [1, 2]
    assert list(pbtxt(repo / "tiny/config.pbtxt").version_policy.specific.versions) == [2]


def test_a_first_publication_appears_at_once(job: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr("optin_deploy.serving.staging.Staging.commit", fails)
    with pytest.raises(OSError, match="input/output"):
        ship_folder(job, order(repo))
    assert not repo.exists()


def test_two_publishers_do_not_meet(job: Path, repo: Path) -> None:
    with Repository(repo).locked(), pytest.raises(BadInput, match="another process is publishing"):
        ship_folder(job, order(repo))


def test_openvino_model_server_gets_folders_that_openvino_loads(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, server="ovms"))
    entries = json.loads((repo / "config.json").read_text())["model_config_list"]
    assert [entry["config"]["name"] for entry in entries] == ["tiny", "tiny-dense"]
    core = openvino.Core()
    for entry in entries:
        config = entry["config"]
        (version,) = config["model_version_policy"]["specific"]["versions"]
        model = core.read_model(repo / config["base_path"] / str(version) / "model.onnx")
        core.compile_model(model, config["target_device"], config["plugin_config"])  # refuses unknown settings
        found = {next(iter(port.names)): port.partial_shape for port in model.inputs}
        manifest = Repository(repo).manifest(config["name"], version)
        assert {tensor.name: len(tensor.shape) for tensor in manifest.inputs} == {
            name: shape.rank.get_length() for name, shape in found.items()
        }
    changed(job)
    ship_folder(job, order(repo, server="ovms"))
    policies = [
        entry["config"]["model_version_policy"]["specific"]["versions"]
        for entry in json.loads((repo / "config.json").read_text())["model_config_list"]
    ]
    assert policies == [[2], [1]]


def test_mlserver_gets_settings_and_a_runtime_of_each_models_own_name(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo, server="mlserver"))
    for name, module in (("tiny", "onnx_tiny"), ("tiny-dense", "onnx_tiny_dense")):
        settings = json.loads((repo / name / "model-settings.json").read_text())
        assert settings["implementation"] == f"{module}.OnnxModel"
        assert (repo / name / settings["parameters"]["uri"]).is_file()
        compile((repo / name / f"{module}.py").read_text(), module, "exec")
    with pytest.raises(BadInput, match="one version of a model at a time"):
        ship_folder(job, order(repo, server="mlserver", dense="versions"))


def test_kserve_gets_a_service_that_names_the_repository(job: Path, repo: Path) -> None:
    options = ServingOptions(storage_uri="s3://bucket/repo", canary=10)
    ship_folder(job, order(repo, server="kserve", options=options))
    service = yaml.safe_load((repo / "tiny.yaml").read_text())
    predictor = service["spec"]["predictor"]
    assert (service["metadata"]["name"], predictor["canaryTrafficPercent"]) == ("tiny", 10)
    assert predictor["model"]["storageUri"] == "s3://bucket/repo"
    assert predictor["model"]["modelFormat"] == {"name": "onnx"}
    metadata = json.loads((repo / "tiny/metadata.json").read_text())
    assert metadata["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    with pytest.raises(BadInput, match="Kubernetes takes small letters"):
        ship_folder(job, order(repo, server="kserve", name="Tiny_1", options=options))
    with pytest.raises(BadInput, match="--storage-uri"):
        ship_folder(job, order(repo, server="kserve", name="other"))


def test_a_canary_that_gets_all_of_the_traffic_stays_the_version_it_is(job: Path, repo: Path) -> None:
    def shipped(canary: int | None, **settings: Any) -> bool:
        options = ServingOptions(storage_uri="s3://bucket/repo", canary=canary)
        return ship_folder(job, order(repo, server="kserve", options=options, **settings))[1]

    def now() -> tuple[str, int | None]:
        service = yaml.safe_load((repo / "tiny.yaml").read_text())
        version = service["metadata"]["annotations"]["optin-deploy/version"]
        return version, service["spec"]["predictor"].get("canaryTrafficPercent")

    assert shipped(None)
    changed(job)
    assert shipped(10)
    published_manifest = (repo / "tiny/2/optin/manifest.json").read_bytes()
    for canary, number in ((50, None), (20, 2), (None, None)):
        assert shipped(canary, version=number)
        assert now() == ("2", canary)
        assert not shipped(canary)
    assert Repository(repo).versions("tiny") == (1, 2)
    assert (repo / "tiny/2/optin/manifest.json").read_bytes() == published_manifest
    shipped(10)
    roll_back(repo, "tiny")
    assert now() == ("1", None)
    roll_back(repo, "tiny", 2)
    assert now() == ("2", None)


def test_a_repository_of_the_version_before_keeps_the_canary_of_its_manifest(job: Path, repo: Path) -> None:
    options = ServingOptions(storage_uri="s3://bucket/repo", canary=10)
    ship_folder(job, order(repo, server="kserve", options=options))
    state = json.loads((repo / "tiny/optin.json").read_text())
    del state["canary"]
    (repo / "tiny/optin.json").write_text(json.dumps({**state, "schema_version": 1}))
    ship_folder(job, order(repo, server="kserve", name="other", options=replace(options, canary=None)))
    assert yaml.safe_load((repo / "tiny.yaml").read_text())["spec"]["predictor"]["canaryTrafficPercent"] == 10


@pytest.mark.parametrize("name", ["", "..", "../out", "a/b", "/tmp/x", "a b", ".hidden", "x" * 64, "a\0b", "-x", "ü"])
def test_hostile_names_write_nothing(job: Path, tmp_path: Path, name: str) -> None:
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(BadInput, match="model name"):
        ship_folder(job, order(tmp_path / "repo", name=name))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("version", [0, -1, LARGEST_VERSION + 1])
def test_impossible_versions_write_nothing(job: Path, repo: Path, version: int) -> None:
    with pytest.raises(BadInput, match="version"):
        ship_folder(job, order(repo, version=version))
    assert not [path for path in repo.glob("*") if path.is_dir()]


def test_links_in_the_repository_are_not_followed(job: Path, repo: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    repo.mkdir()
    (repo / "tiny").symlink_to(outside)
    with pytest.raises(BadInput, match="link"):
        ship_folder(job, order(repo))
    assert not list(outside.iterdir())


def test_an_artifact_that_is_a_link_out_of_its_folder_is_refused(job: Path, repo: Path, tmp_path: Path) -> None:
    (job / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (job / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BadInput, match="a link that leads out"):
        ship_folder(job, order(repo))


def test_a_foreign_folder_of_that_name_is_left_alone(job: Path, repo: Path) -> None:
    (repo / "tiny").mkdir(parents=True)
    (repo / "tiny/mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="did not make it"):
        ship_folder(job, order(repo, dense="none"))
    assert (repo / "tiny/mine.txt").read_text() == "mine"


def test_an_artifact_that_the_report_does_not_describe_is_refused(job: Path, repo: Path) -> None:
    (job / "dense.onnx").write_bytes((job / "model.onnx").read_bytes())
    with pytest.raises(BadInput, match=r"dense.onnx is not the file that report.json describes"):
        ship_folder(job, order(repo))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"file": "../../etc/passwd"}, "leads out"),
        ({"sha256": {"/etc/passwd": "0"}}, "leads out"),
        ({"inputs": [{"name": "x", "datatype": "INT64", "shape": [2**40]}]}, "shape"),
        ({"inputs": [{"name": "x", "datatype": "INT64", "shape": [1] * 99}]}, "shape"),
        ({"inputs": [{"name": "x", "datatype": "COMPLEX", "shape": [1]}]}, "datatype"),
        ({"inputs": [{"name": "x" * 999, "datatype": "INT64", "shape": [1]}]}, "tensor name"),
        ({"version": 2}, "not of tiny version 1"),
        ({"name": "other"}, "not of tiny version 1"),
        ({"role": "admin"}, "role"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(job: Path, repo: Path, damage: dict[str, Any], says: str) -> None:
    ship_folder(job, order(repo))
    edit(repo / "tiny/1/optin/manifest.json", **damage)
    with pytest.raises(BadInput, match=says):
        Repository(repo).served("tiny")


def test_a_huge_manifest_is_not_read(job: Path, repo: Path) -> None:
    ship_folder(job, order(repo))
    with (repo / "tiny/1/optin/manifest.json").open("w") as file:
        os.truncate(file.fileno(), 2**27)
    with pytest.raises(BadInput, match="bytes; at most"):
        Repository(repo).served("tiny")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"server": "tomcat"}, "unknown --server 'tomcat'; possible: triton, ovms, mlserver, kserve"),
        ({"engine": "aoti"}, "triton does not serve engine aoti"),
        ({"dense": "perhaps"}, "unknown --dense"),
        ({"server": "ovms", "text": True}, "ovms runs no tokenizer"),
        ({"precision": "fp16"}, r"There is no .*fp16.onnx.*optin build"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_written(
    job: Path, repo: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        ship_folder(job, order(repo, **settings))
    assert not repo.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": 10**9},
        {"preferred": (64,)},
        {"queue_delay_us": -1},
        {"instances": 0},
        {"threads": -1},
        {"too_long": "cut"},
        {"canary": 101},
        {"longest": 0},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="possible are"):
        ServingOptions(**options)


def test_preferred_batches_are_those_with_nearly_the_best_measured_throughput() -> None:
    def row(batch: int, throughput: float, engine: str = "onnx") -> LatencyRow:
        sides, samples = (StoredLatency(1.0, 1.0, throughput),) * 2, StoredSamples(((1.0,),) * 2, ((1.0,),) * 2)
        return LatencyRow(engine, "fp32", batch, 16, 1, *sides, 1.0, (1.0, 1.0), 1.0, 1.0, samples)

    rows = [row(1, 100), row(8, 196), row(16, 200), row(32, 150), row(64, 200), row(4, 999, "trt")]
    asked = order(Path("x"), options=ServingOptions(max_batch=32))
    assert preferred_batches(rows, asked, "fp32") == (8, 16)
    assert preferred_batches(rows[:1], asked, "fp32") == ()
    assert preferred_batches([], asked, "fp32") == ()


def record(profiles: str, **settings: Any) -> EngineRecord:
    return EngineRecord(
        **{
            "engine": "trt",
            "precision": "fp16",
            "sha256": "0",
            "size_bytes": 6,
            "device": "GPU",
            "capability": "9.0",
            "version": "10.12",
            "key": "k",
            "options": {"profiles": profiles},
            "onnx": "model.onnx",
            **settings,
        }
    )


def test_an_engines_profiles_bound_the_batch_and_the_text() -> None:
    path = Path("job/model.engine")
    two = "batch=1,8,32 seq=16,128,384; batch=1,4,16 seq=16,64,128"
    assert largest_batch(path, record(two), None) == 16
    with pytest.raises(BadInput, match="batches of 4 or more"):
        largest_batch(path, record("batch=4,8,32 seq=16,128,384"), None)
    with pytest.raises(BadInput, match="at most 128 tokens"):
        largest_batch(path, record(two), 256)


def test_a_tensorrt_plan_is_shipped_with_the_name_that_triton_expects(job: Path, repo: Path) -> None:
    for name, graph in (("model.engine", "model.onnx"), ("dense.engine", "dense.onnx")):
        (job / name).write_bytes(b"a plan")
        write_record(job / name, record("batch=1,8,16 seq=16,128,384", onnx=graph))
    asked = partial(order, repo, engine="trt")
    with pytest.raises(BadInput, match="--max-batch 32: the engine was built for at most 16"):
        ship_folder(job, asked())
    ship_folder(job, asked(options=ServingOptions(max_batch=16)))
    config = pbtxt(repo / "tiny/config.pbtxt")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
    assert (repo / "tiny/1/model.plan").read_bytes() == b"a plan"
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    write_record(job / "model.engine", record("batch=1,8,16 seq=16,128,384", stripped=True))
    with pytest.raises(BadInput, match="holds no weights"):
        ship_folder(job, asked(options=ServingOptions(max_batch=16)))


def test_every_server_writes_nothing_on_a_dry_run(job: Path, repo: Path) -> None:
    for name in servers():
        asked = order(repo, server=name, options=ServingOptions(storage_uri="s3://x/y"))
        served, new = ship_folder(job, asked, dry_run=True)
        assert served
        assert not new
    assert not repo.exists()


def test_the_command_ships_and_goes_back(job: Path, repo: Path, shell: tiny.Shell) -> None:
    done = shell("optin", "ship", job, "--out", repo, "--name", "tiny", "--max-batch", 8)
    assert (done.code, "Published" in done.out) == (0, True)
    done = shell("optin", "ship", job, "--out", repo, "--name", "tiny", "--max-batch", 8)
    assert "Nothing new" in done.out
    changed(job)
    assert shell("optin", "ship", job, "--out", repo, "--name", "tiny", "--max-batch", 8).code == 0
    dry = shell("optin", "ship", "--rollback", "--out", repo, "--name", "tiny", "--dry-run")
    assert (dry.code, Repository(repo).state("tiny").served) == (0, (2,))
    assert shell("optin", "ship", "--rollback", "--out", repo, "--name", "tiny").code == 0
    assert Repository(repo).state("tiny").served == (1,)
    for wrong in (["--rollback", "--out", repo], ["--out", repo], [job, "--rollback", "--name", "tiny"]):
        assert shell("optin", "ship", *wrong).code == 2
    assert shell("optin", "ship", job, "--out", repo, "--preferred", "a,b").code == 2


def test_a_models_default_name_is_its_folders_without_what_names_may_not_have() -> None:
    assert default_name(Path("runs/my model-0.6")) == "my-model-0-6"
    assert default_name(Path("/")) == "model"


def test_shipments_do_not_touch_the_output_folder(job: Path, repo: Path) -> None:
    before = everything(job)
    assert len(shipments(job, order(repo), server("triton"))) == 2
    assert everything(job) == before


def test_locks_are_released_after_an_error(repo: Path) -> None:
    with pytest.raises(ZeroDivisionError), Repository(repo).locked():
        raise ZeroDivisionError
    with Repository(repo).locked():
        assert (repo / repositories.LOCK).exists()
