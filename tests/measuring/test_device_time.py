"""Time on the device alone, on a device of which only launches of known length move the clock."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.jobs.bench import BenchSettings
from optin_deploy.jobs.suites import read_suite
from optin_deploy.measuring.artifacts import device_exporter
from optin_deploy.measuring.device_clock import MAX_RUNS, stretch_runs
from optin_deploy.measuring.device_time import DeviceTime, measure_device_time
from optin_deploy.measuring.points import Point
from optin_deploy.reporting.report import DEVICE_NOTE, device_rows, unstable_lines
from optin_deploy.reporting.terminal import print_latency
from optin_deploy.runtimes.base import Closing, Feeds
from support.made_timings import MEASURED, TIMING
from support.tiny_checkpoint import Shell

FEEDS = {"input_ids": np.arange(4, dtype=np.int64).reshape(1, 4)}
LAUNCH_MS = {("dense", True): 3.0, ("pruned", True): 2.0, ("dense", False): 6.0, ("pruned", False): 5.0}
"""By model, and whether it replays a graph: 1.5x with one, 1.2x without."""
BLOCKS = 4


@dataclass
class Device:
    """A device, its timer and a diary of what was done on it."""

    records: bool = True
    """Can it record CUDA graphs?"""
    now_ms: float = 0.0
    opened: list[tuple[str, bool]] = field(default_factory=list)
    closed: int = 0
    inputs: list[Mapping[str, Tensor]] = field(default_factory=list)
    stretches: list[int] = field(default_factory=list)

    def stretch_ms(self, run: Callable[[], object], runs: int) -> float:
        before = self.now_ms
        for _ in range(runs):
            run()
        self.stretches.append(runs)
        return (self.now_ms - before) / runs

    def call_ms(self, run: Callable[[], object]) -> float:
        raise AssertionError("a call holds the way to the device")

    def opener(self, name: str) -> Callable[[bool], Plan]:
        return lambda cuda_graph: Plan(self, name, cuda_graph)

    def measured(self) -> DeviceTime:
        return measure_device_time(
            self.opener("dense"), self.opener("pruned"), FEEDS, blocks=BLOCKS, timer_of=lambda device: self
        )


class Plan(Closing):
    """A runtime whose launches take LAUNCH_MS."""

    engine = "fake"
    device = torch.device("cpu")
    replays = False

    def __init__(self, on: Device, name: str, cuda_graph: bool) -> None:
        self._on, self._name, self._graph = on, name, cuda_graph
        on.opened.append((name, cuda_graph))
        on.now_ms += 1000.0  # opening is slow, and must not be counted

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        self._on.inputs.append(inputs)
        self._on.now_ms += 100.0
        self.replays = self._graph and self._on.records

        def launch() -> None:
            self._on.now_ms += LAUNCH_MS[self._name, self._graph]

        return launch

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        raise AssertionError("a run holds transfers")

    def synchronize(self) -> None: ...

    def close(self) -> None:
        self._on.closed += 1


# ---- the measurement


def test_known_times_give_the_exact_speedups() -> None:
    found = Device().measured()
    assert found.cuda_graph is not None
    for timing, dense, pruned in ((found.cuda_graph, 3.0, 2.0), (found.no_cuda_graph, 6.0, 5.0)):
        assert (timing.dense(50), timing.pruned(50)) == pytest.approx((dense, pruned), rel=1e-9)
        assert timing.speedup == pytest.approx(dense / pruned, rel=1e-9)
        assert timing.ci95 == pytest.approx((dense / pruned,) * 2, rel=1e-9)
        assert len(timing.dense_ms) == BLOCKS
        assert not timing.unstable


def test_every_block_opens_fresh_runtimes_with_and_then_without_graphs_and_closes_them() -> None:
    device = Device()
    device.measured()
    assert [graph for _, graph in device.opened] == [True] * 3 * BLOCKS + [False] * 3 * BLOCKS
    assert Counter(device.opened) == {key: (2 if key[0] == "dense" else 1) * BLOCKS for key in LAUNCH_MS}
    assert device.closed == len(device.opened)


def test_inputs_are_put_on_the_device_once() -> None:
    device = Device()
    device.measured()
    assert len(device.inputs) == len(device.opened)
    assert all(torch.equal(given["input_ids"], torch.arange(4).view(1, 4)) for given in device.inputs)
    assert len(device.stretches) > 10 * len(device.inputs)


def test_a_stretch_lasts_at_least_four_ms_once_a_launch_is_known() -> None:
    device = Device()
    device.measured()
    assert set(device.stretches) == {1, 2}  # 6 and 5 ms; 3 and 2 ms
    assert [stretch_runs(ms) for ms in (float("inf"), 5.0, 4.0, 1.5, 1e-3)] == [1, 1, 1, 3, MAX_RUNS]


def test_where_no_graph_can_be_recorded_none_is_claimed() -> None:
    device = Device(records=False)
    found = device.measured()
    assert found.cuda_graph is None
    assert found.no_cuda_graph.speedup == pytest.approx(1.2)
    assert device.closed == len(device.opened)
    measured = replace(MEASURED, device_time=found)
    assert measured.to_json()["device_time"]["cuda_graph"] is None
    assert device_rows([measured])[0] == ("3 x 16", "CUDA graph", "none recorded", "", "")
    assert found.transfers_ms(TIMING) == pytest.approx({"dense": 0.0, "pruned": -1.0})


# ---- what is told


def measured_ms(dense: float, pruned: float, again: float | None = None) -> Any:
    blocks = [((ms,) * 3,) * 2 for ms in (dense, pruned, dense if again is None else again)]
    return replace(TIMING, dense_ms=blocks[0], pruned_ms=blocks[1], again_ms=blocks[2])


ON_DEVICE = replace(MEASURED, device_time=DeviceTime(measured_ms(4.5, 3.0), measured_ms(5.0, 4.0)))
"""The ordinary medians are 6 and 4 ms."""


def test_a_stored_row_holds_raw_samples_from_which_its_figures_follow() -> None:
    row = json.loads(json.dumps(replace(MEASURED, device_time=Device().measured()).to_json()))
    assert "device_time" not in MEASURED.to_json()
    for way in ("cuda_graph", "no_cuda_graph"):
        stored = row["device_time"][way]
        samples = stored["samples_ms"]
        for name in ("dense", "pruned"):
            assert stored[name]["p50_ms"] == median(ms for block in samples[name] for ms in block)
            assert row["device_time"]["transfers_ms"][name] == (
                row[name]["p50_ms"] - row["device_time"]["cuda_graph"][name]["p50_ms"]
            )
        ratios = [median(a) / median(b) for a, b in zip(samples["dense"], samples["pruned"], strict=True)]
        assert stored["speedup"] == pytest.approx(float(np.prod(ratios)) ** (1 / BLOCKS))
        assert stored["ci95"][0] <= stored["speedup"] * (1 + 1e-12)


def test_the_table_shows_both_ways_and_what_the_transfers_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert device_rows([MEASURED]) == []
    assert device_rows([MEASURED, ON_DEVICE]) == [
        ("3 x 16", "CUDA graph", "4.500", "3.000", "1.50x [1.50, 1.50]"),
        ("3 x 16", "no CUDA graph", "5.000", "4.000", "1.25x [1.25, 1.25]"),
        ("3 x 16", "transfers", "1.500", "1.000", ""),
    ]
    print_latency([ON_DEVICE])
    assert DEVICE_NOTE in capsys.readouterr().out
    print_latency([MEASURED])
    assert DEVICE_NOTE not in capsys.readouterr().out


def test_a_device_that_differs_from_itself_is_told() -> None:
    shaky = replace(ON_DEVICE, device_time=DeviceTime(measured_ms(4.5, 3.0, again=3.0), measured_ms(5.0, 4.0)))
    (line,) = unstable_lines([ON_DEVICE, shaky])
    assert line.startswith("Unstable at 3 x 16 on the device, CUDA graph: ")
    assert "[1.50, 1.50]" in line


# ---- who can


CPU_ALONE = ("onnx", "openvino")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU where it is asked whether there is one."""
    monkeypatch.setattr("optin_deploy.measuring.artifacts.current_gpu", lambda: torch.device("cpu"))


