"""ONNX files become networks in their normal form: the same function, weights in place; hostile ones are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.wire import LARGE_BYTES, Malformed, length_delimited, slim
from support.tiny_graphs import (
    FLOAT,
    FORMS,
    INT64,
    WIDTH,
    chain,
    feeds,
    functions,
    model_of,
    outputs,
    text,
    value,
    weight,
)

Change = Callable[[onnx.ModelProto], None]


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def computed(network: Network, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return outputs(ir.to_proto(network.model), inputs)


# --- the normal form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_network_in_normal_form_computes_what_the_file_does(form: str, tmp_path: Path) -> None:
    model = FORMS[form]()
    network = read(saved(model, tmp_path))
    for seed in (0, 1):
        inputs = feeds(model, seed)
        for expected, found in zip(outputs(model, inputs), computed(network, inputs), strict=True):
            assert np.array_equal(expected, found)
    assert not network.model.functions
    assert "Constant" not in {node.op_type for node in network.model.graph.all_nodes()}
    assert not {port.name for port in network.inputs} & set(network.weights)
    names = [name for node in network.nodes for name in node.outputs]
    assert len(names) == len(set(names))
    done = {*network.weights, *(port.name for port in network.inputs)}
    for node in network.nodes:
        assert done.issuperset(node.inputs)
        done.update(node.outputs)


def test_older_operators_are_refused_with_what_to_do() -> None:
    with pytest.raises(BadInput, match=r"opset 9; possible are 11 and newer.*convert_version"):
        read(chain(9, 6))


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(11, 3), (11, 6), (13, 7), (15, 8), (17, 8), (20, 9), (22, 10), (23, 11)]
)
def test_versions_are_as_found(opset: int, ir_version: int, tmp_path: Path) -> None:
    model = chain(opset, ir_version)
    network = read(saved(model, tmp_path))
    assert (network.model.ir_version, network.model.opset_imports[""]) == (ir_version, opset)
    assert [port.name for port in network.inputs] == ["x"]
    assert set(network.weights) == {"w", "v"}


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    model = chain()
    expected = outputs(model, feeds(model))
    turned = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(turned)
    network = read(saved(model, tmp_path))
    assert [node.name for node in network.nodes] == ["first", "act", "second"]
    assert np.array_equal(computed(network, feeds(model))[0], expected[0])


def test_a_size_of_minus_one_is_free(tmp_path: Path) -> None:
    model = chain()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert read(saved(model, tmp_path)).inputs[0].shape == ("?", WIDTH)


def test_models_in_memory_are_read_and_not_changed(tmp_path: Path) -> None:
    model = functions()
    before, inputs = model.SerializeToString(), feeds(model)
    expected = outputs(model, inputs)[0]
    assert np.array_equal(computed(read(model), inputs)[0], expected)
    assert model.SerializeToString() == before
    wrapped = ir.from_proto(model)
    assert np.array_equal(computed(read(wrapped), inputs)[0], expected)
    assert len(wrapped.functions) == 2
    network = read(wrapped)
    assert read(network) is network
    with pytest.raises(BadInput, match="not from int"):
        read(5)


# --- weights ----------------------------------------------------------------------------------------------------


def _mapped(array: np.ndarray) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return type(array).__name__ in ("mmap", "memoryview")


@pytest.mark.parametrize("form", FORMS)
def test_large_weights_are_mapped_wherever_they_lie(form: str, tmp_path: Path) -> None:
    network = read(saved(FORMS[form](), tmp_path))
    large = [weight for weight in network.weights.values() if weight.nbytes >= LARGE_BYTES]
    assert large
    assert all(_mapped(weight.numpy()) for weight in large)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
def test_reading_takes_no_memory_for_weights(tmp_path: Path) -> None:
    size = 4096
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", "b", size)],
        [value("y", "b", size)],
        [weight("w", size, size)],
    )
    path = saved(model, tmp_path)
    script = f"""
import pathlib
from optin_deploy.network.read_onnx import read_file
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
network = read_file(pathlib.Path({str(path)!r}))
print(peak() - before)
assert network.weights["w"].numpy().shape == ({size}, {size})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 0.2 * path.stat().st_size


def test_a_file_that_is_replaced_keeps_its_weights(tmp_path: Path) -> None:
    path = saved(chain(), tmp_path)
    network = read(path)
    expected = numpy_helper.to_array(chain().graph.initializer[0])
    other = tmp_path / "other"
    other.write_bytes(b"\0" * path.stat().st_size)
    os.replace(other, path)
    assert np.array_equal(network.weights["w"].numpy(), expected)


