"""Real inference servers on what `optin ship` writes: outputs, joined requests, new and corrupt versions, kill -9."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils
import yaml

from benchmarks.serving.servers import MLServerProcess, ServerProcess, TritonServer, environment
from optin_deploy.files.storage import read_tensors
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.serving.checking import check_server
from optin_deploy.serving.manifest import ServingOptions
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.server_load import ServerLoad
from optin_deploy.serving.shipping import roll_back, ship_folder
from support import tiny_checkpoint as tiny
from support.project import ROOT
from support.sealed import put_artifact

pytestmark = [pytest.mark.servers, pytest.mark.slow]

TOLERANCE = 1e-4
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
Rows = dict[str, np.ndarray]
PATIENCE = 60
"""Seconds until a server must have noticed a new version."""


def home(name: str) -> Path:
    return environment(name) or pytest.skip(f"no .venv-{name}: run `make servers`")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copy_of(tiny.finished_job(), tmp_path_factory.mktemp("shipped") / "job")


@pytest.fixture(scope="module")
def rows(job: Path) -> Rows:
    tensors = read_tensors(job / "samples.safetensors", "")
    return {name.removeprefix("input."): t.numpy() for name, t in tensors.items() if name.startswith("input.")}


@pytest.fixture(scope="module")
def triton(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Triton with polling on dense, pruned and text models."""
    folder = tmp_path_factory.mktemp("triton")
    ship_folder(job, order(folder / "repository", text=True))
    with TritonServer(folder / "repository", folder / "scratch", home=home("triton")) as server:
        yield server


def order(out: Path, **settings: Any) -> ShipOrder:
    # A long delay: on a busy machine requests come late, and they are to be joined all the same.
    options = ServingOptions(max_batch=16, queue_delay_us=20_000, threads=1)
    return ShipOrder(**{"server": "triton", "out": out, "name": "tiny", "options": options, **settings})


def ask(server: ServerProcess, protocol: str, name: str, rows: Rows, version: str = "") -> dict[str, np.ndarray]:
    """One request; all outputs by name."""
    library = PROTOCOLS[protocol]
    client = library.InferenceServerClient(getattr(server, protocol))
    try:
        answer = client.infer(name, inputs_of(library, rows), model_version=version)
        found = {each["name"] if isinstance(each, dict) else each.name for each in outputs_of(answer)}
        return {each: answer.as_numpy(each) for each in found}
    finally:
        client.close()


def inputs_of(library: Any, rows: Rows) -> list[Any]:
    inputs = []
    for name, values in rows.items():
        kind = tritonclient.utils.np_to_triton_dtype(values.dtype)
        inputs.append(library.InferInput(name, list(values.shape), kind))
        inputs[-1].set_data_from_numpy(values)
    return inputs


def outputs_of(answer: Any) -> Sequence[Any]:
    found = answer.get_response()
    return found["outputs"] if isinstance(found, dict) else found.outputs  # type: ignore[no-any-return]


def locally(path: Path, rows: Rows) -> dict[str, np.ndarray]:
    with OrtRuntime(path, threads=1) as runtime:
        return runtime.run(rows)


def first(rows: Rows, start: int, count: int = 1) -> Rows:
    return {name: values[start : start + count] for name, values in rows.items()}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=TOLERANCE, err_msg=name)


def statistics(server: ServerProcess, name: str) -> dict[str, Any]:
    client = tritonclient.http.InferenceServerClient(server.http)
    try:
        return client.get_inference_statistics(name)["model_stats"][-1]  # type: ignore[no-any-return]
    finally:
        client.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "the server did not follow"
        time.sleep(0.2)


