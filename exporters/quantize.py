"""Turn a float32 ONNX file into an int8 one with Q/DQ pairs, which TensorRT and ONNX Runtime both read.

Weights per output channel, activations per tensor, both symmetric (TensorRT takes nothing else); only products with
constant weights are quantised, so the attention products stay in float.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds
from optin_deploy.runtimes.ort import import_onnxruntime

NEEDS_SAMPLES = "int8 needs calibration samples to measure the range of activations; none were given."


def quantize_int8(source: Path, out: Path, feeds: Sequence[Feeds]) -> None:
    """Measure the range of every quantised tensor on the feeds and write the Q/DQ graph.

    Raises: BadInput: no feeds. MissingDependency: no ONNX Runtime, whose quantiser does the work.
    """
    if not feeds:
        raise BadInput(NEEDS_SAMPLES)
    import_onnxruntime()
    quantization = import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # untyped base
        def __init__(self) -> None:
            self.left: Iterator[Feeds] = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            feed = next(self.left, None)
            return None if feed is None else dict(feed)

    with _quiet():
        quantization.quantize_static(
            str(source),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            # TensorRT dequantises no int32, so biases stay in float.
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "QuantizeBias": False,
            },
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises a preparation for convolutions on the root logger; it does not concern these graphs."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
