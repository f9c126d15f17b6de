"""The environment is read from the system, complete, and names nobody."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from optin_deploy.common.environment import environment, installed_versions
from optin_deploy.measuring import state
from optin_deploy.measuring.state import machine_state, ranges_of
from support.fake_machine import fake_machine, use_cpus

KEYS = {
    "date", "platform", "cpu_model", "cores_physical", "cores_logical", "cpus_available",
    "memory_bytes", "load_average", "governor", "python", "versions",
}  # fmt: skip


def test_a_machine_is_read_from_its_system_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(tmp_path)
    use_cpus(monkeypatch, 2, 3)
    found = environment(root=tmp_path)
    assert found["cpu_model"] == "Fake CPU @ 3.00GHz: v2"
    assert found["memory_bytes"] == 2048 * 1024
    assert found["governor"] == "performance"


@pytest.mark.parametrize(("cpus", "physical"), [((0, 1), 1), ((1, 2), 2), ((0, 1, 2, 3), 2)])
def test_only_cores_that_may_be_used_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: tuple[int, ...], physical: int
) -> None:
    fake_machine(tmp_path)
    use_cpus(monkeypatch, *cpus)
    found = environment(root=tmp_path)
    assert (found["cores_logical"], found["cores_physical"]) == (len(cpus), physical)


def test_what_the_system_does_not_tell_is_none(tmp_path: Path) -> None:
    found = environment(root=tmp_path)
    assert found.keys() == KEYS
    assert [key for key, value in found.items() if value is None] == [
        "cpu_model", "cores_physical", "memory_bytes", "governor",
    ]  # fmt: skip


def test_this_machine_is_described_in_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == KEYS
    assert found["python"] == platform.python_version()
    date = datetime.fromisoformat(str(found["date"]))
    assert date.utcoffset() == timedelta(0)


def test_no_host_user_or_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "secret-host", "6.1", "#1", "x86_64")))
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    monkeypatch.setenv("USER", "secret-user")
    monkeypatch.setenv("LOGNAME", "secret-user")
    assert getpass.getuser() == "secret-user"
    text = json.dumps(environment())
    assert "secret" not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_versions_are_those_of_installed_packages_only() -> None:
    assert installed_versions(("numpy", "no-such-package-here")) == {"numpy": np.__version__}


def test_versions_are_read_without_importing_the_packages() -> None:
    script = (
        "import sys; from optin_deploy.common.environment import environment; environment(); "
        "print(*sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_state_of_a_machine_is_read_from_its_system_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = "\n\n".join(f"processor\t: {cpu}\ncpu MHz\t\t: {mhz}" for cpu, mhz in enumerate((800, 2400.2, 2600.4)))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(clocks + "\n\n")
    for zone, heat in enumerate(("41500", "67250")):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(f"{heat}\n")
    use_cpus(monkeypatch, 1, 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.234, 9.0, 9.0))
    monkeypatch.setattr(state, "current_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(state, "gpu_state", lambda device: {"sm_mhz": 1980.0, "driver": "580.1.2"})
    found = machine_state(tmp_path)
    of_cpu = {"load_average": 1.23, "cpu_mhz": 2500, "cpu_temperature_c": 67.25}
    assert found == {**of_cpu, "gpu_sm_mhz": 1980.0, "gpu_driver": "580.1.2"}
    monkeypatch.setattr(state, "current_gpu", lambda: None)
    assert machine_state(tmp_path / "nothing") == {"load_average": 1.23}


def test_people_are_told_the_range_of_each_number() -> None:
    seen = [{"load_average": 0.5, "gpu_power_w": "[N/A]"}, {"load_average": 2, "cpu_mhz": 2400.0}]
    assert ranges_of(seen) == "load_average 0.5 to 2, cpu_mhz 2400 to 2400"
    assert ranges_of([]) == ""
