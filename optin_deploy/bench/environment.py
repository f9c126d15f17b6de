"""Describe the machine and the software a measurement was made with; nothing that names its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

DISTRIBUTIONS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
"""Packages whose version can change a latency."""


def available_cpus() -> frozenset[int]:
    """Numbers of the logical CPUs this process may run on (all of them where the system cannot tell)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_line(path: Path) -> str | None:
    """First line of a system file; None if this system does not have it or does not show it."""
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip() or None
    except OSError:
        return None


def read_cpuinfo(path: Path) -> list[dict[str, str]]:
    """/proc/cpuinfo as one dict per logical CPU; empty where there is none (not Linux)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    rows = ([line.partition(":") for line in entry.splitlines()] for entry in text.split("\n\n"))
    cpus = ({key.strip(): value.strip() for key, _, value in row} for row in rows)
    return [cpu for cpu in cpus if "processor" in cpu]


def installed_versions(names: tuple[str, ...] = DISTRIBUTIONS) -> dict[str, str]:
    """Version by name of those that are installed; imports none of them."""
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in names}
    return {name: distribution.version for name, distribution in found.items() if distribution is not None}


def environment(*, root: Path = Path("/")) -> dict[str, object]:
    """What a reader needs to judge a latency, ready for JSON; None where this system does not tell.

    Args: root: where `proc` and `sys` are looked for.
    Returns: date (UTC, ISO 8601), platform, cpu_model, cores_physical and cores_logical (those this process may
        use), memory_bytes, load_average (runnable processes over 1, 5, 15 minutes), governor (of the first CPU
        that may be used), python, versions (by distribution). No host name, user name or path.
    """
    usable = available_cpus()
    cpus = [cpu for cpu in read_cpuinfo(root / "proc/cpuinfo") if int(cpu["processor"]) in usable]
    cores = {(cpu["physical id"], cpu["core id"]) for cpu in cpus if {"physical id", "core id"} <= cpu.keys()}
    memory = (read_line(root / "proc/meminfo") or "").split()  # MemTotal: 123 kB
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_model": next((cpu["model name"] for cpu in cpus if "model name" in cpu), None),
        "cores_physical": len(cores) or None,
        "cores_logical": len(usable),
        "memory_bytes": int(memory[1]) * 1024 if len(memory) == 3 else None,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "governor": read_line(root / f"sys/devices/system/cpu/cpu{min(usable)}/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }
