"""The device that engines are built for and run on here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from optin_deploy.common.environment import environment

COMPILERS = ("c++", "g++", "clang++")
NO_GPU = "no CUDA device is visible"


def current_gpu() -> torch.device | None:
    """The CUDA device in use; None: there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions in float32, not TF32, which is their default on GPUs; matrix products are exact by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def missing_compiler() -> str | None:
    """Inductor's code for the CPU, and its wrappers for the GPU, are compiled here; None: that works."""
    return None if any(map(shutil.which, COMPILERS)) else "torch needs a C++ compiler for it, and none is on the PATH"


def describe_device(device: torch.device) -> tuple[str, str]:
    """Name, and what compiled code depends on: compute capability such as `9.0`, or the CPU's instruction set."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.cuda.get_device_name(device), f"{major}.{minor}"
    return str(environment()["cpu_model"] or "CPU"), torch.backends.cpu.get_cpu_capability()