@pytest.mark.parametrize("count", [3, 3000])
@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "float8_e4m3fn", "int8", "bool", "int4", "uint4", "float64", "int64"]
)
def test_every_type_is_read(name: str, count: int, tmp_path: Path) -> None:
    dtype = np.dtype(name) if name in np.sctypeDict else np.dtype(getattr(ml_dtypes, name))
    values = (np.arange(count) % 7).astype(dtype)
    kind = ir.DataType.from_numpy(dtype)
    stored = ir.to_proto(ir.tensor(values, dtype=kind, name="w"))
    ends = [value("x", count, dtype=kind)], [value("y", count, dtype=kind)]
    model = model_of([helper.make_node("Where", ["c", "x", "w"], ["y"])], *ends, [stored])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    found = read(saved(model, tmp_path)).weights["w"]
    assert found.dtype == kind
    assert np.array_equal(found.numpy().astype(np.float64), values.astype(np.float64))


# --- external data ----------------------------------------------------------------------------------------------


def beside(folder: Path, location: str = "w.bin", **entries: str) -> Path:
    """The chain, with one weight in a file of its own."""
    model = chain()
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(bytes(64) + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    told = {"location": location, "offset": "64", "length": str(4 * WIDTH * WIDTH)} | entries
    for key, text_of in told.items():
        tensor.external_data.add(key=key, value=text_of)
    return saved(model, folder)


def test_weights_beside_the_file_are_mapped(tmp_path: Path) -> None:
    found = read(beside(tmp_path)).weights["w"].numpy()
    assert np.array_equal(found, numpy_helper.to_array(chain().graph.initializer[0]))
    assert _mapped(found)


@pytest.mark.parametrize(
    ("location", "entries", "words"),
    [
        ("../w.bin", {}, "outside of the folder"),
        ("/etc/passwd", {}, "outside of the folder"),
        ("link.bin", {}, "outside of the folder"),
        ("", {}, "outside of the folder"),
        ("none.bin", {}, "missing"),
        ("folder", {}, "missing"),
        ("w.bin", {"offset": "65"}, "too few"),
        ("w.bin", {"offset": "-1"}, "too few"),
        ("w.bin", {"offset": "9" * 30}, "too few"),
        ("w.bin", {"offset": "x"}, "damaged"),
        ("w.bin", {"length": "8"}, "takes 2304 bytes, not '8'"),
        ("a\0b", {}, "damaged"),
    ],
)
def test_files_outside_missing_or_short_are_refused(
    location: str, entries: dict[str, str], words: str, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(bytes(4000))
    (inside / "link.bin").symlink_to(tmp_path / "w.bin")
    path = beside(inside, location, **entries)
    with pytest.raises(BadInput, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "'w'" in str(caught.value)


def test_a_model_in_memory_whose_weights_lie_in_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'w' lie in another file"):
        read(onnx.load(beside(tmp_path), load_external_data=False))


# --- hostile files ----------------------------------------------------------------------------------------------


def _shape(*dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def _own_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "h"
    model.graph.node[2].input[0] = "h"


def _undefined(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


def _typed(number: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = number

    return change


def _no_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def _no_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = ""


def _input_sizes(*dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for size, number in zip(model.graph.input[0].type.tensor_type.shape.dim, dims, strict=True):
            size.dim_value = number

    return change


def _weight_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.name = "s"


def _reference(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="a", ref_attr_name="b", type=onnx.AttributeProto.INT)


def _attribute_twice(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2)


def _untyped_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="a", i=1)


def _number_for_graph(model: onnx.ModelProto) -> None:
    node = helper.make_node("If", ["x"], ["z"], then_branch=1, else_branch=1)
    model.graph.node.append(node)


def _version(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 2**62


def _both(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")


HOSTILE: dict[str, tuple[Change, str]] = {
    "a cycle": (_own_input, "waits for its own output"),
    "a value twice": (_twice, "value 'h' is defined twice"),
    "an input from nowhere": (_undefined, "'act' reads 'nowhere', which nothing defines"),
    "an output from nowhere": (_no_output, "output 'nowhere' is computed by nothing"),
    "no operator": (_no_operator, "node 'first' names no operator"),
    "a negative size": (_shape(-24, -24), r"'w' has impossible sizes \[-24, -24\]"),
    "an absurd size": (_shape(2**60, 2**60), "'w' has impossible sizes"),
    "sizes that do not fit": (_shape(24, 25), r"'w' of sizes \[24, 25\] takes 2400 bytes, not '2304'"),
    "a type that does not fit": (_typed(11), "takes 4608 bytes"),
    "an unknown type": (_typed(99), "'w' is of the unknown type 99"),
    "no type": (_typed(0), "'w' is of the unknown type 0"),
    "texts as bytes": (_typed(8), "'w' says that it lies in another file"),
    "a weight twice": (_weight_twice, "weight 'w' is defined twice"),
    "a sparse weight": (_sparse, "weight 's' is sparse"),
    "an absurd input": (_input_sizes(2**60, 24), "value 'x' has impossible sizes"),
    "a negative input": (_input_sizes(-7, 24), "value 'x' has impossible sizes"),
    "a reference outside of a function": (_reference, "refers to an attribute of a function"),
    "an attribute twice": (_attribute_twice, "attribute of 'first' 'a' is defined twice"),
    "a number in place of a graph": (_number_for_graph, "'else_branch' of 'z' is of type INT, not GRAPH"),
    "an attribute without type": (_untyped_attribute, "'a' of 'first' is of an unknown type"),
    "a version that is none": (_version, "asks for version 4611686018427387904"),
    "values in two places": (_both, "says that it lies in another file, but holds"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_is_refused_by_file_and_value(case: str, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    model = chain()
    change(model)
    path = saved(model, tmp_path)
    with pytest.raises(BadInput, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


def _nested(depth: int, size: int) -> bytes:
    """A graph in a node in a graph, and so on, with so many bytes in the innermost."""
    inside = bytes(size)
    for _ in range(depth):
        for field in (onnx.AttributeProto.G_FIELD_NUMBER, onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER, 1):
            inside = length_delimited(field, len(inside)) + inside
    return length_delimited(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(inside)) + inside


@pytest.mark.parametrize(("depth", "size"), [(40, 0), (40, 5000), (3000, 0)])
def test_graphs_inside_of_graphs_end(depth: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(chain().SerializeToString() + _nested(depth, size))
    with pytest.raises(BadInput, match=f"{path} is truncated or not an ONNX file"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"hello, this is no model", b"\xff" * 3000, b"\x00" * 3000, b"PK\x03\x04"]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=str(path)):
        read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")  # opening it would wait for ever
    for path in (tmp_path, tmp_path / "none.onnx", tmp_path / "pipe.onnx"):
        with pytest.raises(BadInput, match="is not a file"):
            read(path)


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(chain().SerializeToString().replace(b"MatMul", b"\xcdatMul"))
    with pytest.raises(BadInput, match=r"its op_type b'\\xcdatMul' is no text"):
        read(path)


def _calls(*names: str) -> list[onnx.NodeProto]:
    return [helper.make_node(name, ["a"], [f"o{i}"], domain="own") for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("bodies", "words"),
    [
        ({"f0": ("f0",)}, "function 'f0' calls itself"),
        ({"f0": ("f1",), "f1": ("f0",)}, "calls itself"),
        ({**{f"f{i}": (f"f{i + 1}",) * 4 for i in range(30)}, "f30": ()}, "nodes after its functions"),
        ({"f0": ("f1",) * 150, "f1": ("f2",) * 150, "f2": ()}, "called too often"),
    ],
)
def test_functions_that_never_end_are_refused(bodies: dict[str, tuple[str, ...]], words: str, tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    made = [
        helper.make_function(
            "own", name, ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"]), *_calls(*called)], opsets
        )
        for name, called in bodies.items()
    ]
    node = helper.make_node("f0", ["x"], ["y"], domain="own")
    model = model_of([node], [value("x", 1)], [value("y", 1)], functions=made)
    with pytest.raises(BadInput, match=words):
        read(saved(model, tmp_path))


# --- the wire ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_slim_model_is_the_model_but_for_its_weights(form: str) -> None:
    model = FORMS[form]()
    content = model.SerializeToString()
    slimmed = onnx.ModelProto.FromString(slim(memoryview(content)))
    assert slimmed.ByteSize() < 0.5 * len(content)
    for function in slimmed.functions:
        for node in function.node:
            _restore(node, content)
    for tensor in slimmed.graph.initializer:
        _fill(tensor, content)
    for node in slimmed.graph.node:
        _restore(node, content)
    assert slimmed == model


def _restore(node: onnx.NodeProto, content: bytes) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _fill(attribute.t, content)
        for tensor in attribute.g.initializer:
            _fill(tensor, content)
        for inner in attribute.g.node:
            _restore(inner, content)


def _fill(tensor: TensorProto, content: bytes) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        told = {entry.key: entry.value for entry in tensor.external_data}
        start = int(told["offset"])
        tensor.raw_data = content[start : start + int(told["length"])]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def test_every_cut_of_a_file_is_malformed_or_a_shorter_model() -> None:
    content = text().SerializeToString()
    for end in range(0, len(content), 97):
        try:
            slim(memoryview(content[:end]))
        except Malformed:
            continue


def test_graph_inputs_of_other_kinds_are_read(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    node = helper.make_node("SequenceLength", ["s"], ["y"])
    network = read(saved(model_of([node], [sequence], [value("y", dtype=INT64)]), tmp_path))
    assert [port.name for port in network.inputs] == ["s"]
