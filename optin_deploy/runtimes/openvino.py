"""Run an ONNX file with OpenVINO on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from optin_deploy.common.processors import available_cpus, usable_cpus
from optin_deploy.errors import MissingDependency
from optin_deploy.runtimes.base import OnnxSession, check_onnx_file, check_threads, does_not_load

DEVICE = "CPU"
TELEMETRY = "openvino_telemetry"
"""Installed with openvino: `import openvino` reports to Google Analytics through it, and leaves an id in ~/intel."""

COMPUTED_IN = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's type for what a graph leaves in floating point. Without one it takes bfloat16 wherever the CPU multiplies
it, also for a float32 graph; int8 loses enough in what is quantised."""
NEEDS = {"f16": "FP16", "bf16": "BF16"}
"""What the CPU must be able to do, else f32: asked for f16, a CPU that has only bfloat16 silently takes that."""


def import_openvino() -> ModuleType:
    """Import openvino without its telemetry.

    Raises: MissingDependency: it is not installed.
    """
    try:
        with _hidden(TELEMETRY):  # openvino has a silent stub for where that package is missing
            import openvino
    except ModuleNotFoundError as err:
        raise MissingDependency("openvino is not installed. Run: pip install 'optin-deploy[cpu]'") from err
    module: ModuleType = openvino
    return module


class OpenVinoRuntime(OnnxSession):
    """One compiled model with one request, tuned for the time of a single run."""

    engine = "openvino"

    def __init__(self, path: str | Path, *, threads: int = 0, precision: str = "fp32") -> None:
        """Load the file and compile it; kernels of a new input size are made in its first run.

        Args: path: an ONNX file. threads: 0 = OpenVINO's default within a quota; more than the cores: the cores.
            precision: of the file, one of `COMPUTED_IN`.
        Raises: BadInput: no such file, one that does not load, or negative threads. MissingDependency: see
            `import_openvino`.
        """
        check_threads(threads, "OpenVINO's default")
        check_onnx_file(path)
        core: Any = import_openvino().Core()
        computed_in = COMPUTED_IN[precision]
        if computed_in in NEEDS and NEEDS[computed_in] not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            computed_in = "f32"
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": computed_in}
        if threads or available_cpus() < len(usable_cpus()):  # OpenVINO looks at the affinity, not at quotas
            settings["INFERENCE_NUM_THREADS"] = threads or available_cpus()
        self._path = Path(path)
        try:
            model = core.read_model(str(path))
            # Names are read before compiling: that may add those of tensors that it finds equal to an output.
            self._inputs = tuple(each.get_any_name() for each in model.inputs)
            self._outputs = tuple(each.get_any_name() for each in model.outputs)
            self._compiled: Any = core.compile_model(model, DEVICE, settings)
            self._session = self._compiled.create_infer_request()
        except Exception as err:  # its errors have no common base but Exception
            raise does_not_load(self._path, self.engine, err) from err

    def _infer(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self._session.infer(feeds)
        return [found[name] for name in self._outputs]

    def close(self) -> None:
        """See `OnnxSession.close`; the compiled model goes too."""
        super().close()
        self._compiled = None


@cache
def openvino_threads() -> int:
    """Threads that OpenVINO takes where none are asked for, as it says itself of a model of one node."""
    ov = import_openvino()
    node = ov.opset13.parameter([1], np.float32)
    model = ov.Model([ov.opset13.relu(node)], [node], "one_node")
    compiled = ov.Core().compile_model(model, DEVICE, {"PERFORMANCE_HINT": "LATENCY"})
    return min(int(compiled.get_property("INFERENCE_NUM_THREADS")), available_cpus())


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """An import of that module fails inside, as if it were not installed."""
    modules: dict[str, Any] = sys.modules
    before = {name: modules[name]} if name in modules else {}
    modules[name] = None  # Python's sign for "cannot be imported"
    try:
        yield
    finally:
        del modules[name]
        modules.update(before)
