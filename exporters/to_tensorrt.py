"""Build an NVIDIA TensorRT plan from the portable ONNX, on the machine that it will serve on.

One strongly typed path for TensorRT 10.12 and later: precision comes from the ONNX graph, not from builder flags.
"""

from __future__ import annotations

import copy
import tempfile
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from exporters.base import Artifact, ExportSpec
from exporters.to_onnx import OnnxExporter
from optin_deploy.errors import CannotBuildHere
from optin_deploy.inputs import example_inputs, longest_text
from optin_deploy.runtimes.base import Runtime
from optin_deploy.storage import atomic_file, sha256_file

BATCHES = (1, 8, 32)
"""Smallest, usual and largest batch of the plan's one profile."""
LENGTHS = (16, 128, 512)
"""The same for tokens, cut to the model's position table."""


class TensorRTExporter:
    """Plans for TensorRT; where it or a GPU is missing, the instructions for the target."""

    engine = "trt"
    precisions = ("fp16", "fp32")
    file_names = ("model.engine", "dense.engine")
    portable = "onnx"

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Build the plan; unverified until a GPU run.

        Raises: CannotBuildHere: no TensorRT, no GPU, or the builder refused; the portable ONNX lies beside `out`.
        """
        precision = spec.precision or self.precisions[0]
        portable = out.with_suffix(".onnx")
        missing = _missing()
        if missing is not None:
            raise CannotBuildHere(_instructions(model, portable, precision, missing))
        trt = import_module("tensorrt")
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            source = portable
            if precision == "fp16":
                source = Path(temporary) / "half.onnx"
                OnnxExporter().export(copy.deepcopy(model).half(), ExportSpec(pool=spec.pool), source)
            plan = build_plan(trt, source, longest=longest_text(model.config) or LENGTHS[-1])
        with atomic_file(out) as written:
            written.write_bytes(plan)
        return Artifact(
            out, self.engine, precision, (), (), sha256_file(out), len(plan), {"tensorrt": version("tensorrt")}
        )

    def open(self, path: Path, *, threads: int = 0, task: str | None = None) -> Runtime:
        """Raises: CannotBuildHere: no TensorRT runtime in this version."""
        raise CannotBuildHere(f"{path}: this version builds TensorRT plans but does not run them; use trtexec.")


def build_plan(trt: ModuleType | Any, source: Path, *, longest: int) -> bytes:
    """Parse an ONNX file and build a serialised plan with one optimisation profile.

    Args: trt: the `tensorrt` module (or TensorRT-RTX's bindings, which have the same names).
    Raises: CannotBuildHere: the parser or the builder refused, with what they said.
    """
    log = _messages(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source.read_bytes()):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise CannotBuildHere(f"TensorRT's parser refused {source.name}: {said}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        profile.set_shape(
            entry.name, *(_sized(entry.shape, b, min(n, longest)) for b, n in zip(BATCHES, LENGTHS, strict=True))
        )
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:  # a failed build raises nothing
        raise CannotBuildHere(f"TensorRT's builder gave no plan for {source.name}: {' '.join(log.lines[-5:])}")
    return bytes(plan)


def _sized(shape: Any, batch: int, length: int) -> tuple[int, ...]:
    """A dynamic shape (-1 for batch, then for length) with sizes put in."""
    sizes = iter((batch, length))
    return tuple(next(sizes) if size == -1 else size for size in shape)


def _messages(trt: ModuleType | Any) -> Any:
    """A logger that keeps warnings and errors for our own error text."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # the base class exists only where TensorRT does
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append(message)

    return Log()


def _missing() -> str | None:
    if find_spec("tensorrt") is None:
        return "the package tensorrt is not installed"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def _instructions(model: nn.Module, portable: Path, precision: str, missing: str) -> str:
    folder = portable.parent
    half = " --fp16" if precision == "fp16" else ""
    longest = longest_text(model.config) or LENGTHS[-1]
    shapes = ""
    for name, batch, length in zip(("min", "opt", "max"), BATCHES, LENGTHS, strict=True):
        example = example_inputs(model, batch=batch, seq_len=min(length, longest))
        sizes = ",".join(f"{entry}:{'x'.join(map(str, value.shape))}" for entry, value in example.items())
        shapes += f" --{name}Shapes={sizes}"
    return (
        f"{portable} is written, but no {precision} engine: {missing}. Copy {folder} to the target and run there\n"
        "  pip install 'optin-deploy[cpu,trt]'\n"
        f"  optin build {folder.name} --engine trt --precision {precision} --no-dense\n"
        "or, with TensorRT 10's own tool,\n"
        f"  trtexec --onnx={folder.name}/{portable.name} --saveEngine={folder.name}/model.engine{half}{shapes}"
    )
