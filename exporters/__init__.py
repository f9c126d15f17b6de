"""Engines that a pruned model can be exported to: one file each, named in one table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from optin_deploy.common.plugins import with_added
from optin_deploy.errors import BadInput

if TYPE_CHECKING:
    from optin_deploy.exporters.base import Exporter

OWN = {
    "onnx": "optin_deploy.exporters.to_onnx:OnnxExporter",
    "openvino": "optin_deploy.exporters.to_openvino:OpenVinoExporter",
    "ort-cuda": "optin_deploy.exporters.to_ort_gpu:OrtCudaExporter",
    "ort-trt": "optin_deploy.exporters.to_ort_gpu:OrtTensorRTExporter",
    "torch": "optin_deploy.exporters.to_torch:TorchExporter",
    "torch-compile": "optin_deploy.exporters.to_torch:CompiledTorchExporter",
    "aoti": "optin_deploy.exporters.to_aoti:AotiExporter",
    "trt": "optin_deploy.exporters.to_tensorrt:TensorRTExporter",
    "trt-rtx": "optin_deploy.exporters.to_tensorrt:RtxExporter",
}
ENGINES = with_added("engines", OWN)
"""Name on the command line -> module:class, imported when asked for; other packages may add theirs."""


def exporter(engine: str) -> Exporter:
    """The exporter of an engine.

    Raises: BadInput: unknown engine; lists the known ones.
    """
    if engine not in ENGINES:
        raise BadInput(f"unknown --engine {engine!r}; possible: {', '.join(ENGINES)}.")
    module, _, name = ENGINES[engine].partition(":")
    found: Exporter = getattr(import_module(module), name)()
    return found


def check_precision(chosen: Exporter, precision: str | None) -> str:
    """The precision to use: the given one or the engine's default.

    Raises: BadInput: the engine does not offer it; lists what it does.
    """
    if precision is not None and precision not in chosen.precisions:
        raise BadInput(
            f"unknown --precision {precision!r} for engine {chosen.engine!r}; possible: {', '.join(chosen.precisions)}."
        )
    return precision or chosen.precisions[0]