@pytest.mark.parametrize("engine", ENGINES)
def test_all_engines_that_run_on_a_gpu_launch_without_transfers(engine: str, on_gpu: None) -> None:
    target = exporter(engine)
    if engine not in CPU_ALONE:
        assert device_exporter(target) is target
        return
    able = ", ".join(name for name in ENGINES if name not in CPU_ALONE)
    with pytest.raises(BadInput, match=f"engine {engine} cannot .* --device-time is for {able}"):
        device_exporter(target)


@pytest.mark.parametrize(("engine", "said"), [("onnx", "engine onnx cannot be timed"), ("torch", "no CUDA device")])
def test_what_cannot_be_timed_is_refused_before_any_work(shell: Shell, tmp_path: Path, engine: str, said: str) -> None:
    ran = shell("optin", "bench", tmp_path / "absent", "--engine", engine, "--device-time", "--dry-run")
    assert ran.code == 2
    assert said in ran.err


def test_bench_times_the_torch_engine_on_the_device(
    shell: Shell, finished: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optin_deploy.measuring.timing.MAX_ROUNDS", 3)
    monkeypatch.setattr("optin_deploy.measuring.device_clock.STRETCH_MS", 0.0)
    ran = shell("optin", "bench", finished, "--engine", "torch", "--device-time")
    assert ran.code == 0, ran.err
    (row,) = json.loads((finished / "measurements.json").read_text())["latency"]
    assert row["device_time"]["cuda_graph"] is None  # none can be recorded on a CPU
    assert row["device_time"]["no_cuda_graph"]["speedup"] > 0


def test_a_suite_asks_for_it_in_its_file(shell: Shell, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text('engines = ["trt"]\ndevice_time = true\n')
    assert list(read_suite(file).benches()) == [BenchSettings("trt", None, (Point(1),), 0, device_time=True)]
    beside = shell("optin", "bench", finished, "--suite", file, "--device-time")
    assert beside.code == 2
    assert "device_time = true" in beside.err
    file.write_text("device_time = true\n")
    refused = shell("optin", "bench", finished, "--suite", file)
    assert refused.code == 2
    assert "engine onnx cannot be timed on the device alone" in refused.err
    assert not (finished / "measurements.json").exists()
