"""Threads follow the affinity and the quota of this process: in engines, in checks, in reports, in what is shipped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from optin_deploy.common import processors
from optin_deploy.common.processors import available_cpus, default_threads, limit_libraries, quota_cpus
from optin_deploy.errors import BadInput
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.runtimes.base import torch_threads
from optin_deploy.runtimes.openvino import OpenVinoRuntime
from optin_deploy.runtimes.ort import OrtRuntime
from support.fake_machine import fake_machine, use_cpus
from support.tiny_checkpoint import Shell, finished_job

GROUP = "proc/self/cgroup"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def quota_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with one CPU's worth of time on a machine of eight."""
    use_cpus(monkeypatch, *range(8))
    monkeypatch.setattr(processors, "quota_cpus", lambda root=None: 1.0)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({GROUP: "0::/\n"}, None),
        ({GROUP: "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({GROUP: "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({GROUP: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "1 2"}, 0.5),
        ({GROUP: "0::/host/only\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                GROUP: "5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            {
                GROUP: "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({GROUP: "0::/../../etc\n", "sys/fs/cgroup/cpu.max": "lots 100000\n"}, None),
        ({GROUP: "\n:::\n0\n", "sys/fs/cgroup/cpu.max": "0 0\n"}, None),
    ],
)
def test_a_quota_is_read_from_both_versions_of_control_groups(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    write(tmp_path, files)
    assert quota_cpus(tmp_path) == quota


@pytest.mark.parametrize(
    ("quota", "available", "threads"), [(None, 4, 2), (3.9, 3, 2), (1.5, 1, 1), (0.2, 1, 1), (64, 4, 2)]
)
def test_threads_are_the_physical_cores_within_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: float | None, available: int, threads: int
) -> None:
    fake_machine(tmp_path)
    use_cpus(monkeypatch, 0, 1, 2, 3)
    if quota is not None:
        write(tmp_path, {GROUP: "0::/\n", "sys/fs/cgroup/cpu.max": f"{int(quota * 100_000)} 100000\n"})
    assert (available_cpus(tmp_path), default_threads(tmp_path)) == (available, threads)
    use_cpus(monkeypatch, 3)
    assert (available_cpus(tmp_path), default_threads(tmp_path)) == (1, 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_on_one_cpu_has_one_thread() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert (available_cpus(), default_threads()) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("quota_of_one")
def test_engines_are_opened_with_what_the_quota_allows() -> None:
    file = finished_job() / "dense.onnx"
    with OrtRuntime(file) as runtime:
        assert runtime._session.get_session_options().intra_op_num_threads == 1
    with OpenVinoRuntime(file) as other:
        assert other._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch_threads() == 1
        with exporter("torch").open(finished_job() / "model"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
        assert {name: exporter(name).threads(0) for name in ENGINES if not name.startswith("trt")} == {
            name: 1 for name in ENGINES if not name.startswith("trt")
        }
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("quota_of_one")
def test_libraries_that_are_not_loaded_yet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit_libraries()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's word
    limit_libraries()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.usefixtures("quota_of_one")
@pytest.mark.parametrize("command", ["bench", "gate", "export"])
def test_more_threads_than_the_quota_are_refused_with_the_number(shell: Shell, finished: Path, command: str) -> None:
    arguments: dict[str, list[object]] = {
        "bench": [finished],
        "gate": [finished / "dense.onnx", finished, "--max-ratio", 2],
        "export": [finished / "model"],
    }
    ran = shell("optin", command, *arguments[command], "--threads", 2, "--dry-run")
    assert ran.code == 2
    assert "--threads 2: possible are 0 to 1. This process may use 1 CPU" in ran.err


@pytest.mark.parametrize("engine", ["trt", "trt-rtx"])
def test_an_engine_without_threads_takes_none(engine: str) -> None:
    assert exporter(engine).threads(0) == 0
    with pytest.raises(BadInput, match=r"--threads 2: engine .* runs on the GPU"):
        exporter(engine).threads(2)


def test_rows_say_how_many_threads_the_default_came_to(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "quota_cpus", lambda root=None: 1.0)
    ran = shell("optin", "bench", finished)
    assert ran.code == 0, ran.err
    stored = json.loads((finished / "measurements.json").read_text())
    assert [row["threads"] for row in stored["latency"]] == [1]
    assert stored["environment"]["cpus_available"] == 1


@pytest.mark.parametrize(
    ("flags", "threads"),
    [([], 6), (["--instances", 2], 3), (["--instances", 100], 1), (["--threads", 5], 5)],
)
def test_ship_writes_the_threads_of_a_copy(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], threads: int
) -> None:
    monkeypatch.setattr(processors, "default_threads", lambda root=None: 6)
    ran = shell(
        "optin", "ship", finished_job(), "--out", tmp_path / "repo", "--name", "tiny", "--dense", "none", *flags
    )
    assert ran.code == 0, ran.err
    config = (tmp_path / "repo" / "tiny" / "config.pbtxt").read_text()
    assert f'string_value: "{threads}"' in config
