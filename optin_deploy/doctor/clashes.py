"""Which packages, drivers and devices of a machine do not go together: pure functions over its facts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from optin_deploy.doctor.findings import Finding
from optin_deploy.doctor.machine import Machine
from optin_deploy.runtimes.ort import DISTRIBUTIONS as ONNXRUNTIMES

TENSORRT_OLDEST, TENSORRT_BEYOND = (10, 12), (12,)
"""Oldest version, the first with the strongly typed path that 11 also has, and the first version that nobody has
tried."""
TRANSFORMERS_MAJOR = 5
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt")
"""Starts of the names of distributions that only make sense with a GPU."""


def check_machine(machine: Machine) -> list[Finding]:
    """What all CHECKS find, in their order."""
    return [finding for check in CHECKS for finding in check(machine)]


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 10.13.3.post1 -> (10, 13, 3); empty if there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def two_onnxruntimes(machine: Machine) -> Iterator[Finding]:
    """Distributions of ONNX Runtime overwrite each other's files."""
    there = [name for name in ONNXRUNTIMES if name in machine.versions]
    if len(there) > 1:
        extra = "gpu" if machine.gpus else "cpu"
        yield Finding(
            "problem",
            "onnxruntime",
            f"{' and '.join(there)} are installed together; they overwrite each other's files.",
            f"pip uninstall -y {' '.join(there)} && pip install 'optin-deploy[{extra}]'",
        )


def tensorrt_of_onnxruntime(machine: Machine) -> Iterator[Finding]:
    """ONNX Runtime's TensorRT provider links one major version of TensorRT."""
    ours, needed = _tensorrt(machine), machine.ort_nvinfer or 10
    if "onnxruntime-gpu" in machine.versions and ours and ours[0] != needed:
        yield Finding(
            "problem",
            "onnxruntime-gpu",
            f"its TensorRT provider needs libnvinfer.so.{needed}, but TensorRT {ours[0]} is installed: "
            "engine ort-trt would silently run without it.",
            f"pip install 'tensorrt>={needed}{'.12' if needed == 10 else ''},<{needed + 1}' for ort-trt; "
            "or keep it and use engine trt or ort-cuda",
        )


def tensorrt_version(machine: Machine) -> Iterator[Finding]:
    """One strongly typed path serves TensorRT 10.12 and later, and 11."""
    ours = _tensorrt(machine)
    if ours and not TENSORRT_OLDEST <= ours < TENSORRT_BEYOND:
        why = "has no strongly typed path that engine trt uses" if ours < TENSORRT_OLDEST else "is newer than was tried"
        yield Finding(
            "problem", "tensorrt", f"version {'.'.join(map(str, ours))} {why}.", "pip install 'tensorrt>=10.12,<12'"
        )


def cuda_of_tensorrt(machine: Machine) -> Iterator[Finding]:
    """The name of a TensorRT wheel says its CUDA major; drivers run older CUDA, not newer."""
    runs = release(machine.driver_cuda or "")
    for family in ("tensorrt-rtx", "tensorrt"):
        majors = {int(m[1]) for name in machine.versions if (m := re.match(rf"{family}-cu(\d+)", name))}
        if runs and majors and max(majors) > runs[0]:
            yield Finding(
                "problem",
                family,
                f"its wheels are for CUDA {max(majors)}, but the driver runs at most CUDA {machine.driver_cuda}.",
                f"update the NVIDIA driver, or pip install {family}-cu{runs[0]}",
            )
        if len(majors) > 1:
            yield Finding(
                "problem",
                family,
                f"wheels for CUDA {' and '.join(map(str, sorted(majors)))} are installed together.",
                f"pip uninstall those that are not for CUDA {min(majors)}",
            )


def cuda_of_torch(machine: Machine) -> Iterator[Finding]:
    """Find a torch built for a newer CUDA than the driver runs, which works within a major version only, with
    limits."""
    built, runs = release(machine.torch_cuda or "")[:2], release(machine.driver_cuda or "")[:2]
    if built and runs and built > runs:
        newer_major = built[0] > runs[0]
        effect = "torch finds no GPU" if newer_major else "most works, but kernels compiled on the fly can fail"
        yield Finding(
            "problem" if newer_major else "warning",
            "torch",
            f"built for CUDA {machine.torch_cuda}, but the driver runs at most CUDA {machine.driver_cuda}: {effect}.",
            f"update the NVIDIA driver, or install a torch for CUDA {machine.driver_cuda} or older",
        )


