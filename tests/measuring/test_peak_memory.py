"""Peak memory is that of the artifact, not of the libraries, and a failing process says why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optin_deploy.measuring.peak_memory import ProcessFailed, peak_of
from support.tiny_checkpoint import Shell

MIB = 2**20


def stored_matrix(path: Path, rows: int) -> Path:
    """y = x @ w with a float32 matrix of rows x 1024."""
    weights = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1024])
    tensor = onnx.numpy_helper.from_array(weights, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def peak(path: Path, rows: int) -> int:
    feeds = {"x": np.zeros((1, rows), np.float32)}
    return peak_of(path, feeds, engine="onnx", precision="fp32", threads=1)


@pytest.mark.slow
def test_the_peak_grows_with_the_weights_and_has_no_libraries(tmp_path: Path) -> None:
    small, large = (
        peak(stored_matrix(tmp_path / "s.onnx", 64), 64),
        peak(stored_matrix(tmp_path / "l.onnx", 32768), 32768),
    )
    assert large - small > 100 * MIB  # 128 MiB of weights, at least once
    assert small < 60 * MIB  # imported libraries alone are hundreds


def test_a_file_that_does_not_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match=r"absent\.onnx"):
        peak(tmp_path / "absent.onnx", 64)


def test_bench_tells_the_memory_of_both(shell: Shell, finished: Path) -> None:
    ran = shell("optin", "bench", finished, "--memory", "--threads", 1)
    assert ran.code == 0, ran.err
    assert "Memory at 1 x 16:" in ran.out
    (row,) = json.loads((finished / "measurements.json").read_text())["latency"]
    assert set(row["peak_bytes"]) == {"dense", "pruned"}
    assert all(0 < found < 200 * MIB for found in row["peak_bytes"].values())
