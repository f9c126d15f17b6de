"""Another package adds an operator, an engine and a server, by what docs/extend.md says and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.project import ROOT

TRY = """
import onnx
import transformers
from onnx import TensorProto, helper
from optin_deploy import inspect
from optin_deploy.checkpoint.tasks import infer_task
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.serving import server

def weight(name, *shape):
    return helper.make_tensor(name, TensorProto.FLOAT, shape, [1.0] * (shape[0] * shape[1]))

nodes = [
    helper.make_node("MatMul", ["x", "first"], ["a"]),
    helper.make_node("Snake", ["a"], ["b"], domain="my.domain"),
    helper.make_node("MatMul", ["b", "second"], ["y"]),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 5), ("y", 3))]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight("first", 5, 8), weight("second", 8, 3)])
opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.domain", 1)]
onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), "own.onnx")
print([(group.kind, group.units) for group in inspect("own.onnx").groups])
print(exporter("my-engine").engine, server("my-server").name, server("my-server").unheard, ENGINES["onnx"])
print(infer_task(transformers.PretrainedConfig(architectures=["BertForMyTask"])).name)
"""
NETWORK = """
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

drawn = np.random.default_rng(0)
weights = [numpy_helper.from_array(drawn.normal(size=shape).astype("f4"), name) for name, shape in
           (("first", (5, 64)), ("second", (64, 3)))]
nodes = [helper.make_node("MatMul", ["x", "first"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
         helper.make_node("MatMul", ["b", "second"], ["logits"])]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 5), ("logits", 3))]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "network.onnx")
np.savez("rows.npz", x=drawn.normal(size=(64, 5)).astype("f4"))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the installed package of the documentation."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (declared,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    sections = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", declared).replace('"', "")
    taken = "\n[optin_deploy.engines]\nonnx = my_package.engine:MyExporter\n"
    taken += "\n[optin_deploy.operators]\nagain = my_package.again:ROWS\n"
    files = {
        "operators.py": code[0],
        "again.py": code[0],
        "engine.py": code[1],
        "server.py": code[2],
        "tasks.py": code[3],
        "__init__.py": "",
    }
    (tmp_path / "my_package").mkdir()
    for name, content in files.items():
        (tmp_path / "my_package" / name).write_text(content)
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(sections + taken)
    return tmp_path


def ran(package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that finds the package."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(package), str(ROOT))), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, check=False)


def test_rows_of_another_package_are_in_the_tables(package: Path) -> None:
    done = ran(package, "-c", TRY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "[('neurons', 8)]",
        "my-engine my-server () optin_deploy.exporters.to_onnx:OnnxExporter",
        "my-task",
    ]
    assert "again (my_package.again:ROWS) adds a row for my.domain.Snake, and there is one already" in done.stderr
    assert "my-package declares 'onnx' in optin_deploy.engines, which is taken" in done.stderr


@pytest.mark.slow
def test_an_engine_of_another_package_takes_an_option_of_its_own(package: Path) -> None:
    pytest.importorskip("openvino")  # which the engine of the documentation runs
    assert ran(package, "-c", NETWORK).returncode == 0
    job = ("--calibration", "rows.npz", "--flops", 0.5, "--allocation", "uniform", "--no-dense", "--out", "out")
    export = ("-m", "optin_deploy", "export", "network.onnx", *job, "--engine", "my-engine", "--engine-option")
    done = ran(package, *export, "streams=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((package / "out/my-engine.json").read_text()) == {"streams": "4"}
    assert 'engine-option = ["streams=4"]' in (package / "out/job.toml").read_text()
    done = ran(package, *export, "threads=4")
    assert (done.returncode, "Engine my-engine has streams to be given by it." in done.stderr) == (2, True), done.stderr
