"""Export dense and pruned models to ONNX with torch's exporter: dynamic batch and length, one file."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.base import Artifact, ExportSpec, WithoutPlan, typed_name
from exporters.graph import DTYPES, Traced, graph_key, quiet_export, typed_copy
from exporters.quantize import NEEDS_SAMPLES, NOISE_LIMIT, SETTINGS, quantize_int8
from optin_deploy.cost.macs import eager_attention
from optin_deploy.errors import BadInput, RefusedRewrite
from optin_deploy.masking import inference
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.storage import atomic_file, sha256_file, sha256_tensors

OPSET, BF16_OPSET = 20, 22
"""Below 23, whose fp32 Attention node TensorRT does not build; Gelu is a node from 20, Conv takes bfloat16 from 22."""
PACKAGES = ("torch", "onnx", "onnxscript", "transformers")
"""What a graph depends on besides the model; part of its key and of the artifact's `versions`."""
KEY = "optin.key"
"""Metadata entry: hash of weights and settings, by which a finished export is recognised."""
STACK_TRACE = "pkg.torch.onnx.stack_trace"
SINGLE_FILE_BYTES = 2**31 - 2**26
"""protobuf holds 2 GiB; larger weights would need a second file."""


class OnnxExporter(WithoutPlan):
    """ONNX for ONNX Runtime; also what TensorRT and OpenVINO read."""

    engine = "onnx"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    reads_onnx = True

    def file_names(self, precision: str) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return typed_name("model", precision, ".onnx"), typed_name("dense", precision, ".onnx")

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """See `Exporter.export`.

        Raises: BadInput: pooling of a model with logits; int8 without samples. RefusedRewrite: larger than one file.
        """
        precision = spec.precision or self.precisions[0]
        settings: list[object] = [precision, spec.pool, _opset(precision), [version(name) for name in PACKAGES]]
        if precision == "int8":
            settings += [
                version("onnxruntime"),
                NOISE_LIMIT,
                SETTINGS,
                [sha256_tensors(batch) for batch in spec.calibration],
            ]
        key = graph_key(model, *settings)
        finished = self._read(out, precision)
        if finished is not None and finished[1] == key:
            return finished[0]
        itemsize = DTYPES.get(precision, torch.float32).itemsize
        if sum(p.numel() for p in model.parameters()) * itemsize > SINGLE_FILE_BYTES:
            raise RefusedRewrite("the weights exceed 2 GiB, more than one ONNX file holds.")
        proto = _int8(model, spec) if precision == "int8" else trace(model, spec.pool, precision)
        _save(proto, key, out)
        written = self._read(out, precision)
        assert written is not None, "the file was written just now"
        return written[0]

    def _read(self, path: Path, precision: str) -> tuple[Artifact, str] | None:
        """What a file says of itself, and the key of what made it; None if there is no readable one."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            proto = onnx.load(path, load_external_data=False)
        except (OSError, DecodeError):
            return None
        artifact = Artifact(
            path=path,
            engine=self.engine,
            precision=precision,
            inputs=tuple(i.name for i in proto.graph.input),
            outputs=tuple(o.name for o in proto.graph.output),
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            versions={name: version(name) for name in PACKAGES},
        )
        return artifact, {p.key: p.value for p in proto.metadata_props}.get(KEY, "")

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return "ONNX Runtime has no bfloat16 kernels for the CPU" if precision == "bf16" else None

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """ONNX Runtime on the CPU."""
        return OrtRuntime(path, threads=threads)


def trace(model: nn.Module, pool: str | None, precision: str) -> Any:
    """The ONNX graph of a model in the type of a precision, as a protobuf."""
    model = typed_copy(model, precision)
    with inference(model), eager_attention(model), torch.no_grad(), quiet_export():
        traced = Traced(model, pool)
        program: Any = torch.onnx.export(
            traced,
            traced.example(),
            dynamo=True,
            opset_version=_opset(precision),
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            dynamic_shapes=traced.dynamic_shapes(),
            verbose=False,
        )
    return program.model_proto


def _int8(model: nn.Module, spec: ExportSpec) -> Any:
    import onnx

    if not spec.calibration:
        raise BadInput(NEEDS_SAMPLES)
    feeds = [{name: values.numpy() for name, values in batch.items()} for batch in spec.calibration]
    with tempfile.TemporaryDirectory() as temporary:
        source, quantised = Path(temporary) / "fp32.onnx", Path(temporary) / "int8.onnx"
        onnx.save(trace(model, spec.pool, "fp32"), source)
        quantize_int8(source, quantised, feeds)
        return onnx.load(quantised)


def _opset(precision: str) -> int:
    return BF16_OPSET if precision == "bf16" else OPSET


def _save(proto: Any, key: str, out: Path) -> None:
    import onnx

    for node in proto.graph.node:  # where in its builder's files a node comes from is nobody's business
        kept = [prop for prop in node.metadata_props if prop.key != STACK_TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, key
    onnx.checker.check_model(proto)
    with atomic_file(out) as temporary:
        onnx.save(proto, temporary)
