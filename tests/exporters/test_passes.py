"""Passes over a graph: 16-bit types, pooling and folded weights, against ONNX Runtime, torch and counts by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.zoo.dialects import dialect
from benchmarks.zoo.export import export
from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes import opset as opset_pass
from optin_deploy.exporters.passes.folded import folded
from optin_deploy.exporters.passes.opset import raised
from optin_deploy.exporters.passes.pooled import pooled
from optin_deploy.exporters.passes.typed import typed
from optin_deploy.exporters.quantize import quantize_int8
from optin_deploy.feeds.pooling import POOLED, POOLINGS, pooled_states
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.network.write import write
from support.tiny_graphs import FORMS, WIDTH, branches, feeds, model_of, value, weight
from support.tiny_networks import Image, Text, inputs, made
from support.tiny_networks import read as read_tiny

FLOAT, FLOAT16, BFLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64
TYPES = {"fp16": FLOAT16, "bf16": BFLOAT16}
FAMILIES = (
    ("bert", "dynamo"), ("modernbert", "torchscript"), ("llama", "dynamo"), ("gpt-neox", "torchscript"),
    ("t5-encoder", "torchscript"), ("deberta-v2", "torchscript"), ("swin", "dynamo"), ("vit", "torchscript"),
    ("resnet", "torchscript"), ("segformer", "torchscript"), ("whisper-decoder", "torchscript"),
)  # fmt: skip
"""Of the zoo: learned, relative and rotated positions, windows, convolutions, a decoder. All 36 were tried by hand."""
DIALECTS = (("bert", "fused"), ("bert", "opset-13"), ("llama", "ort-2"), ("vit", "4-bit"), ("swin", "onnxslim"))


def session(path: Path | onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(network: Network, values: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """By ONNX Runtime, from the written file."""
    write(network, path)
    engine = session(path)
    names = [port.name for port in engine.get_outputs()]
    return dict(zip(names, engine.run(None, {p.name: values[p.name] for p in engine.get_inputs()}), strict=True))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, as a part of the largest entry."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert np.array_equal(np.isfinite(one), np.isfinite(other))
    one, other = one[np.isfinite(one)].astype(np.float64), other[np.isfinite(other)].astype(np.float64)
    return float(np.abs(one - other).max() / np.abs(other).max()) if one.size else 0.0


def worst(network: Network, changed: Network, folder: Path) -> float:
    found = []
    for probe in probes_of(network):
        values = {name: tensor.numpy() for name, tensor in probe.items()}
        before, after = run(network, values, folder / "before.onnx"), run(changed, values, folder / "after.onnx")
        assert list(before) == list(after)
        found += [apart(after[name], before[name]) for name in before]
    return max(found)


def ports(network: Network) -> list[object]:
    return [*network.inputs, *network.outputs]


def state(network: Network) -> tuple[object, ...]:
    """What a pass may not change in the network that it is given."""
    fresh = Network(network.model, network.source)
    nodes = [(node.op, node.attributes.keys(), node.inputs, node.outputs) for node in fresh.nodes]
    return nodes, {name: id(stored) for name, stored in fresh.weights.items()}, ports(fresh), fresh.model.opset_imports


def kinds(network: Network, folder: Path) -> dict[str, int]:
    """Type of every value of the main graph, as ONNX infers it."""
    write(network, folder / "kinds.onnx")
    proto = onnx.shape_inference.infer_shapes(onnx.load(folder / "kinds.onnx"), strict_mode=True)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    return {each.name: each.type.tensor_type.elem_type for each in values}


# ---- types


@pytest.mark.parametrize("which", [*FAMILIES, *DIALECTS], ids="-".join)
def test_every_family_runs_in_float16_close_to_float32(which: tuple[str, str], tmp_path: Path) -> None:
    source = export(*which) if which in FAMILIES else dialect(*which)
    network = read(source.path)
    before = state(network)
    half = typed(network, "fp16")
    assert state(network) == before
    assert ports(half) == ports(network)
    assert 1e-5 < worst(network, half, tmp_path) < 2e-2


@pytest.mark.parametrize(("family", "form"), [("bert", "torchscript"), ("swin", "torchscript"), ("resnet", "dynamo")])
def test_bfloat16_is_valid_in_opset_22_and_close_in_an_evaluator_of_its_own(
    family: str, form: str, tmp_path: Path
) -> None:
    network = read(export(family, form).path)
    half = typed(network, "bf16")
    write(half, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert half.model.graph.opset_imports[""] == 22
    assert network.model.graph.opset_imports[""] < 22
    probe = probes_of(network)[0]
    with torch.no_grad():
        expected, found = Program(network)(probe).outputs, Program(read(tmp_path / "m.onnx"))(probe).outputs
    for name, output in expected.items():
        assert 1e-4 < apart(found[name].numpy(), output.numpy()) < 6e-2


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("kind", [Text, Image])
def test_weights_and_values_are_of_the_type_and_only_borders_are_cast(
    kind: type[torch.nn.Module], precision: str, tmp_path: Path
) -> None:
    module = made(kind)
    network = folded(read_tiny(module, dynamo=True))
    half = typed(network, precision)
    real = {name: stored.dtype for name, stored in half.weights.items() if stored.dtype.is_floating_point()}
    assert set(real.values()) == {TYPES[precision]}
    assert set(real) == {name for name, stored in network.weights.items() if stored.dtype.is_floating_point()}
    found = kinds(half, tmp_path)
    borders = {port.name for port in (*half.inputs, *half.outputs)}
    assert {found[name] for name in found if name not in borders} - {INT64, TensorProto.BOOL} == {TYPES[precision]}
    casts = [node for node in half.nodes if node.op == "Cast" and FLOAT in (found[node.inputs[0]], node.get("to"))]
    assert len(casts) == sum(port.dtype == ir.DataType.FLOAT for port in (*half.inputs, *half.outputs))
    # As torch computes in this type.
    values = inputs(module)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    typed_values = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in values.items()}
    with torch.no_grad():
        expected = copy.deepcopy(module).to(dtype)(**typed_values).float()
        (output,) = Program(half)(values).outputs.values()
    assert apart(output.numpy(), expected.numpy()) < {"fp16": 4e-3, "bf16": 4e-2}[precision]


@pytest.mark.parametrize("form", [name for name in FORMS if name != "constants"])
def test_tiny_graphs_also_with_branches_compute_the_same(form: str, tmp_path: Path) -> None:
    model = FORMS[form]()
    network = read(model)
    for seed in (0, 1):
        values = feeds(model, seed)
        before = run(network, values, tmp_path / "before.onnx")
        after = run(typed(network, "fp16"), values, tmp_path / "after.onnx")
        onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)
        assert [apart(after[name], before[name]) < 2e-3 for name in before] == [True] * len(before)


def test_what_a_branch_computes_is_in_16_bits_and_what_it_gives_is_as_before() -> None:
    half = typed(read(branches()), "fp16")
    node = next(each for each in half.model.graph if each.op_type == "If")
    graph = node.attributes["then_branch"].as_graph()
    assert [each.op_type for each in graph] == ["MatMul", "Relu", "Cast"]
    assert graph.outputs[0].name == "then_out"
    assert {stored.dtype for stored in half.weights.values()} == {ir.DataType.FLOAT16}


def one_node(
    nodes: list[onnx.NodeProto],
    stored: Mapping[str, np.ndarray],
    *shape: int | str,
    opset: int = 20,
    dtype: int = FLOAT,
) -> Network:
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    model = model_of(nodes, [value("x", *shape, dtype=dtype)], [value("y", *shape)], weights)
    model.opset_import[0].version = opset
    return read(model)


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 65504.0), ("bf16", 3.3895314e38)])
def test_finite_numbers_beyond_the_range_become_its_ends_and_infinities_stay(precision: str, largest: float) -> None:
    numbers = np.array([3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan, 1.5], np.float32)
    network = one_node([helper.make_node("Add", ["x", "w"], ["y"])], {"w": numbers}, 6)
    found = typed(network, precision).weights["w"].numpy().astype(np.float32)
    assert np.array_equal(
        found, np.array([largest, -largest, np.inf, -np.inf, np.nan, 1.5], np.float32), equal_nan=True
    )


def test_what_the_schema_wants_in_float32_stays_so(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "scales"], ["h"]),
        helper.make_node("Resize", ["h", "", "scales"], ["y"], mode="nearest"),
    ]
    network = one_node(nodes, {"scales": np.array([1, 1, 1, 1], np.float32)}, 1, 1, 2, 4)
    half = typed(network, "fp16")
    assert {name: stored.dtype.name for name, stored in half.weights.items()} == {
        "scales": "FLOAT",
        "scales.float16": "FLOAT16",
    }
    values = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 2, 4)
    assert apart(run(half, {"x": values}, tmp_path / "m.onnx")["y"], values) < 1e-3


def test_scales_that_are_computed_from_sizes_stay_in_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=2),
        helper.make_node("Cast", ["shape"], ["sizes"], to=FLOAT),
        helper.make_node("Div", ["asked", "sizes"], ["inner"]),
        helper.make_node("Concat", ["ones", "inner"], ["scales"], axis=0),
        helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest"),
    ]
    stored = {"asked": np.array([2081, 3], np.float32), "ones": np.ones(2, np.float32)}
    half = typed(one_node(nodes, stored, 1, 1, "h", "w"), "fp16")
    assert run(half, {"x": np.ones((1, 1, 3, 1), np.float32)}, tmp_path / "m.onnx")["y"].shape == (1, 1, 2081, 3)


def test_constants_made_by_nodes_are_typed(tmp_path: Path) -> None:
    filled = helper.make_tensor("", FLOAT, [1], [1e6])
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=filled),
        helper.make_node("Min", ["x", "filled"], ["y"]),
    ]
    half = typed(one_node(nodes, {}, "n"), "fp16")
    made_by = half.producer["filled"].attributes["value"]
    assert (made_by.dtype, float(made_by.numpy()[0])) == (ir.DataType.FLOAT16, 65504)
    assert run(half, {"x": np.array([1, 2], np.float32)}, tmp_path / "m.onnx")["y"].tolist() == [1, 2]


def test_positions_are_counted_in_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["position"], to=FLOAT),
        helper.make_node("Mul", ["position", "frequency"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["cos"]),
        helper.make_node("Mul", ["cos", "frequency"], ["y"]),
    ]
    network = one_node(nodes, {"frequency": np.array([1.3], np.float32)}, "n", dtype=INT64)
    values = np.arange(5000)
    found = run(typed(network, "fp16"), {"x": values}, tmp_path / "m.onnx")["y"]
    assert apart(found, (1.3 * np.cos(1.3 * values)).astype(np.float32)) < 2e-3


@pytest.mark.parametrize("root", ["Div", "Mul"])
@pytest.mark.parametrize("size", [1e3, 1e-4])
def test_a_norm_of_large_or_small_values_is_finite_and_right(root: str, size: float, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["mean"]),
        helper.make_node("Add", ["mean", "epsilon"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node(root, ["x", "root" if root == "Div" else "inverse"], ["normal"]),
        helper.make_node("Mul", ["normal", "scale"], ["y"]),
    ]
    stored = {"two": np.array(2, np.float32), "axis": np.array([-1]), "epsilon": np.array(1e-12, np.float32)}
    network = one_node(nodes, {**stored, "scale": np.array(0.5, np.float32)}, "n", 4)
    values = size * np.array([[1, -2, 3, 4], [0, 0, 0, 0]], np.float32)
    half = typed(network, "fp16")
    expected = run(network, {"x": values}, tmp_path / "before.onnx")["y"]
    assert apart(run(half, {"x": values}, tmp_path / "after.onnx")["y"], expected) < 2e-3
    assert half.weights["scale"].dtype == ir.DataType.FLOAT16


def test_a_network_that_is_in_this_type_already_is_given_back_and_others_are_refused() -> None:
    half = typed(read(FORMS["chain"]()), "fp16")
    assert typed(half, "fp16") is half
    with pytest.raises(BadInput, match="holds weights of type FLOAT16"):
        typed(half, "bf16")
    double = numpy_helper.from_array(np.ones(WIDTH), "w")
    ends = [value("x", WIDTH, dtype=TensorProto.DOUBLE)], [value("y", WIDTH, dtype=TensorProto.DOUBLE)]
    with pytest.raises(BadInput, match="type DOUBLE"):
        typed(read(model_of([helper.make_node("Add", ["x", "w"], ["y"])], *ends, [double])), "fp16")


@pytest.mark.parametrize("form", ["int8-qdq", "int8-operators", "int8-dynamic"])
def test_networks_in_8_bit_integers_are_refused(form: str) -> None:
    with pytest.raises(BadInput, match="computes in 8-bit integers"):
        typed(read(dialect("bert", form).path), "fp16")


def test_an_operator_without_a_schema_is_refused_by_name() -> None:
    model = model_of(
        [helper.make_node("Odd", ["x", "w"], ["y"], domain="own")],
        [value("x", WIDTH)],
        [value("y", WIDTH)],
        [weight("w", WIDTH)],
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    with pytest.raises(BadInput, match=r"operator own\.Odd \(opset 1\) is not known"):
        typed(read(model), "fp16")


# ---- operator sets


def test_only_the_number_changes_where_operators_mean_the_same() -> None:
    network = one_node([helper.make_node("Add", ["x", "w"], ["y"])], {"w": np.ones(2, np.float32)}, 2, opset=13)
    newer = raised(network, 22, "bf16")
    assert newer.model.graph.opset_imports[""] == 22
    assert [node.op for node in newer.nodes] == ["Add"]
    assert network.model.graph.opset_imports[""] == 13
    assert raised(newer, 13, "int8") is newer


def test_operators_that_changed_are_converted(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[1]), helper.make_node("Sub", ["x", "m"], ["y"])]
    network = one_node(nodes, {}, "n", 3, opset=17)
    newer = raised(network, 22, "bf16")
    assert len(newer.producer["m"].inputs) == 2
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    found = run(newer, values, tmp_path / "after.onnx")
    assert np.array_equal(found["y"], run(network, values, tmp_path / "before.onnx")["y"])


def test_what_no_converter_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opset_pass, "_convert", lambda model, opset: None)
    network = one_node([helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=0)], {}, 2, 2, opset=17)
    with pytest.raises(BadInput, match=r"--precision bf16 needs opset 22; .* is of opset 17, and its ReduceMax"):
        raised(network, 22, "bf16")


# ---- pooling


def states(opset: int, *, mask: int | None = INT64, name: str = "last_hidden_state") -> Network:
    """States that are what comes in, twice."""
    ends = [value("x", "batch", "length", WIDTH)]
    ends += [value("attention_mask", "batch", "length", dtype=mask)] if mask else []
    model = model_of([helper.make_node("Add", ["x", "x"], [name])], ends, [value(name, "batch", "length", WIDTH)], [])
    model.opset_import[0].version = opset
    return read(model)


@pytest.mark.parametrize("mask", [INT64, TensorProto.BOOL, FLOAT, None])
@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("how", POOLINGS)
def test_pooling_is_that_of_torch(how: str, opset: int, mask: int | None, tmp_path: Path) -> None:
    network = states(opset, mask=mask, name="last_hidden_state")
    given = pooled(network, how)
    assert [port.name for port in given.outputs] == ["last_hidden_state", POOLED]
    assert given.outputs[1].shape == ("batch", WIDTH)
    assert [port.name for port in network.outputs] == ["last_hidden_state"]
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    values = {"x": x.numpy(), "attention_mask": valid.numpy().astype(helper.tensor_dtype_to_np_dtype(mask or INT64))}
    found = run(given, values, tmp_path / "m.onnx")[POOLED]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    expected = pooled_states(2 * x, valid.float() if mask else torch.ones(3, 5), how)
    assert apart(found, expected.numpy()) < 1e-6
    assert apart(run(pooled(typed(network, "fp16"), how), values, tmp_path / "h.onnx")[POOLED], expected.numpy()) < 2e-3


@pytest.mark.parametrize("how", POOLINGS)
def test_a_family_is_pooled_over_its_real_tokens(how: str, tmp_path: Path) -> None:
    source = export("t5-encoder", "torchscript")
    network = read(source.path)
    probe = probes_of(network)[0]
    found = run(pooled(network, how), {name: tensor.numpy() for name, tensor in probe.items()}, tmp_path / "m.onnx")
    (hidden,) = (output for name, output in found.items() if name != POOLED)
    mask = probe["attention_mask"].float()
    expected = pooled_states(torch.from_numpy(hidden), mask, how)
    assert apart(found[POOLED], expected.numpy()) < 1e-5


def test_pooling_without_states_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--pool mean is for feature-extraction.* gives logits \(batch, length, 24\)"):
        pooled(states(17, name="logits"), "mean")
    with pytest.raises(BadInput, match="is for feature-extraction"):
        pooled(read(FORMS["chain"]()), "cls")
    with pytest.raises(BadInput, match="unknown --pool 'median'; possible: mean, cls"):
        pooled(states(17), "median")
    with pytest.raises(BadInput, match="gives sentence_embedding already"):
        pooled(pooled(states(17), "mean"), "cls")


# ---- folded weights


@pytest.mark.parametrize("kind", [Text, Image])
def test_products_read_weights_as_they_are_after_folding(kind: type[torch.nn.Module], tmp_path: Path) -> None:
    module = made(kind)
    network = read_tiny(module, dynamo=True)
    before = state(network)
    less = folded(network)
    assert state(network) == before
    assert ports(less) == ports(network)
    assert len(less.nodes) < len(network.nodes)
    assert not [node for node in less.nodes if set(node.inputs) <= set(less.weights)]
    linears = sum(isinstance(part, torch.nn.Linear) for part in module.modules())
    products = [node for node in less.nodes if node.op in ("MatMul", "Gemm") and node.inputs[1] in less.weights]
    assert len(products) == linears
    values = {name: tensor.numpy() for name, tensor in inputs(module).items()}
    found = run(less, values, tmp_path / "after.onnx")
    for name, output in run(network, values, tmp_path / "before.onnx").items():
        assert apart(found[name], output) < 1e-6


def test_folded_weights_are_computed_when_they_are_written_and_others_are_shared() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Neg", ["t"], ["n"]),
        helper.make_node("MatMul", ["x", "n"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    matrix = np.arange(9, dtype=np.float32).reshape(3, 3)
    network = one_node(nodes, {"w": matrix, "v": matrix}, "n", 3)
    less = folded(network)
    assert [node.op for node in less.nodes] == ["MatMul", "MatMul"]
    assert isinstance(less.weights["n"], ir.LazyTensor)
    assert np.array_equal(less.weights["n"].numpy(), -matrix.T)
    assert less.weights["v"] is network.weights["v"]
    assert set(less.weights) == {"n", "v"}


def test_what_would_grow_or_is_quantised_stays() -> None:
    nodes = [
        helper.make_node("Expand", ["row", "wide"], ["many"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceMax", ["many"], ["most"], keepdims=0),
        helper.make_node("Add", ["h", "most"], ["y"]),
    ]
    stored = {"row": np.ones(3, np.float32), "wide": np.array([2**14, 3]), "q": np.ones((3, 3), np.int8)}
    network = one_node(nodes, {**stored, "scale": np.array(0.5, np.float32)}, "n", 3)
    assert [node.op for node in folded(network).nodes] == [node.op for node in network.nodes]


def test_a_folded_value_that_is_an_output_keeps_its_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["w"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]
    ends = [value("x", WIDTH)], [value("y", WIDTH), value("z", WIDTH)]
    network = read(model_of(nodes, *ends, [weight("w", WIDTH)]))
    values = {"x": np.ones(WIDTH, np.float32)}
    found, expected = (run(each, values, tmp_path / "m.onnx") for each in (folded(network), network))
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in expected.items()}


# ---- int8


@pytest.mark.parametrize("kind", [Text, Image])
def test_products_of_an_unoptimised_graph_are_quantised(kind: type[torch.nn.Module], tmp_path: Path) -> None:
    module = made(kind)
    source, out = tmp_path / "m.onnx", tmp_path / "m.int8.onnx"
    network = read_tiny(module, dynamo=True)
    write(network, source)
    values = {name: tensor.numpy() for name, tensor in inputs(module).items()}
    quantize_int8(source, out, [{**values, "unknown": np.ones(1)}])
    graph = onnx.load(out).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    weighted = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    quantised = [node for node in weighted if made_by.get(node.input[1]) == "DequantizeLinear"]
    parts = [part for part in module.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(parts) >= len(quantised) > len(parts) / 2
    assert all(made_by[node.input[0]] == "DequantizeLinear" for node in quantised)
    exact = session(source).run(None, values)[0]
    assert 1e-3 < apart(session(out).run(None, values)[0], exact) < 0.1


def test_older_files_of_other_exporters_are_quantised(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    matrix = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    network = one_node(nodes, {"w": matrix}, "n", 4, opset=11)
    write(network, tmp_path / "m.onnx")
    values = {"x": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
    quantize_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", [values])
    proto = onnx.load(tmp_path / "q.onnx")
    assert [node.op_type for node in proto.graph.node].count("DequantizeLinear") == 2
    assert apart(session(proto).run(None, values)[0], values["x"] @ matrix.T) < 2e-2
