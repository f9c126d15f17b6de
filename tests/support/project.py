"""The project as its tests see it: where it lies, and which packages nothing loads before it needs them."""

from __future__ import annotations

import os
import sys
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


def environment() -> dict[str, str]:
    """This environment's programs first; nothing is fetched from the hub."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
