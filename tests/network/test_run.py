"""Running a network by torch: masks, watched values, partial runs, types, gradients and memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.read import read
from optin_deploy.network.run import Program

WIDTH = 6


def model(kind: type[np.floating] = np.float32, width: int = WIDTH) -> onnx.ModelProto:
    """x -> MatMul -> Relu -> MatMul -> Add(x), with a Cast in between."""
    random = np.random.default_rng(0)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weights = [numpy_helper.from_array(random.normal(size=(width, width)).astype(kind), name) for name in ("a", "b")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["first"]),
        helper.make_node("Relu", ["first"], ["active"]),
        helper.make_node("Cast", ["active"], ["cast"], to=code),
        helper.make_node("MatMul", ["cast", "b"], ["second"]),
        helper.make_node("Add", ["second", "x"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, code, ["n", width]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def network(kind: type[np.floating] = np.float32) -> Network:
    return read(model(kind))


def by_hand(x: torch.Tensor, mask: torch.Tensor, net: Network) -> torch.Tensor:
    a, b = (torch.from_numpy(np.array(net.weights[name].numpy())).to(x.dtype) for name in ("a", "b"))
    return torch.relu(x @ a) * mask @ b + x


X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([1.0, 0, 1, 0.5, 0, 1])
SITE = (3, 0)


def test_a_mask_multiplies_the_input_of_a_node_and_has_a_gradient() -> None:
    net = network()
    one, other = MASK.clone().requires_grad_(), MASK.clone().requires_grad_()
    ours = Program(net)({"x": X}, masks={SITE: one}).outputs["y"]
    expected = by_hand(X, other, net)
    torch.testing.assert_close(ours, expected)
    for each in (ours, expected):
        each.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert not torch.equal(ours, Program(net)({"x": X}).outputs["y"])


def test_a_partial_run_gives_what_a_whole_run_gives() -> None:
    net = network()
    program = Program(net)
    cone = program.cone([SITE[0]])
    assert cone.nodes == (3, 4)
    assert set(cone.needs) == {"cast", "x"}
    upstream = program({"x": X}, watch=cone.needs).watched
    part = program(upstream, masks={SITE: MASK}, watch=["second", "first"], cone=cone)
    whole = program({"x": X}, masks={SITE: MASK}, watch=["second"])
    assert torch.equal(part.outputs["y"], whole.outputs["y"])
    assert torch.equal(part.watched["second"], whole.watched["second"])
    assert "first" not in part.watched


def test_all_real_numbers_have_the_type_that_is_asked_for_though_the_file_casts() -> None:
    net = network(np.float16)
    done = Program(net, dtype=torch.float64)({"x": X.half()}, masks={SITE: MASK}, watch=["cast"])
    assert done.watched["cast"].dtype is done.outputs["y"].dtype is torch.float64
    torch.testing.assert_close(done.outputs["y"], by_hand(X.half().double(), MASK.double(), net), rtol=0, atol=1e-12)


def test_a_mask_keeps_the_type_of_what_it_multiplies() -> None:
    done = Program(network(np.float16))({"x": X.half()}, masks={SITE: MASK})
    assert done.outputs["y"].dtype is torch.float16


def test_values_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    relu, add = rows()["", "Relu"], rows()["", "Add"]

    def relu_seen(node: object, x: torch.Tensor) -> torch.Tensor:
        made.append(weakref.ref(x))
        return torch.relu(x)

    def add_seen(node: object, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        return a + b

    monkeypatch.setitem(rows(), ("", "Relu"), type(relu)("Relu", relu_seen, relu.flow))
    monkeypatch.setitem(rows(), ("", "Add"), type(add)("Add", add_seen, add.flow))
    with torch.no_grad():
        Program(network())({"x": X})
    assert (len(made), alive) == (1, [0])


def test_weights_share_the_memory_of_the_network(tmp_path: Path) -> None:
    onnx.save(model(width=64), tmp_path / "m.onnx")
    net = read(tmp_path / "m.onnx")
    weight = Program(net)._weights["a"]
    assert weight.data_ptr() == net.weights["a"].numpy().ctypes.data


def test_an_operator_without_a_row_is_named() -> None:
    node = helper.make_node("Unheard", ["x"], ["y"], domain="some.where", name="there")
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("some.where", 1)]
    with pytest.raises(BadInput, match=r"Unheard there: the operator some\.where\.Unheard is not known here"):
        Program(read(helper.make_model(graph, opset_imports=imports)))