def torch_without_cuda(machine: Machine) -> Iterator[Finding]:
    """A CPU build of torch leaves the GPU unused."""
    if machine.torch_cuda is not None or not (machine.driver or machine.driver_cuda or machine.gpus):
        return
    wanted = [name for name in machine.versions if name.startswith(GPU_PACKAGES)]
    yield Finding(
        "problem" if wanted else "warning",
        "torch",
        "a build without CUDA on a machine with an NVIDIA driver: "
        + (f"{wanted[0]} is installed, but no GPU engine can be run." if wanted else "only CPU engines can be used."),
        "install the CUDA build of torch: https://pytorch.org/get-started/locally",
    )


def gpu_unseen(machine: Machine) -> Iterator[Finding]:
    """A CUDA build of torch beside a device that it cannot use."""
    if machine.gpus and machine.torch_cuda is not None and not machine.torch_sees_gpu:
        yield Finding(
            "problem",
            "torch",
            f"{machine.gpus[0].name} is there, but torch cannot use it.",
            "check CUDA_VISIBLE_DEVICES and the driver: python -c 'import torch; torch.zeros(1).cuda()'",
        )


def transformers_major(machine: Machine) -> Iterator[Finding]:
    """The architecture table names the modules of one major version."""
    version = machine.versions.get("transformers", "")
    if release(version)[:1] != (TRANSFORMERS_MAJOR,):
        what = f"version {version} is installed" if version else "is not installed"
        yield Finding(
            "problem",
            "transformers",
            f"{what}; the table of architectures follows the module names of {TRANSFORMERS_MAJOR}.x.",
            f"pip install 'transformers>={TRANSFORMERS_MAJOR}.0,<{TRANSFORMERS_MAJOR + 1}'",
        )


def torchvision_of_torch(machine: Machine) -> Iterator[Finding]:
    """A torchvision for another torch breaks `import transformers`."""
    needed, there = machine.torchvision_needs, machine.versions.get("torch", "")
    if needed is not None and release(needed) != release(there):
        yield Finding(
            "problem",
            "torchvision",
            f"version {machine.versions.get('torchvision')} is for torch {needed}, but torch {there} is installed: "
            "importing models fails.",
            "pip uninstall -y torchvision (it is not needed here)",
        )


def imports(machine: Machine) -> Iterator[Finding]:
    """TensorRT that is installed but does not load, and what is possible without it."""
    for name, why in machine.failed_imports.items():
        yield Finding(
            "problem",
            name,
            f"installed, but does not import: {why}",
            "install its libraries of the same version (pip install --force-reinstall), and the NVIDIA driver",
        )
    rtx = next((v for name, v in machine.versions.items() if name.startswith("tensorrt-rtx")), None)
    if rtx and "tensorrt-rtx" not in machine.failed_imports and not _tensorrt(machine):
        yield Finding(
            "ok",
            "tensorrt-rtx",
            f"TensorRT is not installed, but TensorRT-RTX {rtx} is: `optin doctor DIR` asks its parser and builds "
            "model.onnx ahead of time, also without a GPU.",
        )


def providers(machine: Machine) -> Iterator[Finding]:
    """ONNX Runtime's providers as they ran, not as they are listed."""
    for name, why in machine.providers.items():
        if why is None:
            yield Finding("ok", name, "ran a model of one node.")
        elif name in ("CPUExecutionProvider", "onnxruntime"):
            yield Finding("problem", name, why, "pip install --force-reinstall onnxruntime")
        else:
            # A GPU build without GPU, or without TensorRT, is no fault: its engine is "no" in the table of engines.
            yield Finding("warning", name, f"listed, but does not work here: {why}", "use another --engine")


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    two_onnxruntimes,
    tensorrt_of_onnxruntime,
    tensorrt_version,
    cuda_of_tensorrt,
    cuda_of_torch,
    torch_without_cuda,
    gpu_unseen,
    transformers_major,
    torchvision_of_torch,
    imports,
    providers,
)


def _tensorrt(machine: Machine) -> tuple[int, ...]:
    """Version of TensorRT (not RTX): of the metapackage, or of the wheels behind it; empty: not installed."""
    names = [name for name in machine.versions if re.fullmatch(r"tensorrt(-cu\d+)?(-libs|-bindings)?", name)]
    return release(machine.versions[names[0]]) if names else ()
