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
def float32_mode(*, tf32: bool = False) -> Iterator[None]:
    """Matrix products and convolutions of float32 values in float32, or rounded to TF32; restored after.

    torch itself rounds convolutions on GPUs. Both are set by the older of its two interfaces: reading one after writing
    the other raises an error.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def missing_compiler() -> str | None:
    """Inductor's code for the CPU, and its wrappers for the GPU, are compiled here; None: that works."""
    return None if any(map(shutil.which, COMPILERS)) else "torch needs a C++ compiler for it, and none is on the PATH"


def describe_device(device: torch.device) -> tuple[str, str]:
    """Name, and what compiled code depends on: compute capability such as `9.0`, or the CPU's instruction set."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.cuda.get_device_name(device), f"{major}.{minor}"
    return str(environment()["cpu_model"] or "CPU"), torch.backends.cpu.get_cpu_capability()
