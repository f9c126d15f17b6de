"""OpenVINO on the CPU: the same ONNX file as ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import MissingDependency
from optin_deploy.exporters.onnx_engine import OnnxEngineExporter
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.openvino import OpenVinoRuntime, import_openvino, openvino_threads


class OpenVinoExporter(OnnxEngineExporter):
    """OpenVINO's CPU device, which also multiplies bfloat16 and Q/DQ int8."""

    engine = "openvino"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    extra = "cpu"

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        try:
            import_openvino()
        except MissingDependency as err:
            return str(err)
        return None

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`."""
        return asked or openvino_threads()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """Compiled for this CPU each time it is opened."""
        return OpenVinoRuntime(path, threads=threads, precision=precision or self.precisions[0])
