"""`optin serve-check` against a small V2 server: right answers, wrong ones, hostile ones; and the load generator."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_deploy.errors import BadInput, ServerFault
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.serving.checking import check_server, compare, differences
from optin_deploy.serving.client import METADATA_BYTES, connect
from optin_deploy.serving.load import Burst, LoadPoint, burst, measure_load
from optin_deploy.serving.manifest import ServingOptions, TensorSpec
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.server_load import ServerLoad
from optin_deploy.serving.shipping import ship_folder
from support import tiny_checkpoint as tiny

Json = dict[str, Any]


@dataclass
class Served:
    """A V2 server over HTTP and JSON of one repository; `bend` changes an answer before it is sent."""

    repository: Repository
    extensions: tuple[str, ...] = ()
    bend: Callable[[str, Any], Any] = lambda path, answer: answer
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, asked: Json | None) -> Any:
        parts = path.strip("/").split("/")
        if path == "/v2/health/ready":
            return {}
        if path == "/v2":
            return {"name": "small", "version": "1", "extensions": [*self.extensions]}
        name, version = parts[2], int(parts[4])
        manifest = self.repository.manifest(name, version)
        if asked is None:
            kinds = {"inputs": manifest.inputs, "outputs": manifest.outputs}
            return {"name": name, **{kind: [vars(each) for each in tensors] for kind, tensors in kinds.items()}}
        dtypes = {"INT64": np.int64, "FP32": np.float32}
        feeds = {
            each["name"]: np.array(each["data"], dtypes[each["datatype"]]).reshape(each["shape"])
            for each in asked["inputs"]
        }
        with OrtRuntime(self.repository.folder(name, version) / "model.onnx", threads=1) as runtime:
            found = runtime.run(feeds)
        outputs = [
            {"name": key, "datatype": "FP32", "shape": list(values.shape), "data": values.reshape(-1).tolist()}
            for key, values in found.items()
        ]
        return {"model_name": name, "outputs": outputs}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("served") / "repository"
    options = ServingOptions(max_batch=8, threads=1)
    ship_folder(tiny.finished_job(), ShipOrder(server="triton", out=root, name="tiny", options=options))
    return Repository(root)


@pytest.fixture
def served(repository: Repository) -> Iterator[Served]:
    small = Served(repository)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes | None) -> None:
            small.requests.append((self.path, dict(self.headers)))
            asked = None if body is None else json.loads(body)
            found = small.bend(self.path, small.answer(self.path, asked))
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        small.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield small
        server.shutdown()
        thread.join()


def check(served: Served, **settings: Any) -> Any:
    names, timeout = settings.pop("names", ()), settings.pop("timeout", 10)
    load = ServerLoad(**{"concurrencies": (), **settings})
    return check_server(served.repository.root, served.url, names=names, timeout=timeout, load=load)


def test_right_answers_are_found_right(served: Served) -> None:
    found = check(served)
    assert not found.problems
    assert {each.manifest.name for each in found.checked} == {"tiny", "tiny-dense"}
    for each in found.checked:
        assert each.largest_error < 1e-6
        assert (each.requests, each.compared_with) == (9, "artifact")  # eight rows alone, and together


def off_by(factor: float) -> Callable[[str, Any], Any]:
    def bend(path: str, answer: Any) -> Any:
        if path.endswith("/infer"):
            for output in answer["outputs"]:
                output["data"] = [factor * value for value in output["data"]]
        return answer

    return bend


def test_answers_that_are_one_percent_off_are_told(served: Served) -> None:
    served.bend = off_by(1.01)
    problems = check(served, names=["tiny"]).problems
    assert len(problems) == 1
    assert "tiny:1: the outputs differ by" in problems[0]
    served.bend = off_by(1 + 1e-7)
    assert not check(served, names=["tiny"]).problems


def test_a_single_nan_in_a_late_answer_is_told(served: Served) -> None:
    count = 0

    def bend(path: str, answer: Any) -> Any:
        nonlocal count
        count += path.endswith("/infer")
        if count == 3:
            answer["outputs"][0]["data"][0] = math.nan
        return answer

    served.bend = bend
    found = check(served, names=["tiny"])
    assert found.problems
    json.dumps(found.to_json(), allow_nan=False)


def test_the_dense_model_in_the_pruned_ones_place_is_told(served: Served) -> None:
    manifests = {name: served.repository.manifest(name, 1) for name in ("tiny", "tiny-dense")}
    original = served.answer
    served.answer = lambda path, asked: original(path.replace("/tiny/", "/tiny-dense/"), asked)  # type: ignore[method-assign]
    assert manifests["tiny"].sha256 != manifests["tiny-dense"].sha256
    assert check(served, names=["tiny"]).problems


def metadata_with(change: Callable[[Json], None]) -> Callable[[str, Any], Any]:
    def bend(path: str, answer: Any) -> Any:
        if "/models/" in path and not path.endswith("/infer"):
            change(answer)
        return answer

    return bend


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["inputs"].pop(), "the server has no input"),
        (lambda data: data["outputs"][0].update(name="other"), "the server has no output logits, but other"),
        (lambda data: data["inputs"][0].update(datatype="INT32"), "is INT32 on the server, INT64 in the manifest"),
        (lambda data: data["outputs"][0].update(shape=[-1, 7]), r"shape \[-1, 7\] on the server"),
        (lambda data: data["outputs"][0].update(shape=[-1]), r"shape \[-1\] on the server"),
    ],
)
def test_metadata_that_differ_are_told(served: Served, change: Callable[[Json], None], says: str) -> None:
    import re

    served.bend = metadata_with(change)
    found = check(served, names=["tiny"])
    assert re.search(says, found.problems[0])
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        ("/v2", b"<html>hello</html>", "did not answer with JSON"),
        ("/v2", b"[1, 2]", "not an object"),
        ("/v2", b"[" * 100_000, "did not answer with JSON"),
        ("/v2", b" " * (METADATA_BYTES + 10), "more than"),
        ("/v2/models/tiny/versions/1", b'{"inputs": 3, "outputs": []}', "no list of tensors"),
        ("/v2/models/tiny/versions/1", b'{"inputs": [{"name": "x"}], "outputs": []}', "not of the V2 protocol"),
        (
            "/v2/models/tiny/versions/1",
            b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1e300]}], "outputs": []}',
            "not of the V2 protocol",
        ),
        ("/v2/models/tiny/versions/1/infer", b"{}", "does not hold what it says"),
        (
            "/v2/models/tiny/versions/1/infer",
            b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [99999, 99999], "data": [1.0]}]}',
            "does not hold what it says",
        ),
        (
            "/v2/models/tiny/versions/1/infer",
            b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 3], "data": ["a", "b", "c"]}]}',
            "does not hold what it says",
        ),
    ],
)
def test_hostile_answers_are_errors_of_one_line(served: Served, path: str, answer: bytes, says: str) -> None:
    served.bend = lambda asked, found: answer if asked == path else found
    with pytest.raises(ServerFault, match=says) as raised:
        check(served, names=["tiny"])
    assert len(str(raised.value)) < 1000


def test_an_output_of_another_shape_or_type_is_told() -> None:
    right = np.ones((2, 3), np.float32)
    assert compare({"y": right}, "y", right) == (None, 0.0)
    for wrong in (right[:1], right.astype(np.float64), right.reshape(3, 2)):
        problem, _ = compare({"y": wrong}, "y", right)
        assert problem is not None
    assert compare({}, "y", right)[0] is not None
    assert compare({"y": right * np.nan}, "y", right)[1] is not None
    assert not compare({"y": right * np.nan}, "y", right)[1] <= 1


def test_open_sizes_fit_any_and_fixed_ones_only_themselves() -> None:
    ours = (TensorSpec("x", "FP32", (-1, 3)),)
    assert not differences("input", ours, (TensorSpec("x", "FP32", (8, 3)),))
    assert not differences("input", ours, (TensorSpec("x", "FP32", (-1, -1)),))
    assert differences("input", ours, (TensorSpec("x", "FP32", (-1, 4)),))


def test_values_are_sent_as_bytes_only_where_the_server_offers_it(served: Served) -> None:
    with connect(served.url, 10) as client:
        feeds = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
        full = {each.name: feeds.get(each.name, np.zeros((1, 4), np.int64)) for each in client.metadata("tiny", "1")[0]}
        client.infer("tiny", full, "1")
    headers = [headers for path, headers in served.requests if path.endswith("/infer")]
    assert len(headers) == 1
    assert "Inference-Header-Content-Length" not in headers[0]
    served.extensions = ("binary_tensor_data",)
    with connect(served.url, 10) as client, pytest.raises(ServerFault):
        client.infer("tiny", full, "1")  # the small server reads JSON alone
    headers = [headers for path, headers in served.requests if path.endswith("/infer")]
    assert "Inference-Header-Content-Length" in headers[-1]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_told(scheme: str, repository: Repository) -> None:
    from benchmarks.serving.servers import free_ports

    (port,) = free_ports(1)
    with pytest.raises(ServerFault, match=str(port)):
        check_server(repository.root, f"{scheme}://127.0.0.1:{port}", timeout=5, load=ServerLoad(()))


def test_a_server_that_does_not_answer_in_time_is_told(served: Served) -> None:
    awake = threading.Event()

    def sleepy(path: str, answer: Any) -> Any:
        awake.wait(20)
        return answer

    served.bend = sleepy
    with pytest.raises(ServerFault, match="timed out"):
        check(served, timeout=0.3)
    awake.set()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host:1", "http://host", "http://host:1/x", "http://u:p@host:1", "http://h:99999"],
)
def test_urls_that_lead_nowhere_are_refused(url: str, repository: Repository) -> None:
    with pytest.raises(BadInput, match="--url"):
        check_server(repository.root, url)


def test_files_are_verified_before_anything_is_asked(served: Served, tmp_path: Path) -> None:
    copy = Repository(tiny.copy_of(served.repository.root, tmp_path / "copy"))
    (copy.root / "tiny/1/model.onnx").write_bytes(b"other")
    with pytest.raises(BadInput, match="not the published file"):
        check_server(copy.root, served.url, load=ServerLoad(()))
    assert not served.requests


def test_models_that_are_not_there_are_refused(served: Served) -> None:
    with pytest.raises(BadInput, match=r"--model nothing: not in .*; there are: tiny, tiny-dense"):
        check(served, names=["nothing"])


def test_dense_and_pruned_are_loaded_beside_each_other(served: Served) -> None:
    found = check(served, concurrencies=(1, 2), seconds=0.02, blocks=2, batch=3)
    ((pair, points),) = found.load
    assert (pair.pruned.name, pair.dense and pair.dense.name) == ("tiny", "tiny-dense")
    assert [point.concurrency for point in points] == [1, 2]
    rows = found.load_rows()
    assert [(row[0], row[1]) for row in rows] == [
        ("1", "tiny-dense:1"),
        ("1", "tiny:1"),
        ("2", "tiny-dense:1"),
        ("2", "tiny:1"),
    ]
    data = json.loads(json.dumps(found.to_json()))
    assert [len(each) for each in data["load"][0]["points"][0]["bursts"].values()] == [2, 2]
    assert {each["sha256"] for each in data["models"]} == {
        served.repository.manifest(name, 1).sha256["model.onnx"] for name in ("tiny", "tiny-dense")
    }


def test_a_model_with_problems_is_not_loaded(served: Served) -> None:
    served.bend = off_by(1.01)
    assert check(served, concurrencies=(1,)).load == ()


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now, self._lock = 0.0, threading.Lock()

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


def test_every_answer_counts_and_the_last_one_is_waited_for() -> None:
    clock = Clock()
    found = burst([lambda: clock.work(0.25)], 1.0, clock)
    assert found == Burst(1.0, (250.0,) * 4)
    slow = burst([lambda: clock.work(3.0)], 1.0, clock)  # one answer at least
    assert slow == Burst(3.0, (3000.0,))


def test_a_failed_request_is_a_failed_measurement() -> None:
    answers = iter(range(3))

    def fails() -> None:
        if next(answers) == 2:
            raise ServerFault("gone")

    with pytest.raises(ServerFault, match="gone"):
        burst([fails], 60.0)


def test_blocks_are_in_random_order_drawn_by_the_seed() -> None:
    def order(seed: int) -> list[str]:
        clock, asked = Clock(), list[str]()

        def asker(model: str) -> Callable[[], object]:
            def ask() -> None:
                asked.append(model)
                clock.work(1.0)

            return ask

        askers = {"dense": lambda: asker("dense"), "pruned": lambda: asker("pruned")}
        points = measure_load(askers, (1,), seconds=1.0, blocks=6, seed=seed, clock=clock)
        assert [len(bursts) for bursts in points[0].bursts.values()] == [6, 6]
        return asked[2:]  # after the warm-up

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1
    blocks = [set(order(0)[i : i + 2]) for i in range(0, 12, 2)]
    assert blocks == [{"dense", "pruned"}] * 6


def test_the_gain_is_the_mean_ratio_over_blocks() -> None:
    def bursts(*rates: int) -> tuple[Burst, ...]:
        return tuple(Burst(1.0, (1.0,) * rate) for rate in rates)

    point = LoadPoint(4, {"dense": bursts(10, 20), "pruned": bursts(20, 20)})
    gain, (low, high) = point.gain("dense", "pruned")
    assert gain == pytest.approx(math.sqrt(2))
    assert low <= gain <= high
    assert point.per_second("pruned") == 20


def test_the_command_checks_and_fails_with_1(served: Served, shell: tiny.Shell, tmp_path: Path) -> None:
    root, out = served.repository.root, tmp_path / "served.json"
    done = shell("optin", "serve-check", root, "--url", served.url, "--no-latency", "--out", out)
    assert done.code == 0, done.err
    assert len(json.loads(out.read_text())["models"]) == 2
    served.bend = off_by(1.01)
    done = shell("optin", "serve-check", root, "--url", served.url, "--no-latency")
    assert (done.code, "differ by" in done.err) == (1, True)
    assert shell("optin", "serve-check", root, "--url", "tcp://x:1").code == 2
    assert shell("optin", "serve-check", root, "--concurrency", "0", "--url", served.url).code == 2
    assert shell("optin", "serve-check", root, "--url", served.url, "--dry-run").code == 0


def test_two_versions_of_one_model_are_a_pair(repository: Repository) -> None:
    from optin_deploy.serving.checking import _pairs

    pruned, dense = (repository.manifest(name, 1) for name in ("tiny", "tiny-dense"))
    as_version = replace(dense, name="tiny", version=2)
    assert [(pair.pruned, pair.dense) for pair in _pairs([pruned, as_version])] == [(pruned, as_version)]
    foreign = replace(dense, made_from={"source": "another"})
    assert [(pair.pruned, pair.dense) for pair in _pairs([pruned, foreign])] == [(pruned, None)]
    assert [pair.pruned for pair in _pairs([dense])] == [dense]
