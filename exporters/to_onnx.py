"""Export dense and pruned models to ONNX with torch's exporter: dynamic batch and length, large weights beside it."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from exporters import onnx_artifact
from exporters.base import Artifact, ExportSpec, WithoutPlan, typed_name
from exporters.graph import DTYPES, Traced, graph_key, quiet_export, typed_copy
from exporters.quantize import NEEDS_SAMPLES, NOISE_LIMIT, SETTINGS, quantize_int8
from optin_deploy.cost.macs import eager_attention
from optin_deploy.errors import BadInput
from optin_deploy.masking import inference
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.storage import scratch_folder, sha256_tensors

OPSET, BF16_OPSET = 20, 22
"""Below 23, whose fp32 Attention node TensorRT does not build; Gelu is a node from 20, Conv takes bfloat16 from 22."""
PACKAGES = ("torch", "onnx", "onnxscript", "transformers")
"""What a graph depends on besides the model; part of its key and of the artifact's `versions`."""
SINGLE_FILE_BYTES = 2**31 - 2**26
"""protobuf holds 2 GiB; larger weights lie in a second file."""


class OnnxExporter(WithoutPlan):
    """ONNX for ONNX Runtime; also what TensorRT and OpenVINO read."""

    engine = "onnx"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    reads_onnx = True

    def file_names(self, precision: str) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return typed_name("model", precision, ".onnx"), typed_name("dense", precision, ".onnx")

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """See `Exporter.export`; weights that one file does not hold lie beside it in `model.onnx.data`.

        Raises: BadInput: pooling of a model with logits; int8 without samples, or too large.
        """
        precision = spec.precision or self.precisions[0]
        settings: list[object] = [precision, spec.pool, _opset(precision), [version(name) for name in PACKAGES]]
        settings += [onnx_artifact.WITH_SHAPES]
        if precision == "int8":
            settings += [
                version("onnxruntime"),
                NOISE_LIMIT,
                SETTINGS,
                [sha256_tensors(batch) for batch in spec.calibration],
            ]
        key = graph_key(model, *settings)
        found = onnx_artifact.finished(out)
        if found is None or found.key != key:
            check_size(model, precision)
            with scratch_folder(out) as folder:
                _draft(model, spec, precision, folder / out.name)
                onnx_artifact.complete(folder / out.name, key, sha256_tensors(model.state_dict()))
                onnx_artifact.install(folder / out.name, out)
            found = onnx_artifact.finished(out)
            assert found is not None, "the file was written just now"
        return Artifact(
            path=out,
            engine=self.engine,
            precision=precision,
            inputs=found.inputs,
            outputs=found.outputs,
            sha256=found.sha256,
            size_bytes=sum(path.stat().st_size for path in (out, *map(out.with_name, found.data))),
            versions={name: version(name) for name in PACKAGES},
            data=found.data,
        )

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return "ONNX Runtime has no bfloat16 kernels for the CPU" if precision == "bf16" else None

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """ONNX Runtime on the CPU."""
        return OrtRuntime(path, threads=threads)


def check_size(model: nn.Module, precision: str) -> None:
    """Refuse int8 where the float32 weights that it is made from are more than one file holds.

    Raises: BadInput.
    """
    if precision == "int8" and _weights_bytes(model, "fp32") > SINGLE_FILE_BYTES:
        size_gib = _weights_bytes(model, "fp32") / 2**30
        raise BadInput(
            f"--precision int8: the float32 weights are {size_gib:.2f} GiB, and the quantiser takes models of one ONNX "
            "file, which holds 2 GiB. Use --precision fp16, bf16 or fp32, or a smaller model."
        )


def _weights_bytes(model: nn.Module, precision: str) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPES[precision].itemsize


def _draft(model: nn.Module, spec: ExportSpec, precision: str, out: Path) -> None:
    """Write the graph as its exporter makes it; large weights from the model's own memory, without a copy."""
    if precision == "int8":
        _int8(model, spec, out)
        return
    program = trace(model, spec.pool, precision)
    if _weights_bytes(model, precision) > SINGLE_FILE_BYTES:
        program.save(out, external_data=True)
    else:
        onnx.save(program.model_proto, out)


def trace(model: nn.Module, pool: str | None, precision: str) -> Any:
    """The ONNX program of a model in the type of a precision, as torch's exporter gives it."""
    model = typed_copy(model, precision)
    with inference(model), eager_attention(model), torch.no_grad(), quiet_export():
        traced = Traced(model, pool)
        return torch.onnx.export(
            traced,
            traced.example(),
            dynamo=True,
            opset_version=_opset(precision),
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            dynamic_shapes=traced.dynamic_shapes(),
            verbose=False,
        )


def _int8(model: nn.Module, spec: ExportSpec, out: Path) -> None:
    if not spec.calibration:
        raise BadInput(NEEDS_SAMPLES)
    feeds = [{name: values.numpy() for name, values in batch.items()} for batch in spec.calibration]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "fp32.onnx"
        onnx.save(trace(model, spec.pool, "fp32").model_proto, source)
        quantize_int8(source, out, feeds)


def _opset(precision: str) -> int:
    return BF16_OPSET if precision == "bf16" else OPSET
