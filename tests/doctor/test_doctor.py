"""`optin doctor`: invented machines, small ONNX graphs with one fault each, hostile files, and the command itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from safetensors.torch import save_file

from optin_deploy import exporters
from optin_deploy.common.formatting import named, plain
from optin_deploy.doctor import doctor, half_range, support
from optin_deploy.doctor import machine as machine_module
from optin_deploy.doctor.clashes import check_machine
from optin_deploy.doctor.doctor import EngineRow, check_file, diagnose
from optin_deploy.doctor.findings import Finding, summary
from optin_deploy.doctor.graph import UNSUPPORTED
from optin_deploy.doctor.machine import Gpu, Machine, cuda_of_driver, examine, nvidia_smi, reason, working_providers
from optin_deploy.errors import BadInput, CannotBuildHere, MissingDependency
from optin_deploy.exporters.preflight import build_ahead
from optin_deploy.network.onnx_data import read_onnx
from support.tiny_checkpoint import Shell

HEALTHY = Machine(versions={"torch": "2.13.0+cpu", "transformers": "5.23.0", "onnxruntime": "1.32.0"})
H100 = Gpu("NVIDIA H100", "9.0", 81559)
GPU = Machine(
    gpus=(H100,),
    driver="580.65.06",
    driver_cuda="13.0",
    versions={"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime-gpu": "1.31.1", "tensorrt": "10.13.3.9.post1"},
    torch_cuda="13.0",
    torch_sees_gpu=True,
    ort_nvinfer=10,
)
OLD = replace(GPU, driver_cuda="12.4", torch_cuda="12.4")
BOTH_CUDAS = {"tensorrt-cu12": "10.13", "tensorrt-cu13": "10.13"}
X, Y = ("x", TensorProto.FLOAT, ["batch", 4]), ("y", TensorProto.FLOAT, ["batch", 4])


def with_packages(machine: Machine, **changes: Any) -> Machine:
    """Another machine; `packages` are added to, or (None) taken from, what is installed."""
    packages = {**machine.versions, **changes.pop("packages", {})}
    return replace(machine, versions={k: v for k, v in sorted(packages.items()) if v is not None}, **changes)


def levels(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings]


def bad(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def model(nodes: Sequence[Any], *, inputs: Any = (X,), outputs: Any = (Y,), opset: int = 20, **options: Any) -> Any:
    """A graph; options: constants (arrays by name), domains."""
    constants = [from_array(array, name) for name, array in options.get("constants", {}).items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        constants,
    )
    opsets = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(domain, 1) for domain in options.get("domains", ())),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def look(folder: Path, proto: Any, *, parser: Any = None, **feeds: np.ndarray) -> list[Finding]:
    """Findings of a graph with recorded inputs."""
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return check_file(path, feeds, parser=parser)


def rows(count: int = 3, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(0).uniform(-1, 1, (count, 4))).astype(np.float32)


# machines


@pytest.mark.parametrize("machine", [HEALTHY, GPU], ids=["cpu", "gpu"])
def test_a_machine_whose_packages_go_together_gives_no_finding(machine: Machine) -> None:
    assert check_machine(machine) == []


@pytest.mark.parametrize(
    ("machine", "level", "subject", "words"),
    [
        (with_packages(GPU, packages={"onnxruntime": "1.32.0"}), "problem", "onnxruntime", "overwrite"),
        (with_packages(GPU, packages={"tensorrt": "11.0.0"}), "problem", "onnxruntime-gpu", "libnvinfer.so.10"),
        (with_packages(GPU, packages={"tensorrt": "10.11.0"}), "problem", "tensorrt", "10.11.0"),
        (with_packages(GPU, packages={"tensorrt": "12.0", "onnxruntime-gpu": None}), "problem", "tensorrt", "12.0"),
        (with_packages(OLD, packages={"tensorrt-cu13": "10.13"}), "problem", "tensorrt", "CUDA 13"),
        (with_packages(OLD, packages={"tensorrt-rtx-cu13-libs": "1.7"}), "problem", "tensorrt-rtx", "CUDA 13"),
        (with_packages(GPU, packages=BOTH_CUDAS), "problem", "tensorrt", "12 and 13"),
        (replace(GPU, driver_cuda="12.8"), "problem", "torch", "finds no GPU"),
        (replace(GPU, torch_cuda="12.8", driver_cuda="12.4"), "warning", "torch", "12.8"),
        (replace(GPU, torch_cuda=None), "problem", "torch", "onnxruntime-gpu is installed"),
        (replace(HEALTHY, driver="550.54.15"), "warning", "torch", "only CPU engines"),
        (replace(GPU, torch_sees_gpu=False), "problem", "torch", "NVIDIA H100"),
        (with_packages(HEALTHY, packages={"transformers": "4.57.6"}), "problem", "transformers", "4.57.6"),
        (with_packages(HEALTHY, packages={"transformers": None}), "problem", "transformers", "not installed"),
        (replace(HEALTHY, torchvision_needs="2.12.0"), "problem", "torchvision", "2.12.0"),
        (replace(GPU, failed_imports={"tensorrt": "libnvinfer.so.10: gone"}), "problem", "tensorrt", "so.10"),
        (replace(GPU, providers={"CUDAExecutionProvider": "libcudnn"}), "warning", "CUDAExecutionProvider", "libcudnn"),
        (replace(HEALTHY, providers={"CPUExecutionProvider": "crash"}), "problem", "CPUExecutionProvider", "crash"),
    ],
)  # fmt: skip
def test_each_clash_is_found_alone_with_its_remedy(machine: Machine, level: str, subject: str, words: str) -> None:
    [found] = check_machine(machine)
    assert (found.level, found.subject) == (level, subject)
    assert words in found.message
    assert found.remedy


@pytest.mark.parametrize(
    "machine",
    [
        with_packages(GPU, packages={"tensorrt": "11.0", "onnxruntime-gpu": None}),
        with_packages(GPU, ort_nvinfer=11, packages={"tensorrt": "11.0.0"}),  # a later ONNX Runtime may link it
        replace(GPU, driver_cuda="13.1"),  # drivers run older CUDA
        with_packages(GPU, driver_cuda="13.1", packages={"tensorrt-cu12": "10.13"}),
        with_packages(HEALTHY, torchvision_needs="2.13.0", packages={"torchvision": "0.28.0"}),
        with_packages(HEALTHY, packages={"onnxruntime-extensions": "0.14"}),
    ],
)
def test_what_goes_together_is_not_reported(machine: Machine) -> None:
    assert check_machine(machine) == []


def test_rtx_without_tensorrt_is_offered_for_a_preflight() -> None:
    rtx = with_packages(HEALTHY, packages={"tensorrt-rtx-cu13-bindings": "1.7.1.116"})
    assert levels(check_machine(rtx)) == [("ok", "tensorrt-rtx")]
    both = with_packages(GPU, packages={"tensorrt-rtx-cu13-bindings": "1.7.1.116"})
    assert check_machine(both) == []


def test_this_machine_is_examined_as_its_own_tools_see_it() -> None:
    found = examine()
    assert found.python == sys.version.split()[0]
    assert found.versions["torch"] == torch.__version__
    assert found.versions["transformers"] == importlib.metadata.version("transformers")
    assert found.torch_cuda == torch.version.cuda
    assert found.providers["CPUExecutionProvider"] is None
    assert len(found.gpus) >= torch.cuda.device_count()


def test_a_provider_that_is_only_listed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU build without GPU does: it lists a provider, and its session runs on the CPU.
    asked = (
        "import json; print(json.dumps(['CUDAExecutionProvider', 'CPUExecutionProvider', 'AzureExecutionProvider']))"
    )
    monkeypatch.setattr(machine_module, "LIST_PROVIDERS", asked)
    found = working_providers()
    assert found.keys() == {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert found["CPUExecutionProvider"] is None
    assert found["CUDAExecutionProvider"]
    monkeypatch.setattr(machine_module, "LIST_PROVIDERS", "import json; print(json.dumps(['CPUExecutionProvider']))")
    monkeypatch.setattr(machine_module, "TRY_PROVIDER", "import os; os.abort()")
    assert "code -6" in str(working_providers()["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "\x1b[1;31m[E:onnxruntime] Failed to load libonnxruntime_providers_tensorrt.so: libnvinfer.so.10: "
            "cannot open shared object file: No such file or directory\x1b[m\nit fell back to CPUExecutionProvider\n",
            "libnvinfer.so.10: cannot open shared object file",
        ),
        ("Traceback (most recent call last):\nValueError: no\n\n", "ValueError: no"),
        ("", "it ended without a word"),
    ],
)
def test_the_reason_is_the_line_that_matters(said: str, expected: str) -> None:
    assert reason(said) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06'; echo 'Orin, 8.7, [N/A], 580.65.06'",
            ((Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559), Gpu("Orin", "8.7", 0)), "580.65.06"),
        ),
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9", ((), None)),
    ],
)
def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: Any) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_smi() == expected


def test_the_driver_library_tells_its_cuda(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for name, body in {"good": "*v = 12040; return 0;", "none": "*v = 0; return 0;", "error": "return 100;"}.items():
        (tmp_path / f"{name}.c").write_text(f"int cuDriverGetVersion(int *v) {{ {body} }}")
        command = [compiler, "-shared", "-fPIC", "-o", tmp_path / f"{name}.so", tmp_path / f"{name}.c"]
        subprocess.run(command, check=True)
    found = [cuda_of_driver(str(tmp_path / f"{name}.so")) for name in ("good", "none", "error", "absent")]
    assert found == ["12.4", None, None, None]


class Stand:
    """Stands in for an exporter."""

    def __init__(self, obstacle: str | None, cannot_build: Any) -> None:
        self.obstacle, self.cannot_build = lambda precision=None: obstacle, cannot_build


def test_each_engine_says_itself_whether_it_builds_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingDependency("lib is missing")

    table = {
        "a": Stand(None, lambda: None),
        "b": Stand("no GPU", lambda: None),
        "c": Stand("no GPU", lambda: "no GPU"),
        "d": Stand(None, lambda: "no compiler"),
        "e": Stand(None, missing),
    }
    monkeypatch.setattr(doctor, "ENGINES", table)
    monkeypatch.setattr(doctor, "exporter", table.__getitem__)
    assert doctor.engine_rows() == (
        EngineRow("a", "yes"),
        EngineRow("b", "build only", "no GPU"),
        EngineRow("c", "no", "no GPU"),
        EngineRow("d", "run only", "no compiler"),
        EngineRow("e", "no", "lib is missing"),
    )


def test_every_engine_of_the_table_has_a_row() -> None:
    found = {row.engine: row.answer for row in doctor.engine_rows()}
    assert found.keys() == exporters.ENGINES.keys()
    assert found["onnx"] == found["torch"] == "yes"
    if not torch.cuda.is_available():
        assert {found[name] for name in found if name.startswith("trt")} <= {"no", "build only"}


# graphs


def test_a_sound_graph_gives_no_complaint(tmp_path: Path) -> None:
    assert not bad(look(tmp_path, model([helper.make_node("Relu", ["x"], ["y"])]), x=rows()))


def test_nodes_of_onnx_runtime_alone_are_named_and_counted(tmp_path: Path) -> None:
    nodes = [helper.make_node("FastGelu", [a], [b], domain="com.microsoft") for a, b in (("x", "m"), ("m", "y"))]
    [found] = bad(look(tmp_path, model(nodes, domains=["com.microsoft"]), x=rows()))
    assert found.level == "problem"
    assert "2 x 'com.microsoft:FastGelu'" in found.message


def test_functions_inside_the_file_are_not_foreign(tmp_path: Path) -> None:
    proto = model([helper.make_node("Twice", ["x"], ["y"], domain="own")], domains=["own"])
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    assert not bad(look(tmp_path, proto, x=rows()))


def test_dynamic_quantization_is_a_problem_and_static_is_none(tmp_path: Path) -> None:
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    dynamic = model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), back])
    found = bad(look(tmp_path, dynamic, x=rows()))
    assert [f.level for f in found] == ["problem", "warning"]  # the warning: it is on the stored list
    assert "1 x DynamicQuantizeLinear" in found[0].message
    scale = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    static = model([helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), back], constants=scale)
    assert not bad(look(tmp_path, static, x=rows()))


@pytest.mark.parametrize(("kind", "count"), [(TensorProto.FLOAT, 1), (TensorProto.FLOAT16, 0)])
def test_attention_of_opset_23_is_a_problem_in_float32_only(tmp_path: Path, kind: int, count: int) -> None:
    states = [(name, kind, ["batch", 2, 5, 4]) for name in "qkvy"]
    proto = model([helper.make_node("Attention", [*"qkv"], ["y"])], inputs=states[:3], outputs=states[3:], opset=23)
    found = [f for f in look(tmp_path, proto) if f.level == "problem"]
    assert len(found) == count
    assert all("opset 23 with 1 float32 Attention node:" in f.message for f in found)


def test_float64_is_a_warning(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["d"], ["y"], to=1),
    ]
    [found] = bad(look(tmp_path, model(nodes), x=rows()))
    assert (found.level, "1 tensors in float64 ('d')" in found.message) == ("warning", True)


def test_a_tensor_without_elements_is_a_problem_but_a_shape_may_be_empty(tmp_path: Path) -> None:
    empty = {"w": np.zeros((4, 0), np.float32), "v": np.zeros((0, 4), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    found = [f for f in look(tmp_path, model(nodes, constants=empty)) if f.level == "problem"]
    assert len(found) == 1
    assert "2 tensors have no element ('v', 'w')" in found[0].message
    scalar = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=1),
        helper.make_node("Reshape", ["m", "shape"], ["y"]),
    ]
    shape = {"shape": np.zeros(0, np.int64)}
    assert not bad(look(tmp_path, model(scalar, outputs=[("y", 1, [])], constants=shape), x=rows()))


def test_fixed_sizes_are_a_warning(tmp_path: Path) -> None:
    fixed = [
        ("x", TensorProto.FLOAT, [1, 4]),
        ("ids", TensorProto.INT64, ["batch", 4]),
        ("y", TensorProto.FLOAT, [1, 4]),
    ]
    nodes = [helper.make_node("Gather", ["x", "ids"], ["m"], axis=1), *small_output()]
    proto = model(nodes, inputs=fixed[:2], outputs=[("y", TensorProto.FLOAT, None)])
    found = bad(look(tmp_path, proto, x=rows(), ids=np.zeros((3, 4), np.int64)))  # the three rows run one by one
    assert [f.message for f in found] == [
        "fixed sizes: batch of 'x' is 1, length of 'ids' is 4. The graph runs at these only."
    ]


def test_an_opset_that_is_missing_or_unknown_is_reported(tmp_path: Path) -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"])])
    proto.opset_import[0].version = 999
    assert "opset 999" in bad(look(tmp_path, proto, x=rows()))[0].message
    del proto.opset_import[:]
    assert bad(look(tmp_path, proto, x=rows()))[0].level == "problem"


# float16


def linear(weight: float, size: int = 4) -> Any:
    """y = relu(x) @ W, of module encoder.layer.1.ffn, all weights equal."""
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"], name="product")]
    scopes = nodes[1].metadata_props.add()
    scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", "['', 'encoder', 'encoder.layer.1.ffn', 'linear_3']"
    return model(nodes, constants={"w": np.full((4, size), weight, np.float32)})


@pytest.mark.parametrize(
    ("weight", "level"), [(1.0, "ok"), (4090.0, "ok"), (4100.0, "warning"), (16300.0, "warning"), (16400.0, "problem")]
)
def test_an_activation_that_overflows_in_numpys_float16_is_a_problem(tmp_path: Path, weight: float, level: str) -> None:
    feeds = np.zeros((3, 4), np.float32)
    feeds[1] = 1  # the largest value is in neither the first nor the last row
    with np.errstate(over="ignore"):
        halved = (np.maximum(feeds, 0) @ np.full((4, 4), weight, np.float32)).astype(np.float16)
    assert bool(np.isinf(halved).any()) == (level == "problem")
    found = look(tmp_path, linear(weight), x=feeds)[-1]
    assert found.level == level
    assert "'y' (MatMul 'product', module 'encoder.layer.1.ffn')" in found.message
    assert ("--precision bf16 or fp32" in found.remedy) == (level != "ok")


def test_the_largest_value_of_every_tensor_is_found(tmp_path: Path) -> None:
    # Negative, and inside the graph: the output itself is small.
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "c"], ["large"]),
        helper.make_node("Mul", ["large", "d"], ["larger"]),
        helper.make_node("Tanh", ["larger"], ["y"]),
    ]
    proto = model(nodes, constants={"c": np.array(300, np.float32), "d": np.array(-300, np.float32)})
    peak = float(np.abs(rows()).max() * 300 * 300)
    assert peak > half_range.LARGEST
    [problem] = bad(look(tmp_path, proto, x=rows()))
    assert f"'larger' (Mul '') reaches {peak:.6g} on 3 samples" in problem.message


@pytest.mark.parametrize(
    ("size", "expected"), [(65504, "warning"), (65600, "problem"), (16000, "ok"), (1e-12, "warning")]
)
def test_weights_are_judged_by_what_float16_makes_of_them(tmp_path: Path, size: float, expected: str) -> None:
    with np.errstate(over="ignore"):
        half = np.float16(size)
    assert np.isinf(half) == (expected == "problem")
    constants = {"w": np.array([size, size / 2, 0, 0], np.float32)}
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Mul", ["h", "w"], ["m"]), *small_output()]
    found = bad(look(tmp_path, model(nodes, constants=constants), x=rows(size=0.01)))
    assert [f.level for f in found] == ([] if expected == "ok" else [expected])


def small_output() -> list[Any]:
    return [helper.make_node("Tanh", ["m"], ["y"])]


def masked_softmax(fill: float, kind: str = "where") -> Any:
    """y = softmax(8 (x + mask)), x padded in its last two columns, as attention does it."""
    keep = np.array([True, True, False, False])
    constants = {"fill": np.array(fill, np.float32), "zero": np.array(0, np.float32), "keep": keep}
    constants |= {"eight": np.array(8, np.float32), "drop": (~keep).astype(np.float32)}
    mask = {
        "where": helper.make_node("Where", ["keep", "zero", "fill"], ["mask"]),
        "mul": helper.make_node("Mul", ["drop", "fill"], ["mask"]),
    }[kind]
    nodes = [
        mask,
        helper.make_node("Add", ["x", "mask"], ["s"], name="scores"),
        helper.make_node("Div", ["s", "eight"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["y"]),
    ]
    return model(nodes, constants=constants)


@pytest.mark.parametrize(
    "fill", [float(np.finfo(np.float32).min), -3.3895e38, -np.inf], ids=["float32", "bfloat16", "inf"]
)
def test_masks_at_the_end_of_a_dtype_are_no_overflow(tmp_path: Path, fill: float) -> None:
    assert not bad(look(tmp_path, masked_softmax(fill), x=rows()))


def test_scores_that_overflow_beside_a_mask_are_found(tmp_path: Path) -> None:
    [found] = bad(look(tmp_path, masked_softmax(float(np.finfo(np.float32).min)), x=rows(size=1e6)))
    assert found.level == "problem"
    assert "'s' (Add 'scores') reaches" in found.message
    seen = float(np.abs(rows(size=1e6)[:, :2]).max())  # the other two columns are masked
    assert f"{seen:.6g}" in found.message


@pytest.mark.parametrize(("kind", "level"), [("where", "warning"), ("mul", "problem")])
def test_a_mask_written_as_a_number_is_judged_by_its_use(tmp_path: Path, kind: str, level: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(np.float16(0) * np.float16(-1e9)) == np.True_  # why a product is worse
    [found] = bad(look(tmp_path, masked_softmax(-1e9, kind), x=rows()))
    assert found.level == level
    assert "-1e+09 in 'fill' becomes -infinity" in found.message


def test_what_is_not_finite_in_float32_already_is_a_problem(tmp_path: Path) -> None:
    feeds = rows()
    feeds[1, 1] = -1
    found = bad(look(tmp_path, model([helper.make_node("Sqrt", ["x"], ["y"])]), x=feeds))
    assert found[0].level == "problem"
    assert "NaN or infinity" in found[0].message


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "no samples.safetensors"),
        ({"z": rows()}, "have no 'x'"),
        ({"x": rows()[:, :3]}, "cannot run the recorded samples"),
    ],
)
def test_activations_that_cannot_be_seen_are_a_warning(tmp_path: Path, feeds: dict[str, Any], words: str) -> None:
    [found] = bad(look(tmp_path, linear(1.0), **feeds))
    assert found.level == "warning"
    assert words in found.message


@pytest.mark.parametrize(("kind", "weight", "level"), [(10, 1.0, "ok"), (10, 60000.0, "problem"), (16, 1.0, "ok")])
def test_a_half_precision_file_is_run_as_it_is(tmp_path: Path, kind: int, weight: float, level: str) -> None:
    proto = linear(weight)
    half = helper.make_tensor("w16", kind, [4, 4], np.full(16, weight, np.float32))
    del proto.graph.initializer[:]
    proto.graph.initializer.append(half)
    proto.graph.output[0].type.tensor_type.elem_type = kind
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=kind), helper.make_node("MatMul", ["h", "w16"], ["y"])]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    found = look(tmp_path, proto, x=np.ones((2, 4), np.float32))
    assert [f.level for f in bad(found)] == ([] if level == "ok" else [level])
    assert "in half precision" in found[-1].message


# files from outside


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an ONNX model"),
        (b"not protobuf at all" * 9, "not an ONNX file"),
        (linear(1.0).SerializeToString()[:-7], "truncated"),
        (b"\x08\x0a", "not an ONNX model"),
    ],
    ids=["empty", "text", "truncated", "no-graph"],
)
def test_a_file_that_is_no_onnx_model_is_refused(shell: Shell, tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    ran = shell("optin", "doctor", tmp_path)
    assert ran.code == 2
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_a_file_beyond_what_protobuf_holds_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(BadInput, match=r"2\.0 GiB"):
        read_onnx(path)


def external(folder: Path, location: str, *, length: int = 64) -> Any:
    """linear(1), its weight in another file."""
    proto = linear(1.0)
    [weight] = proto.graph.initializer
    data, weight.raw_data = weight.raw_data, b""
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    (folder / "weights.bin").write_bytes(data)
    return proto


def test_external_data_beside_the_file_is_read(tmp_path: Path) -> None:
    found = look(tmp_path, external(tmp_path, "weights.bin"), x=np.ones((2, 4), np.float32))
    assert not bad(found)
    assert "largest activation on 2 samples is 4 " in found[-1].message


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret.bin", "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        ("link.bin", "outside of the folder"),
        ("", "outside of the folder"),
        ("gone.bin", "missing"),
        ("a\0b", "damaged"),
    ],
)
def test_external_data_outside_of_the_folder_is_never_read(tmp_path: Path, location: str, words: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    [found] = look(folder, external(folder, location), x=rows())  # nothing more is looked at
    assert found.level == "problem"
    assert words in found.message


def test_external_data_that_is_too_short_is_a_problem(tmp_path: Path) -> None:
    [found] = look(tmp_path, external(tmp_path, "weights.bin", length=65), x=rows())
    assert "has 64 bytes, too few" in found.message


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    proto = linear(1.0)
    proto.graph.initializer[0].dims[0] = 10**9
    with pytest.raises(BadInput, match="'w' is damaged"):
        look(tmp_path, proto, x=rows())


def test_names_from_outside_neither_style_nor_control_the_terminal(shell: Shell, tmp_path: Path) -> None:
    evil = "[bold]\x1b[31m[/nope]" + "long" * 99
    nodes = [helper.make_node("Relu", ["x"], ["y"], domain=evil)]
    (tmp_path / "model.onnx").write_bytes(model(nodes, domains=[evil]).SerializeToString())
    ran = shell("optin", "doctor", tmp_path)
    assert ran.code == 1
    assert "[bold]" in ran.out
    assert "\x1b" not in ran.out
    assert "long" * 50 not in ran.out
    assert len(named(evil)) <= 80
    assert "\x1b" not in plain(f"a{evil}")


# TensorRT's own word


@pytest.fixture(scope="module")
def rtx() -> support.Parser:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    return support.Parser(trt, "TensorRT-RTX")


def test_the_parser_takes_a_sound_graph_and_names_what_it_refuses(tmp_path: Path, rtx: support.Parser) -> None:
    assert "takes all 2 nodes" in " ".join(f.message for f in look(tmp_path, linear(1.0), parser=rtx, x=rows()))
    square = [("x", TensorProto.FLOAT, ["batch", 4, 4]), ("y", TensorProto.FLOAT, ["batch"])]
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Det", ["h"], ["y"], name="volume")]
    proto = model(nodes, inputs=square[:1], outputs=square[1:])
    found = [f for f in look(tmp_path, proto, parser=rtx) if f.level == "problem"]
    assert len(found) == 1
    assert "refuses Det 'volume' (UNSUPPORTED_NODE)." in found[0].message


def test_the_stored_list_says_what_the_parser_says(rtx: support.Parser) -> None:
    trt = rtx.trt
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    standard = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert {name for name in standard if not parser.supports_operator(name)} == set(UNSUPPORTED.split())


def test_a_parser_that_does_not_start_is_replaced_by_the_list(tmp_path: Path) -> None:
    class NoGpu:
        """The full TensorRT on a machine without a GPU: pybind11 says that the constructor gave nothing."""

        __name__ = "tensorrt"

        class ILogger:
            pass

        def Builder(self, logger: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    square = [("x", TensorProto.FLOAT, ["batch", 4, 4]), ("y", TensorProto.FLOAT, ["batch"])]
    proto = model([helper.make_node("Det", ["x"], ["y"])], inputs=square[:1], outputs=square[1:])
    found = look(tmp_path, proto, parser=support.Parser(NoGpu(), "TensorRT"), x=np.ones((1, 4, 4), np.float32))
    assert [f.message for f in bad(found)] == ["probably not in TensorRT, by a stored list: 1 x Det."]


def test_rtx_builds_a_sound_graph_ahead_and_not_a_foreign_one(tmp_path: Path, rtx: support.Parser) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear(1.0).SerializeToString())
    assert build_ahead(path) is None  # no config.json: nobody knows how long its inputs may be
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 24}')
    said = build_ahead(path)
    assert said is not None
    assert "seq=16,24,24" in said
    nodes = [helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")]
    path.write_bytes(model(nodes, domains=["com.microsoft"]).SerializeToString())
    with pytest.raises(CannotBuildHere, match="FastGelu"):
        build_ahead(path)


def test_only_a_sound_model_onnx_is_built_ahead(tmp_path: Path) -> None:
    tried: list[str] = []

    def preflight(path: Path) -> str:
        tried.append(path.name)
        raise CannotBuildHere("the builder gave no plan")

    save_file({"input.x": torch.ones(2, 4), "dense.output": torch.ones(2)}, tmp_path / "samples.safetensors")
    for name in ("model.onnx", "dense.onnx"):
        (tmp_path / name).write_bytes(linear(1.0).SerializeToString())
    found = diagnose(tmp_path, preflight=preflight)
    assert tried == ["model.onnx"]
    assert [f.message for f in bad(found.findings)] == ["the builder gave no plan"]
    (tmp_path / "model.onnx").write_bytes(linear(1e6).SerializeToString())
    assert diagnose(tmp_path, preflight=preflight).has_problem
    assert tried == ["model.onnx"]


# the command


def test_the_command_looks_at_this_machine(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: HEALTHY)
    ran = shell("optin", "doctor")
    assert ran.code == 0, ran.err
    for words in ("This machine", "2.13.0+cpu, built without CUDA", "Engines", "trt-rtx", "No problems found."):
        assert words in ran.out
    monkeypatch.setattr(doctor, "examine", lambda: with_packages(GPU, packages={"onnxruntime": "1.32.0"}))
    ran = shell("optin", "doctor")
    assert ran.code == 1
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'optin-deploy[gpu]'" in " ".join(
        ran.out.split()
    )
    assert "1 problem found." in ran.out


@pytest.mark.parametrize(("weight", "code"), [(1.0, 0), (5e3, 0), (1e5, 1)])
def test_the_command_gives_json_and_an_exit_code(shell: Shell, tmp_path: Path, weight: float, code: int) -> None:
    (tmp_path / "model.onnx").write_bytes(linear(weight).SerializeToString())
    save_file({"input.x": torch.ones(2, 4)}, tmp_path / "samples.safetensors")
    ran = shell("optin", "doctor", tmp_path, "--json")
    assert ran.code == code, ran.err
    found = json.loads(ran.out)
    assert found["schema_version"] == 1
    assert any(f["level"] == "problem" for f in found["findings"]) == bool(code)
    assert all(f.keys() == {"level", "subject", "message", "remedy"} for f in found["findings"])


def test_one_file_can_be_given(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "any.onnx").write_bytes(linear(1.0).SerializeToString())
    ran = shell("optin", "doctor", tmp_path / "any.onnx")
    assert ran.code == 0, ran.err
    assert "any.onnx" in ran.out


@pytest.mark.parametrize("name", ["gone", "."])
def test_a_folder_without_onnx_files_is_bad_input(shell: Shell, tmp_path: Path, name: str) -> None:
    ran = shell("optin", "doctor", tmp_path / name)
    assert ran.code == 2
    assert "onnx" in ran.err


def test_damaged_samples_are_bad_input(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(linear(1.0).SerializeToString())
    (tmp_path / "samples.safetensors").write_bytes(b"damaged")
    assert shell("optin", "doctor", tmp_path).code == 2


def test_the_summary_counts() -> None:
    problem, warning = Finding("problem", "a", "b"), Finding("warning", "a", "b")
    assert summary([]) == "No problems found."
    assert summary([warning]) == "1 warning found."
    assert summary([problem, warning, problem]) == "2 problems and 1 warning found."
