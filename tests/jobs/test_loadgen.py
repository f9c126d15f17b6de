"""LoadGen's figures are those of what the engine ran; an engine that fails neither hangs nor leaves halves."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from optin_deploy.errors import OptinError
from optin_deploy.exporters.to_onnx import OnnxExporter
from optin_deploy.files.storage import atomic_folder, write_json
from optin_deploy.jobs import loadgen_runs as loadgen
from optin_deploy.jobs.loadgen_runs import run_load
from optin_deploy.measuring.loadgen import LoadSettings, Run, ScenarioRuns, compared_lines, run_rows
from optin_deploy.measuring.loadgen_log import DETAIL, Figures, LoadGenFailed, read_log
from optin_deploy.measuring.loadgen_system import SAMPLES
from optin_deploy.runtimes.base import Closing, Feeds
from support.tiny_checkpoint import Shell, finished_job, snapshot, temporary_files

FEEDS = {"x": np.arange(SAMPLES)[:, None]}
RUN_SECONDS = 0.002
SERVER = LoadSettings("server", 0.3, qps=1600, target_latency_ms=1e4)
LOADS = (LoadSettings(seconds=0.3), LoadSettings("offline", 0.3), SERVER)
FIGURES = Figures(
    valid=True,
    unmet=(),
    errors=(),
    samples=100,
    samples_per_second=50.0,
    mean_ms=2.0,
    p50_ms=2.0,
    p90_ms=3.0,
    p99_ms=4.0,
    version="6",
)


class Counting(Closing):
    """A runtime that keeps what it ran; before each run it calls `act` with the number of runs before."""

    engine = "counting"

    def __init__(self, act: Callable[[int], object] = lambda done: None) -> None:
        self.seen: list[list[int]] = []
        self._act = act

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        self.seen.append(feeds["x"][:, 0].tolist())
        self._act(len(self.seen) - 1)
        return {}

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class Broken(OptinError):
    """What the engine of these tests raises."""


def sleeping(done: int) -> None:
    time.sleep(RUN_SECONDS)


def broken(done: int) -> None:
    if done >= 30:
        raise Broken(f"run {done} broke")


@pytest.fixture
def unwarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is one that LoadGen asked for."""
    monkeypatch.setattr(loadgen, "warm_up", lambda runtimes, feeds, clock: RUN_SECONDS)


# what is measured


@pytest.mark.usefixtures("unwarmed")
def test_single_stream_counts_and_times_what_the_engine_ran(tmp_path: Path) -> None:
    runtime = Counting(sleeping)
    found = run_load(runtime, FEEDS, LOADS[0], batch=1, logs=tmp_path)
    assert found.samples == len(runtime.seen) >= 100
    assert {len(run) for run in runtime.seen} == {1}
    assert len({index for (index,) in runtime.seen}) > SAMPLES / 2  # not one input again and again
    assert 1000 * RUN_SECONDS <= found.p50_ms <= found.p90_ms <= found.p99_ms
    assert found.p50_ms < 20 * 1000 * RUN_SECONDS
    assert found.samples_per_second < 1 / RUN_SECONDS


@pytest.mark.usefixtures("unwarmed")
def test_offline_runs_whole_batches_and_counts_samples(tmp_path: Path) -> None:
    runtime = Counting(sleeping)
    found = run_load(runtime, FEEDS, LoadSettings("offline", 0.31), batch=7, logs=tmp_path)
    assert found.samples % 7  # else the last batch is not tested
    assert len(runtime.seen) == math.ceil(found.samples / 7)
    assert {len(run) for run in runtime.seen} == {7}
    assert {index for run in runtime.seen for index in run} == set(range(SAMPLES))
    assert 7 / RUN_SECONDS / 20 < found.samples_per_second < 7 / RUN_SECONDS


@pytest.mark.usefixtures("unwarmed")
def test_a_server_runs_one_query_at_a_time_and_loadgen_judges(tmp_path: Path) -> None:
    threads = set()
    runtime = Counting(lambda done: threads.add(threading.get_ident()))
    found = run_load(runtime, FEEDS, SERVER, batch=1, logs=tmp_path)
    assert (found.valid, found.unmet, found.errors) == (True, (), ())
    assert found.samples == len(runtime.seen)
    assert {len(run) for run in runtime.seen} == {1}
    assert threads == {threading.get_ident()}  # some engines run only in the thread that opened them
    judged = run_load(runtime, FEEDS, replace(SERVER, target_latency_ms=1e-4), batch=1, logs=tmp_path)
    assert not judged.valid
    assert "too slow for the target latency" in judged.unmet
    assert '"effective_target_latency_ns", "value": 100,' in (tmp_path / DETAIL).read_text()


