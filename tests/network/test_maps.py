"""Spatial attention: the mean and the largest of all channels of a place stay those of all, where channels are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optin_deploy.cutting.graph import cut
from optin_deploy.network.read_torch import read_module
from optin_deploy.structure.find import find
from support.one_cut import run

KEPT = [0, 2, 3, 6]


class Attentive(nn.Module):
    """CBAM: channels are weighed by their sizes, then places by the mean and the largest of their channels."""

    def __init__(self, *, positive: bool, keepdim: bool) -> None:
        super().__init__()
        self.positive, self.keepdim = positive, keepdim
        self.first, self.weigh = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.places, self.last, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.rest(x.relu() if self.positive else x)

    def rest(self, x: Tensor) -> Tensor:
        x = x * self.weigh(x.mean((2, 3), keepdim=True)).sigmoid()
        if self.keepdim:
            mean, largest = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        else:
            mean, largest = x.mean(1).unsqueeze(1), x.amax(1).unsqueeze(1)
        x = x * self.places(torch.cat([largest, mean], 1)).sigmoid()
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_maps_of_channels_that_are_cut_are_those_of_masked_ones(dynamo: bool, keepdim: bool) -> None:
    torch.manual_seed(0)
    module, x = Attentive(positive=True, keepdim=keepdim).eval(), torch.randn(2, 3, 7, 7)
    network = read_module(module, {"x": x}, dynamo=dynamo)
    layout = find(network)
    group = next(group for group in layout.groups if group.units == 8)
    kept = torch.zeros(8, 1, 1)
    kept[KEPT] = 1
    with torch.no_grad():
        dense, masked = module(x), module.rest(module.first(x).relu() * kept)
    (found,) = run(network, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), dense)
    (found,) = run(cut(layout, {group.name: KEPT}), {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), masked)
    assert not torch.allclose(dense, masked, atol=1e-3)


def test_channels_that_may_be_negative_stay_whole_where_the_largest_is_taken() -> None:
    torch.manual_seed(0)
    module = Attentive(positive=False, keepdim=True).eval()
    layout = find(read_module(module, {"x": torch.randn(2, 3, 7, 7)}, dynamo=False))
    assert all(group.units != 8 for group in layout.groups)
    assert any(each.units == 8 and "ReduceMax" in each.why for each in layout.frozen)


class Normed(nn.Module):
    """A LayerNorm over channels that come first, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x - x.mean(1, keepdim=True)
        return self.last(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt())


def test_means_that_normalise_a_stream_stay_means() -> None:
    network = read_module(Normed().eval(), {"x": torch.randn(2, 3, 7, 7)}, dynamo=False)
    assert sum(node.op == "Conv" for node in network.nodes) == 2
    assert find(network).groups == ()
