"""A module that was exported before gets the same graph with its own weights; another one gets a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from optin_deploy.network import read_torch
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import Axes, Traced
from optin_deploy.network.run import Program
from support.exported_once import exported_once
from support.tiny_models import tiny_model


class Scaled(nn.Module):
    """A product, times a number that is no weight, and with a mask that is a buffer."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.product, self.times = nn.Linear(4, 3), times
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) * self.times * self.mask


X = torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that are really exported; nothing was before."""
    seen: list[str] = []

    def export(traced: Traced, inputs: Mapping[str, Tensor], axes: Axes) -> ir.Model:
        seen.append(type(traced.module).__name__)
        return real(traced, inputs, axes)

    real = read_torch._by_dynamo
    monkeypatch.setattr(read_torch, "_by_dynamo", exported_once(export, tmp_path))
    return seen


def check(module: nn.Module) -> None:
    """The graph that is read computes what the module computes, with the module's own memory."""
    network = read(module, {"x": X})
    expected = module(X)
    assert torch.equal(Program(network)({"x": X}).outputs["output"], expected)
    parameters = dict(module.named_parameters())
    assert all(network.weights[name].raw.data_ptr() == each.data_ptr() for name, each in parameters.items())


@torch.no_grad()
def test_other_weights_are_their_own(exports: list[str]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check(Scaled(2.0))
    assert exports == ["Scaled"]


@torch.no_grad()
def test_what_is_no_weight_makes_another_graph(exports: list[str]) -> None:
    check(Scaled(2.0))
    check(Scaled(3.0))
    other = Scaled(2.0)
    other.mask[1] = 5.0
    check(other)
    wide = Scaled(2.0)
    wide.product.bias = None
    check(wide)
    assert exports == ["Scaled"] * 4


def test_a_module_that_cannot_be_written_down_is_exported_each_time(exports: list[str]) -> None:
    class Inner(Scaled):
        pass

    for _ in range(2):
        check(Inner(2.0))
    assert exports == ["Inner"] * 2


@pytest.mark.slow
def test_a_model_of_transformers_is_found_again_wherever_its_files_lie(exports: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = tiny_model("bert+head")
        model.config._name_or_path = str(tmp_path / name)
        read(model)
    assert len(exports) == 1
