"""Describe the machine and the software a measurement was made with; nothing that names its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from optin_deploy.common.processors import available_cpus, physical_cores, read_cpuinfo, read_text, usable_cpus

DISTRIBUTIONS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
"""Packages whose version can change a latency."""


def read_line(path: Path) -> str | None:
    """First line of a system file; None if this system does not have it or does not show it."""
    return read_text(path).partition("\n")[0].strip() or None


def installed_versions(names: tuple[str, ...] = DISTRIBUTIONS) -> dict[str, str]:
    """Version by name of those that are installed; imports none of them."""
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in names}
    return {name: distribution.version for name, distribution in found.items() if distribution is not None}


def environment(*, root: Path = Path("/")) -> dict[str, object]:
    """What a reader needs to judge a latency, ready for JSON; None where this system does not tell.

    Args: root: where `proc` and `sys` are looked for.
    Returns: date (UTC, ISO 8601), platform, cpu_model, cores_physical and cores_logical (those this process may
        use), cpus_available (of the logical ones, how many at the same time: a quota may allow fewer), memory_bytes,
        load_average (runnable processes over 1, 5, 15 minutes), governor (of the first CPU that may be used), python,
        versions (by distribution). No host name, user name or path.
    """
    usable = usable_cpus()
    cpus = [cpu for cpu in read_cpuinfo(root / "proc/cpuinfo") if int(cpu["processor"]) in usable]
    memory = (read_line(root / "proc/meminfo") or "").split()  # MemTotal: 123 kB
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_model": next((cpu["model name"] for cpu in cpus if "model name" in cpu), None),
        "cores_physical": physical_cores(cpus),
        "cores_logical": len(usable),
        "cpus_available": available_cpus(root),
        "memory_bytes": int(memory[1]) * 1024 if len(memory) == 3 else None,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "governor": read_line(root / f"sys/devices/system/cpu/cpu{min(usable)}/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }
