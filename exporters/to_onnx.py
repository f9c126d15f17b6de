"""Export dense and pruned models to ONNX with torch's exporter: dynamic batch and length, one file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.base import Artifact, ExportSpec, output_names
from optin_deploy.cost.macs import eager_attention
from optin_deploy.errors import RefusedRewrite
from optin_deploy.inputs import config_settings, example_inputs, input_names
from optin_deploy.masking import inference
from optin_deploy.rewrite.verify import main_output
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.storage import atomic_file, sha256_file, sha256_json, sha256_tensors

OPSET = 20
"""Below 23, whose fp32 Attention node TensorRT does not build; Gelu is one node from 20 on."""
PACKAGES = ("torch", "onnx", "onnxscript", "transformers")
"""What a graph depends on besides the model; part of its key and of the artifact's `versions`."""
KEY = "optin.key"
"""Metadata entry: hash of weights and settings, by which a finished export is recognised."""
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 13
"""Sizes of the traced example; neither is 1, which torch would take for a constant."""
SINGLE_FILE_BYTES = 2**31 - 2**26
"""protobuf holds 2 GiB; larger weights would need a second file."""


class _Outputs(nn.Module):
    """Positional inputs in, the contract's outputs out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], pool: str | None) -> None:
        super().__init__()
        self.model, self.names, self.pool = model, names, pool
        self.eval()  # a fresh module is in training mode and would bring dropout back

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inputs = dict(zip(self.names, values, strict=True))
        states = main_output(self.model(**inputs))
        if self.pool is None:
            return states
        real = inputs.get("attention_mask", torch.ones_like(states[..., 0])).unsqueeze(-1).to(states)
        return states, (states * real).sum(1) / real.sum(1)


class OnnxExporter:
    """ONNX for ONNX Runtime; also what TensorRT and OpenVINO read."""

    engine = "onnx"
    precisions = ("fp32",)
    file_names = ("model.onnx", "dense.onnx")
    portable = None

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """See `Exporter.export`.

        Raises: BadInput: pooling of a model with logits. RefusedRewrite: larger than one file can hold.
        """
        import onnx

        made_by = [version(name) for name in PACKAGES]
        settings = [type(model).__name__, config_settings(model), spec.pool, OPSET, made_by]
        key = sha256_json([sha256_tensors(model.state_dict()), *settings])
        finished = self._read(out)
        if finished is not None and finished[1] == key:
            return finished[0]
        names = input_names(model)
        outputs = output_names(model, spec.pool)
        if sum(p.numel() * p.element_size() for p in model.parameters()) > SINGLE_FILE_BYTES:
            raise RefusedRewrite("the weights exceed 2 GiB, more than one ONNX file holds.")
        example = example_inputs(model, batch=EXAMPLE_BATCH, seq_len=EXAMPLE_LENGTH)
        with inference(model), eager_attention(model), torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                _Outputs(model, names, spec.pool),
                tuple(example[name] for name in names),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=(tuple(_dynamic(example[name]) for name in names),),
                verbose=False,
            )
        proto = program.model_proto
        entry = proto.metadata_props.add()
        entry.key, entry.value = KEY, key
        onnx.checker.check_model(proto)
        with atomic_file(out) as temporary:
            onnx.save(proto, temporary)
        written = self._read(out)
        assert written is not None, "the file was written just now"
        return written[0]

    def _read(self, path: Path) -> tuple[Artifact, str] | None:
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
            precision=self.precisions[0],
            inputs=tuple(i.name for i in proto.graph.input),
            outputs=tuple(o.name for o in proto.graph.output),
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            versions={name: version(name) for name in PACKAGES},
        )
        return artifact, {p.key: p.value for p in proto.metadata_props}.get(KEY, "")

    def open(self, path: Path, *, threads: int = 0, task: str | None = None) -> Runtime:
        """ONNX Runtime on the CPU."""
        return OrtRuntime(path, threads=threads)


def _dynamic(example: Tensor) -> dict[int, Any]:
    axes = {0: torch.export.Dim("batch")}
    return axes | {1: torch.export.Dim("sequence")} if example.dim() == 2 else axes


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress and deprecation notes are not for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