@pytest.mark.usefixtures("unwarmed")
def test_an_overloaded_server_ends_early(tmp_path: Path) -> None:
    runtime = Counting(sleeping)
    asked = replace(SERVER, qps=20_000)
    found = run_load(runtime, FEEDS, asked, batch=1, logs=tmp_path)
    assert not found.valid
    assert "Too many outstanding queries" in found.errors[0]
    assert found.samples == len(runtime.seen) < 20_000 * 0.3 / 2


def test_the_engine_is_warm_before_the_test(tmp_path: Path) -> None:
    runtime = Counting()
    found = run_load(runtime, FEEDS, LOADS[0], batch=1, logs=tmp_path)
    assert len(runtime.seen) > found.samples


def test_settings_in_the_working_directory_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audit.config").write_text("*.*.min_query_count = 5000\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    found = run_load(Counting(sleeping), FEEDS, LOADS[0], batch=1, logs=tmp_path / "logs")
    assert found.samples < 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.config", "logs"]


# what fails


@pytest.mark.usefixtures("unwarmed")
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.scenario)
def test_what_the_engine_raises_is_raised_after_the_test(load: LoadSettings, tmp_path: Path) -> None:
    runtime = Counting(broken)
    with pytest.raises(Broken, match="run 30 broke"):
        run_load(runtime, FEEDS, load, batch=1, logs=tmp_path)
    assert len(runtime.seen) == 31  # the rest was only completed
    assert run_load(Counting(), FEEDS, load, batch=1, logs=tmp_path).samples  # LoadGen is ready again


