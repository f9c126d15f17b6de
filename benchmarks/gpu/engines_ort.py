"""ONNX Runtime on the GPU, by its CUDA or its TensorRT provider, inputs and outputs bound on the device."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.engines import Run, Skipped, need_cuda
from benchmarks.gpu.engines_trt import with_mask

if TYPE_CHECKING:
    from optin_deploy.exporters.base import Form

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PRECISIONS = ("fp32", "tf32", "fp16")


@contextmanager
def ort_cuda(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """ONNX Runtime's CUDA provider; run() waits for the work, so call and back-to-back times are alike."""
    need_cuda("ort-cuda", inputs)
    options = {"use_tf32": str(int(precision == "tf32"))}
    with tempfile.TemporaryDirectory() as folder:
        yield _bound("ort-cuda", [(CUDA, options)], model, inputs, precision, Path(folder))


@contextmanager
def ort_trt(model: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Iterator[Run]:
    """ONNX Runtime's TensorRT provider (it links TensorRT 10); layers it refuses fall to the CUDA provider."""
    need_cuda("ort-trt", inputs)
    options = {"trt_fp16_enable": str(precision == "fp16")}
    with tempfile.TemporaryDirectory() as folder:
        yield _bound("ort-trt", [(TENSORRT, options), (CUDA, {})], model, inputs, precision, Path(folder))


def _bound(
    engine: str,
    providers: list[tuple[str, dict[str, str]]],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    precision: str,
    folder: Path,
) -> Run:
    wanted = providers[0][0]
    ort = _onnxruntime(engine, wanted)
    if precision not in PRECISIONS:
        raise Skipped(f"engine {engine} has no precision {precision}; possible: {', '.join(PRECISIONS)}.")
    path = _exported(model, precision, folder)
    session = ort.InferenceSession(str(path), providers=providers)
    # ORT falls back to another provider without an error; its number must not pass as this engine's.
    if session.get_providers()[0] != wanted:
        raise Skipped(f"engine {engine}: ONNX Runtime chose {session.get_providers()} where {wanted} was asked.")
    feeds = with_mask(inputs)
    shape = _output_shape(model, feeds)
    output = torch.empty(shape, device=next(iter(feeds.values())).device)
    binding = session.io_binding()
    for node in session.get_inputs():
        _bind(binding.bind_input, node.name, feeds[node.name])
    _bind(binding.bind_output, session.get_outputs()[0].name, output)
    if output.device.type == "cuda":
        torch.cuda.synchronize()  # the session's stream does not wait for ours

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    run.feeds = feeds  # type: ignore[attr-defined]  # the binding holds addresses only: keep the tensors alive
    return run


def _onnxruntime(engine: str, provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as err:
        raise Skipped(f"engine {engine}: onnxruntime is not installed; bring onnxruntime-gpu along.") from err
    if provider not in onnxruntime.get_available_providers():
        raise Skipped(
            f"engine {engine}: onnxruntime {onnxruntime.__version__} has no {provider}; bring onnxruntime-gpu along."
        )
    return onnxruntime


def _exported(model: nn.Module, precision: str, folder: Path) -> Path:
    from optin_deploy.exporters.base import ExportSpec
    from optin_deploy.exporters.to_onnx import OnnxExporter

    typed = "fp32" if precision == "tf32" else precision
    name, _ = OnnxExporter().file_names(typed)
    return OnnxExporter().export(form_of(model, folder), ExportSpec(typed), folder / name).path


def form_of(model: nn.Module, folder: Path) -> Form:
    """A model as artifacts are made of it."""
    from optin_deploy.exporters.base import Form
    from optin_deploy.network.read import read
    from optin_deploy.network.sealed import store

    network = read(copy.deepcopy(model).cpu())
    path = folder / "model.onnx"
    store(network, path, "of the suite")
    return Form(path, network)


def _output_shape(model: nn.Module, inputs: Mapping[str, Tensor]) -> torch.Size:
    with torch.inference_mode():
        shape: torch.Size = model(**inputs).last_hidden_state.shape
    return shape


def _bind(bind: Any, name: str, value: Tensor) -> None:
    bind(
        name=name,
        device_type=value.device.type,
        device_id=value.device.index or 0,
        element_type=torch.empty(0, dtype=value.dtype).numpy().dtype.type,
        shape=tuple(value.shape),
        buffer_ptr=value.data_ptr(),
    )
