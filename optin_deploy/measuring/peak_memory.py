"""Peak memory of an artifact: a fresh process opens it, runs it, and tells how far its resident memory grew.

Beyond what the libraries take once they are imported: weights, the engine's own copies of them, and activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from optin_deploy.errors import OptinError
from optin_deploy.exporters import exporter
from optin_deploy.runtimes.ort import import_onnxruntime
from optin_deploy.scoring.memory import peak_bytes

RUNS = 3
"""The first allocates; later ones may still grow the engine's pools."""


class ProcessFailed(OptinError):
    """The process that was to measure ended with an error."""


def peak_of(
    path: Path, feeds: Mapping[str, np.ndarray], *, engine: str, precision: str, threads: int, task: str | None = None
) -> int:
    """Bytes of host memory that an artifact takes at most, on these feeds.

    Raises: ProcessFailed: says what the process said last.
    """
    with tempfile.TemporaryDirectory() as temporary:
        stored = Path(temporary) / "feeds.safetensors"
        save_file({name: np.ascontiguousarray(values) for name, values in feeds.items()}, stored)
        asked = {"path": str(path), "engine": engine, "precision": precision, "threads": threads, "task": task}
        command = [sys.executable, "-m", "optin_deploy.measuring.peak_memory", json.dumps(asked), str(stored)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ProcessFailed(f"measuring the memory of {path} failed: {said[-1] if said else done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _growth(path: str, engine: str, precision: str, threads: int, task: str | None, feeds: str) -> int:
    values = load_file(feeds)
    target = exporter(engine)
    target.obstacle(precision)  # imports the engine's libraries, but for ONNX Runtime
    if target.reads_onnx:
        import_onnxruntime()
    before = peak_bytes(torch.device("cpu"))
    with target.open(Path(path), precision=precision, threads=threads, task=task) as runtime:
        for _ in range(RUNS):
            runtime.run(values)
            runtime.synchronize()
    return peak_bytes(torch.device("cpu")) - before


if __name__ == "__main__":
    sys.stdout.write(f"{_growth(**json.loads(sys.argv[1]), feeds=sys.argv[2])}\n")
