"""What a GPU measurement needs to be judged: device, driver, versions, clocks. Reads only, never sets anything."""

from __future__ import annotations

from typing import Any

import torch

from optin_deploy.measuring.state import gpu_state


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
