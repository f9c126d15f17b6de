"""What a machine does while something is measured: load, clocks, temperatures, power. Reads only, sets nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from optin_deploy.common.environment import read_line
from optin_deploy.common.processors import read_cpuinfo, usable_cpus
from optin_deploy.runtimes.device import current_gpu

State = Mapping[str, str | float]
SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "memory.used": "memory_used_mib",
}
"""Field of nvidia-smi -> our name."""
SHOWN = ("load_average", "cpu_mhz", "cpu_temperature_c", "gpu_sm_mhz", "gpu_temperature_c", "gpu_power_w")
"""What people are told of, if it is there."""


def machine_state(root: Path = Path("/")) -> dict[str, str | float]:
    """What this system tells, ready for JSON; takes milliseconds, and a tenth of a second where there is a GPU.

    Args: root: where `proc` and `sys` are looked for.
    Returns: some of load_average (runnable processes over the last minute), cpu_mhz (mean of the CPUs that may be
        used), cpu_temperature_c (of the hottest thermal zone), and SMI_FIELDS of the GPU with `gpu_` before them.
    """
    usable = usable_cpus()
    cpus = [cpu for cpu in read_cpuinfo(root / "proc/cpuinfo") if int(cpu["processor"]) in usable]
    clocks = [float(cpu["cpu MHz"]) for cpu in cpus if "cpu MHz" in cpu]
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    heat = [int(line) / 1000 for line in map(read_line, zones) if line is not None]
    found: dict[str, str | float] = {}
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    if clocks:
        found["cpu_mhz"] = round(sum(clocks) / len(clocks))
    if heat:
        found["cpu_temperature_c"] = max(heat)
    gpu = current_gpu()
    of_gpu = None if gpu is None else gpu_state(gpu)
    return found | {f"gpu_{name}": value for name, value in (of_gpu or {}).items()}


def gpu_state(device: torch.device) -> dict[str, str | float] | None:
    """Driver, clocks, temperature and power now, by nvidia-smi; None on a CPU or where nvidia-smi gives nothing."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return {name: _number(value) for name, value in zip(SMI_FIELDS.values(), values, strict=False)}


def ranges_of(states: Sequence[State], names: Sequence[str] = SHOWN) -> str:
    """Smallest and largest of each number that was told; empty where none was."""
    parts = []
    for name in names:
        values = [value for state in states if isinstance(value := state.get(name), float | int)]
        parts += [f"{name} {min(values):g} to {max(values):g}"] if values else []
    return ", ".join(parts)


def _number(text: str) -> str | float:
    if text.count(".") > 1:  # a driver version
        return text
    try:
        return float(text)
    except ValueError:  # [N/A]
        return text
