"""A machine of four CPUs, by its system files and by what this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fake_machine(root: Path) -> None:
    """Four logical CPUs, two physical cores of one socket."""
    cpuinfo = "\n\n".join(
        f"processor\t: {cpu}\nmodel name\t: Fake CPU @ 3.00GHz: v2\nphysical id\t: 0\ncore id\t\t: {cpu // 2}"
        for cpu in range(4)
    )
    governor = root / "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    (root / "proc").mkdir()
    governor.write_text("performance\n")
    (root / "proc/cpuinfo").write_text(cpuinfo + "\n\n")
    (root / "proc/meminfo").write_text("MemTotal:       2048 kB\nMemFree:        1 kB\n")


def use_cpus(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)
