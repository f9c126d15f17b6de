"""The project as its tests see it: where it lies, and which packages nothing loads before it needs them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "benchmarks",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx_bindings",
    "torch",
    "transformers",
)
