"""A worker process: cells come in on stdin, one JSON a line, results go out on stdout the same way.

It lives apart from the parent because a CUDA error stays with its process. Any failure but a skip ends it.
Run by the parent: `python -m benchmarks.gpu.worker --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Skipped
from benchmarks.gpu.kinds import measure_cell
from benchmarks.gpu.machine import describe
from benchmarks.gpu.workbench import Workbench
from optin_deploy.measuring.state import gpu_state


def main() -> None:
    """Say hello with what this device is, then answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = torch.device(parser.parse_args().device)
    # Results have the real stdout to themselves; what libraries print goes to the log.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(data: dict[str, Any]) -> None:
            answers.write(json.dumps(data, allow_nan=False) + "\n")
            answers.flush()

        if device.type == "cuda" and not torch.cuda.is_available():
            answer({"no_device": f"torch {torch.__version__} sees no CUDA device"})
            return
        if device.type == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the library's engines take a GPU where one is
            torch.set_num_threads(1)  # the smoke's matrices are tiny
        answer(describe(device))
        bench = Workbench(device)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # on the default one TensorRT adds synchronisation to a launch
            for line in sys.stdin:
                answer(measured(Cell.from_json(json.loads(line)), bench))


def measured(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """One cell as the row's changing part: status, seconds, and result or reason."""
    start = time.perf_counter()
    try:
        result = {"status": "ok", "result": measure_cell(cell, bench), "gpu": gpu_state(bench.device)}
    except Skipped as skip:
        result = {"status": "skipped", "error": str(skip)}
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


if __name__ == "__main__":
    main()