def test_ctrl_c_is_raised_after_the_test(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def later(done: int) -> None:
        if done == 30:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        run_load(Counting(later), FEEDS, replace(SERVER, qps=400), batch=1, logs=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_log_without_figures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadGenFailed, match=DETAIL):
        read_log(tmp_path)
    (tmp_path / DETAIL).write_text(':::MLLOG {"key": "result_validity", "value": "VALID"}\n')
    with pytest.raises(LoadGenFailed, match="mean"):
        read_log(tmp_path)


def earlier_run(folder: Path, name: str, text: str) -> None:
    """What an earlier `optin bench --protocol mlperf` left."""
    with atomic_folder(folder / "mlperf") as written:
        (written / name).write_text(text)
    write_json(folder / "mlperf.json", {})


def test_a_failing_engine_leaves_the_folder_as_it_was(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_run(finished, "earlier.txt", "kept")
    before = snapshot(finished)
    opened = []
    real = OnnxExporter.open

    def third_breaks(self: OnnxExporter, path: Path, **options: object) -> object:
        opened.append(path.name)
        runtime = real(self, path, **options)  # type: ignore[arg-type]
        if len(opened) == 3:
            calls = count()
            monkeypatch.setattr(runtime, "run", lambda feeds: broken(next(calls)))
        return runtime

    monkeypatch.setattr(OnnxExporter, "open", third_breaks)
    ran = shell("optin", "bench", finished, "--protocol", "mlperf", "--seconds", 0.1, "--threads", 1)
    assert (ran.code, opened) == (2, ["dense.onnx", "model.onnx", "model.onnx"]), ran.err
    assert "run 30 broke" in ran.err
    assert snapshot(finished) == before
    assert temporary_files(finished) == []


# what is told


@pytest.mark.parametrize(
    ("load", "better", "ratio"),
    [
        (LoadSettings(), {"p90_ms": 1.5}, 2.0),
        (LoadSettings("offline"), {"samples_per_second": 100.0}, 2.0),
        (SERVER, {"p99_ms": 1.0}, 4.0),
    ],
    ids=lambda value: getattr(value, "scenario", None),
)
def test_the_ratio_is_of_geometric_means(load: LoadSettings, better: dict[str, float], ratio: float) -> None:
    (name,) = better
    dense = getattr(FIGURES, name)
    figures = {
        "dense": (replace(FIGURES, **{name: dense / 3}), replace(FIGURES, **{name: dense * 3})),
        "pruned": (replace(FIGURES, **better), replace(FIGURES, **better)),
    }
    runs = tuple(Run(model, i, "", figures[model][i]) for i in (0, 1) for model in figures)
    found = ScenarioRuns(load, runs)
    assert found.ratio == pytest.approx(ratio)
    assert any(f"{ratio:.2f}x" in line for line in compared_lines(found))


def test_invalid_runs_are_told_with_their_reasons() -> None:
    bad = replace(FIGURES, valid=False, unmet=("too short",), errors=("Ending early",))
    runs = (Run("dense", 1, "", FIGURES), Run("pruned", 1, "", bad))
    assert [row[-1] for row in run_rows(runs)] == ["valid", "invalid; too short; Ending early"]
    assert "LoadGen calls 1 of 2 runs invalid: do not compare by them." in compared_lines(
        ScenarioRuns(LoadSettings(), runs)
    )
    assert not [
        line
        for line in compared_lines(ScenarioRuns(LoadSettings(), (*runs[:1], Run("pruned", 1, "", FIGURES))))
        if "1 of" in line
    ]


@pytest.mark.parametrize(
    ("flags", "figure", "said_by_loadgen"),
    [
        ([], "p90_ms", r"90.0th percentile latency \(ns\) : (\d+)"),
        (["--scenario", "offline", "--at", "batch=4,seq=8"], "samples_per_second", r"Samples per second: ([\d.]+)"),
        (
            ["--scenario", "server", "--qps", 300, "--target-latency", 50],
            "p99_ms",
            r"99.00 percentile latency \(ns\)   : (\d+)",
        ),
    ],
    ids=["single-stream", "offline", "server"],
)
def test_bench_tells_what_loadgen_says_of_both(
    shell: Shell, finished: Path, flags: list[object], figure: str, said_by_loadgen: str
) -> None:
    ran = shell("optin", "bench", finished, "--protocol", "mlperf", "--seconds", 0.3, "--threads", 1, *flags)
    assert ran.code == 0, ran.err
    assert "Not an MLPerf result" in ran.out
    assert "600 seconds a run; asked here: 0.3" in ran.out
    assert "no confidence interval" in ran.out
    stored = json.loads((finished / "mlperf.json").read_text())
    assert (stored["schema_version"], stored["compared"]["figure"]) == (1, figure)
    assert stored["loadgen"].startswith("6.")
    assert stored["environment"]["versions"]["onnxruntime"]
    assert [run["model"] for run in stored["runs"]] == ["dense", "pruned", "pruned", "dense"]
    unit = 1e6 if figure.endswith("ms") else 1
    values: dict[str, list[float]] = {"dense": [], "pruned": []}
    for run in stored["runs"]:
        summary = (finished / run["logs"] / "mlperf_log_summary.txt").read_text()
        (said,) = re.findall(said_by_loadgen, summary)
        assert run["figures"][figure] == pytest.approx(float(said) / unit, rel=1e-5)
        values[run["model"]].append(float(said) / unit)
    for model, (first, second) in values.items():
        assert stored["compared"][model] == pytest.approx(math.sqrt(first * second), rel=1e-5)
    assert len({run["logs"] for run in stored["runs"]}) == 4
    assert temporary_files(finished) == []


# what is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scenario", "server"], "needs --qps"),
        (["--scenario", "server", "--qps", 5], "needs --target-latency"),
        (["--scenario", "server", "--target-latency", 5], "needs --qps"),
        (["--qps", 5], "single-stream has no --qps"),
        (["--scenario", "offline", "--target-latency", 5], "offline has no --target-latency"),
        (["--scenario", "multi-stream"], "possible are single-stream, offline, server"),
        (["--seconds", 0], "--seconds 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--at", "batch=1", "--at", "batch=1,seq=8"], "one --at"),
        (["--at", "batch=2"], "batches are for offline"),
        (["--memory"], "stands alone"),
        (["--protocol", "triton"], "possible are interleaved, mlperf"),
        (["--protocol", "interleaved", "--scenario", "offline"], "add --protocol mlperf"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_refused(shell: Shell, flags: list[object], said: str) -> None:
    ran = shell("optin", "bench", finished_job(), "--protocol", "mlperf", *flags)
    assert ran.code == 2
    assert said in ran.err


def test_a_dry_run_writes_nothing(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    ran = shell("optin", "bench", finished, "--protocol", "mlperf", "--seconds", 0.1, "--dry-run")
    assert (ran.code, snapshot(finished)) == (0, before), ran.err
    assert "single-stream" in ran.out


def test_a_missing_loadgen_says_what_to_install(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    ran = shell("optin", "bench", finished_job(), "--protocol", "mlperf", "--seconds", 0.1, "--dry-run")
    assert ran.code == 2
    assert "pip install 'optin-deploy[mlperf]'" in ran.err


def test_another_model_takes_the_figures_away(shell: Shell, finished: Path) -> None:
    earlier_run(finished, "log.txt", "of the model before")
    assert shell("optin", "plan", finished, "--flops", 0.5).code == 0
    assert shell("optin", "rewrite", finished).code == 0
    assert not (finished / "mlperf").exists()
    assert not (finished / "mlperf.json").exists()
