"""Weights that are standardised while a network runs, and numbers that are counted: computed once, and cut as they
were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from optin_deploy.cutting.graph import cut
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_proto
from optin_deploy.network.read_torch import read_module
from optin_deploy.structure.find import find
from support.one_cut import graph, run


class Standardised(nn.Conv2d):
    """As timm and transformers write those of BiT, and those of NFNet with a gain."""

    def __init__(self, into: int, out: int, gain: bool) -> None:
        super().__init__(into, out, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(out, 1, 1, 1) + 0.5) if gain else None

    def now(self) -> Tensor:
        gain = None if self.gain is None else (0.3 * self.gain).view(-1)
        flat = self.weight.reshape(1, self.out_channels, -1)
        return functional.batch_norm(flat, None, None, gain, training=True, momentum=0, eps=1e-6).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.now(), self.bias, padding=1)


class Stage(nn.Module):
    """A residual step between them."""

    def __init__(self, gain: bool) -> None:
        super().__init__()
        self.first, self.up, self.down = (Standardised(*each, gain) for each in ((3, 6), (6, 8), (8, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.down(self.up(x).relu())).mean((2, 3)))


def network_of(module: nn.Module, dynamo: bool) -> Network:
    return read_module(module, {"x": torch.randn(2, 3, 7, 7)}, dynamo=dynamo)


@pytest.mark.parametrize("gain", [False, True], ids=["BiT", "NFNet"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_standardised_weights_keep_what_all_their_inputs_made_of_them(dynamo: bool, gain: bool) -> None:
    torch.manual_seed(0)
    module = Stage(gain).eval()
    network = network_of(module, dynamo)
    x = torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(run(network, {"x": x.numpy()})[0]), module(x))
    layout = find(network)
    assert {group.name: group.units for group in layout.groups} == {"first: channels": 6, "up: channels": 8}
    keep = {"first: channels": [0, 2, 5], "up: channels": [1, 3, 4, 6]}
    convs = [(each.now(), each.bias) for each in (module.first, module.up, module.down)]
    with torch.no_grad():
        alive, within = torch.zeros(6, 1, 1), torch.zeros(8, 1, 1)
        alive[keep["first: channels"]] = within[keep["up: channels"]] = 1
        hidden = functional.conv2d(x, *convs[0], padding=1).relu() * alive
        inner = functional.conv2d(hidden, *convs[1], padding=1).relu() * within
        added = functional.conv2d(inner, *convs[2], padding=1) * alive
        expected = module.head((hidden + added).mean((2, 3)))
    smaller = cut(layout, keep)
    torch.testing.assert_close(torch.from_numpy(run(smaller, {"x": x.numpy()})[0]), expected)
    assert {node.op for node in smaller.nodes} <= {"Conv", "Relu", "Add", "ReduceMean", "Gemm", "Reshape"}


def test_what_is_normalised_of_an_input_is_computed_as_before() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    network = read_module(module, {"input": torch.randn(2, 3, 7, 7)}, dynamo=False)
    assert set(network.weights) >= set(dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("limit", "step", "once"),
    [(12, 3, True), (2**16, 1, True), (2**16 + 1, 1, False), (10**12, 1, False), (12, 0, False)],
)
def test_numbers_are_counted_once_unless_a_file_asks_for_too_many(limit: int, step: int, once: bool) -> None:
    nodes = [
        helper.make_node("Range", ["first", "limit", "step"], ["counted"]),
        helper.make_node("ReduceSum", ["counted"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["real"], to=1),
        helper.make_node("Mul", ["x", "real"], ["y"]),
    ]
    numbers = {"first": np.int64(0), "limit": np.int64(limit), "step": np.int64(step)}
    network = read_proto(graph(nodes, numbers, {"x": np.ones((2, 3), np.float32)}, outputs=["y"]))
    assert ("Range" not in {node.op for node in network.nodes}) == once
    if once:
        x = np.ones((2, 3), np.float32)
        np.testing.assert_allclose(run(network, {"x": x})[0], x * np.arange(0, limit, step).sum())