def changed(job: Path, out: Path, scale: float) -> Path:
    """The same job with another pruned model: its last weights are larger."""
    copy = tiny.copy_of(job, out)
    proto = onnx.load(copy / "model.onnx")
    (bias,) = (t for t in proto.graph.initializer if t.name.endswith("classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(scale), bias.name))
    put_artifact(proto, copy)
    return copy


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("name", "artifact"), [("tiny", "model.onnx"), ("tiny-dense", "dense.onnx")])
def test_triton_answers_what_the_artifact_gives(
    triton: TritonServer, job: Path, rows: Rows, protocol: str, name: str, artifact: str
) -> None:
    expected = locally(job / artifact, rows)
    check_equal(ask(triton, protocol, name, rows), expected)
    for index in range(len(rows["input_ids"])):
        one = first(rows, index)
        check_equal(ask(triton, protocol, name, one), locally(job / artifact, one))
    other = "dense.onnx" if artifact == "model.onnx" else "model.onnx"
    assert not np.allclose(expected["logits"], locally(job / other, rows)["logits"], atol=10 * TOLERANCE)


def test_200_requests_at_once_are_answered_right_and_joined(triton: TritonServer, job: Path, rows: Rows) -> None:
    before = statistics(triton, "tiny")
    expected = [locally(job / "model.onnx", first(rows, index)) for index in range(len(rows["input_ids"]))]
    client = tritonclient.grpc.InferenceServerClient(triton.grpc)

    def one(number: int) -> np.ndarray:
        asked = inputs_of(tritonclient.grpc, first(rows, number % len(expected)))
        return client.infer("tiny", asked).as_numpy("logits")  # type: ignore[no-any-return]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(200)))
    client.close()
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(answer, expected[number % len(expected)]["logits"], atol=TOLERANCE)
    after = statistics(triton, "tiny")
    inferences = after["inference_count"] - before["inference_count"]
    executions = after["execution_count"] - before["execution_count"]
    assert inferences == 200
    assert executions < inferences


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_above_the_limit_is_refused(triton: TritonServer, rows: Rows, protocol: str) -> None:
    many = {name: values.repeat(3, 0)[:17] for name, values in rows.items()}
    with pytest.raises(tritonclient.utils.InferenceServerException, match="must be <= 16"):
        ask(triton, protocol, "tiny", many)


def test_a_wrong_type_is_refused(triton: TritonServer, rows: Rows) -> None:
    wrong = {name: values.astype(np.int32) for name, values in rows.items()}
    with pytest.raises(tritonclient.utils.InferenceServerException, match="INT64"):
        ask(triton, "http", "tiny", wrong)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_texts_are_tokenized_as_the_model_was_trained(triton: TritonServer, job: Path, protocol: str) -> None:
    import transformers

    texts = [*tiny.texts()[:5], "short"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job / "model")
    encoded = tokenizer(texts, truncation=True, max_length=tiny.SEQ_LEN, padding="longest", return_tensors="np")
    expected = locally(job / "model.onnx", dict(encoded))
    asked = {"TEXT": np.array([[text.encode()] for text in texts], dtype=object)}
    check_equal(ask(triton, protocol, "tiny-text", asked), expected)


def test_a_text_that_is_too_long_can_be_refused(job: Path, tmp_path: Path) -> None:
    options = ServingOptions(too_long="refuse", threads=1)
    ship_folder(job, order(tmp_path / "repository", text=True, dense="none", options=options))
    with TritonServer(tmp_path / "repository", tmp_path / "scratch", home=home("triton")) as server:
        ask(server, "grpc", "tiny-text", {"TEXT": np.array([[b"the river"]], dtype=object)})
        long = {"TEXT": np.array([[b"the river " * tiny.SEQ_LEN]], dtype=object)}
        with pytest.raises(tritonclient.utils.InferenceServerException, match=f"at most {tiny.SEQ_LEN}"):
            ask(server, "grpc", "tiny-text", long)


class Load:
    """Clients that ask all the time, until `stop`; each answer must be one of the known ones."""

    def __init__(self, server: ServerProcess, rows: Rows, known: Callable[[np.ndarray], bool]) -> None:
        self._server, self._rows, self._known = server, rows, known
        self._stop = threading.Event()
        self.answered, self.wrong = 0, list[str]()
        self._threads = [threading.Thread(target=self._ask, args=(protocol,)) for protocol in [*PROTOCOLS] * 2]

    def _ask(self, protocol: str) -> None:
        library = PROTOCOLS[protocol]
        client = library.InferenceServerClient(getattr(self._server, protocol))
        asked = inputs_of(library, self._rows)
        while not self._stop.is_set():
            try:
                answer = client.infer("tiny", asked).as_numpy("logits")
                if not self._known(answer):
                    self.wrong.append("an answer of neither version")
            except tritonclient.utils.InferenceServerException as err:
                self.wrong.append(str(err))
            self.answered += 1
        client.close()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_new_versions_and_rollbacks_under_load_lose_no_request(job: Path, rows: Rows, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    ship_folder(job, order(repository, dense="none"))
    later = changed(job, tmp_path / "later", scale=1.0)
    one = first(rows, 0)
    old, new = (locally(each / "model.onnx", one)["logits"] for each in (job, later))
    assert not np.allclose(old, new, atol=10 * TOLERANCE)
    with TritonServer(repository, tmp_path / "scratch", home=home("triton")) as server:

        def serves(expected: np.ndarray) -> bool:
            return np.allclose(ask(server, "http", "tiny", one)["logits"], expected, atol=TOLERANCE)

        def known(answer: np.ndarray) -> bool:
            return any(np.allclose(answer, each, atol=TOLERANCE) for each in (old, new))

        with Load(server, one, known) as load:
            ship_folder(later, order(repository, dense="none"))
            wait_until(lambda: serves(new))
            roll_back(repository, "tiny")
            wait_until(lambda: serves(old))
        assert not load.wrong
        assert load.answered > 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_serve_check_finds_triton_right_and_loads_dense_beside_pruned(triton: TritonServer, protocol: str) -> None:
    url, root = f"{protocol}://{getattr(triton, protocol)}", triton.repository
    found = check_server(root, url, load=ServerLoad((1, 3), seconds=0.1, blocks=2))
    assert not found.problems
    assert {(each.manifest.role, each.compared_with) for each in found.checked} == {
        ("dense", "artifact"),
        ("pruned", "artifact"),
    }
    ((pair, points),) = found.load
    assert pair.dense is not None
    assert all(point.per_second("tiny:1") > 0 for point in points)


def test_a_corrupt_version_leaves_the_old_one_serving(job: Path, rows: Rows, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    ship_folder(job, order(repository, dense="none"))
    expected = locally(job / "model.onnx", rows)
    with TritonServer(repository, tmp_path / "scratch", home=home("triton")) as server:
        ship_folder(changed(job, tmp_path / "later", scale=1.0), order(repository, dense="none"))
        # Another disk's fault: the shipper itself would have refused it.
        shutil.copy(repository / "tiny/2/model.onnx", tmp_path / "whole.onnx")
        (repository / "tiny/2/model.onnx").write_bytes((tmp_path / "whole.onnx").read_bytes()[:1000])
        wait_until(lambda: "failed to load 'tiny' version 2" in server.log.read_text(errors="replace"))
        check_equal(ask(server, "http", "tiny", rows), expected)
        roll_back(repository, "tiny")
        check_equal(ask(server, "grpc", "tiny", rows), expected)


def test_after_kill_9_and_a_restart_the_answers_are_the_same(job: Path, rows: Rows, tmp_path: Path) -> None:
    ship_folder(job, order(tmp_path / "repository"))
    with TritonServer(tmp_path / "repository", tmp_path / "scratch", home=home("triton")) as server:
        before = ask(server, "http", "tiny", rows)
        server.kill()
        assert not server.ready()
        server.start()
        after = ask(server, "http", "tiny", rows)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_dense_and_pruned_are_served_as_versions_of_one_model(job: Path, rows: Rows, tmp_path: Path) -> None:
    ship_folder(job, order(tmp_path / "repository", dense="versions"))
    with TritonServer(tmp_path / "repository", tmp_path / "scratch", home=home("triton")) as server:
        for version, artifact in (("1", "dense.onnx"), ("2", "model.onnx"), ("", "model.onnx")):
            check_equal(ask(server, "grpc", "tiny", rows, version), locally(job / artifact, rows))


def test_mlserver_gives_the_same_outputs_and_follows_a_new_version(job: Path, rows: Rows, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    ship_folder(job, order(repository, server="mlserver"))
    with MLServerProcess(repository, tmp_path / "scratch", home=home("mlserver")) as server:
        for name, artifact in (("tiny", "model.onnx"), ("tiny-dense", "dense.onnx")):
            check_equal(ask(server, "grpc", name, rows), locally(job / artifact, rows))
        for protocol in PROTOCOLS:
            url = f"{protocol}://{getattr(server, protocol)}"
            assert not check_server(repository, url, load=ServerLoad(())).problems
        later = changed(job, tmp_path / "later", scale=1.0)
        ship_folder(later, order(repository, server="mlserver"))
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
        client.load_model("tiny")
        check_equal(ask(server, "grpc", "tiny", rows), locally(later / "model.onnx", rows))
        roll_back(repository, "tiny")
        client.load_model("tiny")
        check_equal(ask(server, "grpc", "tiny", rows), locally(job / "model.onnx", rows))
        many = {name: values.repeat(3, 0)[:17] for name, values in rows.items()}
        with pytest.raises(tritonclient.utils.InferenceServerException, match="1 to 16 samples"):
            client.infer("tiny", inputs_of(tritonclient.grpc, many))
        client.close()
    assert Repository(repository).state("tiny").served == (1,)


@pytest.fixture
def kserve_repository(job: Path, tmp_path: Path) -> Path:
    options = ServingOptions(storage_uri="s3://bucket/repository", canary=20, threads=1, instances=2)
    ship_folder(job, order(tmp_path / "repository", server="kserve", options=options))
    return tmp_path / "repository"


@pytest.mark.parametrize("name", ["tiny", "tiny-dense"])
def test_kserve_understands_the_service_and_the_metadata_by_its_own_schema(kserve_repository: Path, name: str) -> None:
    service, metadata = kserve_repository / f"{name}.yaml", kserve_repository / name / "metadata.json"
    understood = kserve_reads(service, metadata)
    assert understood["service"]["spec"]["predictor"]["model"].pop("name") == ""  # KServe's own default
    assert understood["service"] == yaml.safe_load(service.read_text())
    assert understood["metadata"] == json.loads(metadata.read_text())


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("spec", "predictor", "model", "storageURI"), "s3://bucket", "V1beta1ModelSpec has no field storageURI"),
        (("spec", "predictor", "canaryTrafficPercent"), "20", "'20' is no int"),
        (("spec", "predictor", "model", "args"), [8], "8 is no str"),
    ],
)
def test_kserves_schema_refuses_what_it_does_not_know(
    kserve_repository: Path, path: tuple[str, ...], value: object, says: str
) -> None:
    file = kserve_repository / "tiny.yaml"
    service = yaml.safe_load(file.read_text())
    entry = service
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    file.write_text(yaml.safe_dump(service))
    with pytest.raises(ValueError, match=says):
        kserve_reads(file, kserve_repository / "tiny/metadata.json")


def kserve_reads(service: Path, metadata: Path) -> Any:
    """Both files as KServe's Python models understand them.

    Raises: ValueError: they do not.
    """
    command = [home("kserve") / "bin/python", ROOT / "tests/servers/read_kserve.py", service, metadata]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(done.stderr)
    return json.loads(done.stdout)


def test_triton_serves_kserves_repository_as_the_service_says(
    kserve_repository: Path, job: Path, rows: Rows, tmp_path: Path
) -> None:
    service = yaml.safe_load((kserve_repository / "tiny.yaml").read_text())
    control = service["spec"]["predictor"]["model"]["args"]
    with TritonServer(kserve_repository, tmp_path / "scratch", home=home("triton"), control=control) as server:
        check_equal(ask(server, "grpc", "tiny", rows), locally(job / "model.onnx", rows))
        client = tritonclient.http.InferenceServerClient(server.http)
        assert not client.is_model_ready("tiny-dense")
        emitted = json.loads((kserve_repository / "tiny/metadata.json").read_text())
        answered = client.get_model_metadata("tiny")
        client.close()
    assert {key: answered[key] for key in ("name", "versions", "inputs", "outputs")} == {
        key: emitted[key] for key in ("name", "versions", "inputs", "outputs")
    }
