"""Export for NVIDIA TensorRT: the portable ONNX here, the engine on a machine with TensorRT and a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from exporters.base import Artifact, ExportSpec
from optin_deploy.errors import CannotBuildHere
from optin_deploy.runtimes.base import Runtime


class TensorRTExporter:
    """Writes model.onnx, which trtexec reads anywhere; building the plan needs the target machine."""

    engine = "trt"
    precisions = ("fp16", "fp32")
    file_names = ("model.engine", "dense.engine")
    portable = "onnx"

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Say what to run on the target with the ONNX file that lies beside `out`.

        Raises: CannotBuildHere: always in this version; the message holds the commands.
        """
        raise CannotBuildHere(_instructions(out.with_suffix(".onnx"), spec.precision or self.precisions[0]))

    def open(self, path: Path, *, threads: int = 0) -> Runtime:
        """Raises: CannotBuildHere: no TensorRT runtime in this version."""
        raise CannotBuildHere(f"{path} cannot be run here: {_missing()}.")


def _missing() -> str:
    if find_spec("tensorrt") is None:
        return "the package tensorrt is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return "this version writes no TensorRT plans itself"


def _instructions(portable: Path, precision: str) -> str:
    folder = portable.parent
    half = " --fp16" if precision == "fp16" else ""
    return (
        f"{portable} is written, but no {precision} engine: {_missing()}. Copy {folder} to the target and run there\n"
        f"  pip install 'optin-deploy[trt]' && optin build {folder.name} --engine trt --precision {precision}\n"
        "or, with TensorRT 10's own tool,\n"
        f"  trtexec --onnx={folder.name}/{portable.name} --saveEngine={folder.name}/model.engine{half}"
    )
