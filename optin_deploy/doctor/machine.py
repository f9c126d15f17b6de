"""Collect what a machine has for inference: GPUs, driver, packages, providers that work; changes nothing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from optin_deploy.common.environment import environment

PACKAGES = ("torch", "torchvision", "transformers", "onnx", "onnxscript", "openvino", "numpy")
FAMILIES = ("onnxruntime", "tensorrt")
"""Every distribution whose name starts so is listed too: onnxruntime-gpu, tensorrt-cu13-libs, tensorrt-rtx-..."""
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
"""Packages of which a missing library shows only when they are imported."""
NO_DEVICE = ("AzureExecutionProvider",)
"""Providers that compute nothing here."""
PROBE_SECONDS = 120
"""The first use of a GPU in a process can take long, never this long."""
REASON_LENGTH = 300

LIST_PROVIDERS = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"
TRY_PROVIDER = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.stdin.buffer.read(), providers=[sys.argv[1]])
session.run(None, {"x": numpy.ones((2, 2), numpy.float32)})
if session.get_providers()[0] != sys.argv[1]:
    sys.exit("it is listed, but the session fell back to " + session.get_providers()[0])
"""
"""Script that runs in a process of its own: a provider may crash, print, or take hold of a GPU."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA device."""

    name: str
    capability: str
    """Compute capability, such as 9.0."""
    memory_mib: int


@dataclass(frozen=True)
class Machine:
    """Facts that the checks judge; tests invent them."""

    python: str = ""
    system: str = ""
    cpu: str = ""
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Version of the NVIDIA driver; None: nvidia-smi is not there or gives none."""
    driver_cuda: str | None = None
    """Newest CUDA that the driver runs; None: no driver library."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions by distribution, names in lower case with hyphens."""
    torch_cuda: str | None = None
    """CUDA that torch was built for; None: a CPU build."""
    torch_sees_gpu: bool = False
    torchvision_needs: str | None = None
    """Version of torch that the installed torchvision was built for."""
    providers: Mapping[str, str | None] = field(default_factory=dict)
    """ONNX Runtime's providers: None if one ran a model here, else why it did not."""
    failed_imports: Mapping[str, str] = field(default_factory=dict)
    """Installed packages of MODULES that do not import, with the loader's message."""
    ort_nvinfer: int | None = None
    """Major version of libnvinfer that ONNX Runtime's TensorRT provider links; None: there is none."""
    compiler: str | None = None
    """Path of a C++ compiler."""


def examine() -> Machine:
    """Look at this machine; takes seconds, as providers are tried one by one."""
    about = environment()
    versions = installed()
    gpus, driver = nvidia_smi()
    torch_cuda, sees_gpu, torch_gpus = _torch()
    failures = {name: _import_failure(module) for name, module in MODULES.items() if find_spec(module) is not None}
    return Machine(
        python=platform.python_version(),
        system=str(about["platform"]),
        cpu=f"{about['cpu_model'] or platform.machine()}, {about['cores_logical']} logical cores",
        gpus=gpus or torch_gpus,
        driver=driver,
        driver_cuda=cuda_of_driver(),
        versions=versions,
        torch_cuda=torch_cuda,
        torch_sees_gpu=sees_gpu,
        torchvision_needs=_torch_of_torchvision(),
        providers=working_providers(),
        failed_imports={name: reason for name, reason in failures.items() if reason is not None},
        ort_nvinfer=_nvinfer_of_onnxruntime(),
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None),
    )


def installed() -> dict[str, str]:
    """Versions of the packages that matter, by distribution name in lower case with hyphens, sorted."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # A damaged installation may have no name.
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in PACKAGES or name.startswith(FAMILIES):
            found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return dict(sorted(found.items()))


def nvidia_smi() -> tuple[tuple[Gpu, ...], str | None]:
    """Devices and driver version as nvidia-smi lists them; nothing where it is absent or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None
    command = [program, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    # "[N/A]" stands where a device does not tell.
    good = [row for row in rows if len(row) == 4] if done.returncode == 0 else []
    gpus = tuple(Gpu(name, capability, int(memory) if memory.isdigit() else 0) for name, capability, memory, _ in good)
    return gpus, good[0][3] if good else None


def cuda_of_driver(library: str = "libcuda.so.1") -> str | None:
    """Newest CUDA version that the driver runs, as the driver's own library says; needs no GPU.

    Source: cuDriverGetVersion of the CUDA driver API: 1000 x major + 10 x minor.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else f"{version.value // 1000}.{version.value % 1000 // 10}"


def working_providers() -> dict[str, str | None]:
    """ONNX Runtime's providers: None for each that ran a model here, else the reason why it did not.

    `get_available_providers` names what was compiled in: with no GPU, or a missing library, a session silently runs
    on the CPU. So each is tried on a model of one node.
    """
    if find_spec("onnxruntime") is None:
        return {}
    listed = _probe(LIST_PROVIDERS)
    if listed.returncode != 0:
        return {"onnxruntime": reason(listed.stderr)}
    names = [name for name in json.loads(listed.stdout) if name not in NO_DEVICE]
    tried = {name: _probe(TRY_PROVIDER, name, data=_one_node()) for name in names}
    return {name: None if done.returncode == 0 else reason(done.stderr) for name, done in tried.items()}


def reason(said: str) -> str:
    """The line that matters of what a failed process wrote: the library that is missing, else the last line."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    missing = re.search(r"\S+: cannot open shared object file", "\n".join(lines))
    return (missing.group() if missing else lines[-1] if lines else "it ended without a word")[:REASON_LENGTH]


def _probe(code: str, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own; a crash or a hang there is a failure here."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {PROBE_SECONDS} s")
    out, said = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, out, said or f"ended with code {done.returncode}")


def _import_failure(module: str) -> str | None:
    done = _probe(f"import {module}")
    return None if done.returncode == 0 else reason(done.stderr)


def _one_node() -> bytes:
    """y = relu(x), float32 (2, 2), of an age that every ONNX Runtime reads."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one_node", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return bytes(model.SerializeToString())


def _torch() -> tuple[str | None, bool, tuple[Gpu, ...]]:
    """CUDA version of torch, whether it can use a GPU, and the GPUs that it sees."""
    import torch

    with warnings.catch_warnings():  # a driver that is too old makes a warning of what is a finding here
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return torch.version.cuda, False, ()
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory // 2**20) for gpu in seen)
    return torch.version.cuda, True, gpus


def _torch_of_torchvision() -> str | None:
    try:
        needs = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    exact = (re.match(r"torch\s*\(?==\s*([\d.]+)", need) for need in needs)
    return next((match[1] for match in exact if match), None)


def _nvinfer_of_onnxruntime() -> int | None:
    spec = find_spec("onnxruntime")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    for library in (
        path for folder in folders for path in Path(folder, "capi").glob("*onnxruntime_providers_tensorrt.so")
    ):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            linked = re.search(rb"libnvinfer\.so\.(\d+)", data)
            return int(linked[1]) if linked else None
    return None
