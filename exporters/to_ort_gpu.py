"""ONNX Runtime on the GPU: the same ONNX file, run by its CUDA or its TensorRT execution provider."""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import MissingDependency
from optin_deploy.exporters.onnx_engine import OnnxEngineExporter
from optin_deploy.runtimes.device import NO_GPU, current_gpu
from optin_deploy.runtimes.ort import OrtRuntime, import_onnxruntime

CACHE = "ort-trt-cache"
"""Folder beside the ONNX file where the TensorRT provider keeps its plans; without it every session builds anew."""


class OrtCudaExporter(OnnxEngineExporter):
    """ONNX Runtime's CUDA provider."""

    engine = "ort-cuda"
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16")
    align = 64
    extra = "gpu"
    provider = "CUDAExecutionProvider"

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`; whether the provider really loads shows only when a session opens."""
        try:
            known = import_onnxruntime().get_available_providers()
        except MissingDependency as err:
            return str(err)
        if self.provider not in known:
            return (
                f"the installed onnxruntime has no {self.provider}. "
                "Run: pip uninstall -y onnxruntime && pip install 'optin-deploy[gpu]'"
            )
        return NO_GPU if current_gpu() is None else None

    def open(
        self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None
    ) -> OrtRuntime:
        """A session whose first provider is proven to be the asked one."""
        return OrtRuntime(path, threads=threads, provider=self.provider, options=self.provider_options(path, precision))

    def open_device(
        self, path: Path, *, precision: str | None = None, cuda_graph: bool = True, task: str | None = None
    ) -> OrtRuntime:
        """See `DeviceExporter.open_device`; no graph is recorded."""
        return OrtRuntime(path, provider=self.provider, options=self.provider_options(path, precision))

    def provider_options(self, path: Path, precision: str | None) -> dict[str, str]:
        """Options of the provider."""
        return {"use_tf32": str(int(precision == "tf32"))}  # on by default, also for what is called float32


class OrtTensorRTExporter(OrtCudaExporter):
    """ONNX Runtime's TensorRT provider; what it does not take runs on CUDA."""

    engine = "ort-trt"
    precisions = ("tf32", "fp16")  # it has no option that keeps float32 exact
    provider = "TensorrtExecutionProvider"

    def provider_options(self, path: Path, precision: str | None) -> dict[str, str]:
        """See `OrtCudaExporter.provider_options`; plans are kept beside the file."""
        return {
            "trt_fp16_enable": str(precision == "fp16"),
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(path.parent / CACHE),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(path.parent / CACHE),
        }
