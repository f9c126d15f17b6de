"""Branches: from a product that uses units, along an affine way to a residual Add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read as read_any
from optin_deploy.network.run import Program
from optin_deploy.structure.branches import Way, branches, weight_place
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from support.tiny_networks import Image, Text, export, made, read


def branch(layout: Layout, name: str) -> Way:
    found = branches(layout.structure, layout.by_name[name])
    assert len(found) == 1
    assert found[0] is not None
    return found[0]


def is_affine(layout: Layout, name: str) -> bool:
    """Double what the output projection reads: what arrives at the Add moves by as much again, and the rest stays."""
    network, found = layout.structure.network, branch(layout, name)
    assert found.add is not None
    assert found.residual is not None
    program, feeds = Program(network, dtype=torch.float64), probes_of(network)[0]
    output = network.nodes[layout.by_name[name].sites[0].node]
    weight = weight_place(layout.structure, output)
    assert weight is not None
    arrives, place = network.nodes[found.add[0]].inputs[found.add[1]], (output.index, 1 - weight)
    seen = []
    for factor in (0.0, 1.0, 2.0):
        watched = program(
            feeds, masks={place: torch.tensor(factor, dtype=torch.float64)}, watch=[arrives, found.residual]
        )
        seen.append((watched.watched[arrives], watched.watched[found.residual]))
    (zero, same), (one, before), (two, after) = seen
    moved = (one - zero).abs().max() > 1e-3
    return bool(
        moved and torch.allclose(two - one, one - zero) and torch.equal(same, before) and torch.equal(before, after)
    )


@pytest.mark.parametrize("dynamo", [True, False])
def test_heads_have_a_scaled_way_out(dynamo: bool) -> None:
    network = read(made(Text), dynamo=dynamo)
    layout = find(network)
    found = branch(layout, "layers.1.attention: heads")
    assert found.bias is not None
    assert network.nodes[found.bias[0]].inputs[found.bias[1]] == "layers.1.attention.out.bias"
    assert [network.nodes[index].op for index in found.scale] == ["Mul"]
    assert is_affine(layout, "layers.1.attention: heads")


def test_neurons_have_no_scale(tmp_path: Path) -> None:
    network = read_any(export(made(Text), tmp_path / "text.onnx"))
    layout = find(network)
    found = branch(layout, "layers.0.mlp: neurons")
    assert found.scale == ()
    assert found.bias is not None
    assert network.nodes[found.bias[0]].inputs[found.bias[1]] == "layers.0.mlp.down.bias"
    assert is_affine(layout, "layers.0.mlp: neurons")


def test_channels_pass_through_a_batch_norm() -> None:
    network = read(made(Image), dynamo=False)
    layout = find(network)
    found = branch(layout, "stages.0.1: channels")
    assert found.bias == (layout.by_name["stages.0.1: channels"].sites[0].node, 2)
    assert [network.nodes[index].op for index in found.scale] == ["BatchNormalization"]
    assert is_affine(layout, "stages.0.1: channels")


def test_what_no_residual_add_follows_has_no_branch() -> None:
    layout = find(read(made(Text)))
    assert branches(layout.structure, layout.by_name["pooler: neurons"]) == (None,)
    products = branches(layout.structure, layout.by_name["layers.0.attention: qk-width"])
    assert products == (None,)  # no weight consumes them


class Rolled(torch.nn.Module):
    """What is added is rotated, as shifted windows are; a second value is added to a product that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)
        self.wide, self.back = torch.nn.Linear(6, 12), torch.nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.roll(self.down(self.up(x).relu()), 2, 1)
        y = self.back(self.wide(x).relu())
        return x + y + y.tanh()


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_rotation_is_on_the_way_and_a_value_that_others_read_ends_it(dynamo: bool) -> None:
    from optin_deploy.network.read_torch import read_module

    network = read_module(Rolled().eval(), {"x": torch.randn(2, 8, 6)}, dynamo=dynamo)
    layout = find(network)
    name = "up: neurons" if "up: neurons" in layout.by_name else layout.groups[0].name
    found = branch(layout, name)
    assert [network.nodes[index].op for index in found.nodes].count("Slice") == 2
    assert is_affine(layout, name)
    assert branches(layout.structure, layout.groups[1]) == (None,)
