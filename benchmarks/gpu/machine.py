"""What a GPU measurement needs to be judged: device, driver, versions, clocks. Reads only, never sets anything."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

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


def device_name(device: torch.device) -> str:
    """Name under which results of this device are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, ready for JSON; None where something is not there."""
    cudnn: Any = torch.backends.cudnn
    found: dict[str, Any] = {
        "device": device_name(device),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if cudnn.is_available() else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return {**found, "state": gpu_state(device)}


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


def _number(text: str) -> str | float:
    if text.count(".") > 1:  # a driver version
        return text
    try:
        return float(text)
    except ValueError:  # [N/A]
        return text
