"""The order in which units go is what trying every unit with an own regression gives, and metrics are own Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optin_deploy.common.regression import Moments
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import read_module
from optin_deploy.planning.curve import RIDGE
from optin_deploy.planning.removal import Use, metrics, removal
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from optin_deploy.structure.solvable import solvable
from support.own_regression import texts
from support.tiny_networks import made
from support.tiny_scoring import bert, one_thread

pytestmark = pytest.mark.usefixtures("by_torchscript")

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


def loss(x: np.ndarray, weight: np.ndarray, metric: np.ndarray, kept: list[int]) -> float:
    """What the outputs lose, with a ridge, if the columns kept are solved for: by least squares on the rows."""
    x = x - x.mean(0)
    spread = np.sqrt(RIDGE * x.var(0).mean() * len(x))
    rows = np.concatenate([x, spread * np.eye(x.shape[1])])
    cut = [column for column in range(x.shape[1]) if column not in kept]
    lost = rows[:, cut] @ weight[:, cut].T
    left = lost - rows[:, kept] @ np.linalg.lstsq(rows[:, kept], lost, rcond=None)[0] if kept else lost
    return float(np.einsum("ro,op,rp->", left, metric, left)) / len(x)


@pytest.mark.parametrize("others", [0, 4], ids=["alone", "beside columns of no unit"])
@pytest.mark.parametrize("columns", [1, 3], ids=["neurons", "heads of three"])
def test_the_unit_goes_first_whose_loss_costs_least_among_all(columns: int, others: int) -> None:
    rng, units = np.random.default_rng(0), 6
    many = units * columns + others
    both = []
    for outputs in (4, 5):  # two products use them
        x = rng.standard_normal((90, many)) @ rng.standard_normal((many,) * 2) + 3
        root = rng.standard_normal((2, outputs))
        both.append((x, rng.standard_normal((outputs, many)), root.T @ root))
    unit = rng.permutation([*np.repeat(np.arange(units), columns), *[-1] * others])
    uses = []
    for x, weight, metric in both:
        moments = Moments(many, 0)
        moments.add(torch.tensor(x), torch.zeros(len(x), 0))
        some = (torch.tensor(each) for each in (weight, metric))
        uses.append(Use.make(*some, moments, torch.tensor(unit), centred=True))
    left, expected, spent, before = list(range(units)), [], [], 0.0
    while left:
        costs = [
            sum(loss(*use, [c for c in range(many) if unit[c] in {*left, -1} - {each}]) for use in both)
            for each in left
        ]
        expected.append(left.pop(int(np.argmin(costs))))
        spent.append(min(costs) - before)
        before = min(costs)
    found = removal(uses, torch.rand(units))
    assert list(found.order) == expected[::-1]
    assert found.costs[units] == 0
    np.testing.assert_allclose(np.diff(found.costs[::-1]), spent, rtol=1e-6)
    moved = [float(weight.diagonal() @ weight.diagonal()) for _, weight, _ in both]
    assert len(set(moved)) == 2, "the cases differ"


def test_what_is_there_twice_goes_before_what_is_there_once_and_equals_go_by_score() -> None:
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[:, :1]], dim=1)
    moments, weight = Moments(4, 0), torch.tensor([[4.0, 1.0, 2.0, 4.0]]).double()
    moments.add(x, x[:, :0])
    use = Use.make(weight, torch.eye(1).double(), moments, torch.arange(4), centred=True)
    order = removal([use], torch.zeros(4)).order
    assert {order[0], order[3]} == {0, 3}, "one of the two that move the output most: the other says what it says"
    assert order[1:3] == (2, 1)
    silent = Use(torch.zeros(1, 4).double(), torch.eye(4).double(), torch.arange(4))
    assert removal([silent], torch.tensor([2.0, 1.0, 3.0, 0.0])).order == (2, 0, 1, 3)


class Mixed(nn.Module):
    """Two products in a row, of a classifier of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.second(self.first(x).relu()).tanh())}


def test_metrics_are_second_moments_of_the_jacobian_of_the_divergence() -> None:
    module = made(Mixed).double()
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    subject = Subject.make(find(read_module(module, {"x": x}, dynamo=False)))
    group = next(g for g in subject.layout.groups if g.units == 8)
    linear = solvable(subject.structure, group.sites[0].node).linear
    found = metrics(subject, [{"x": x[:30]}, {"x": x[30:]}], [linear])[linear.gives]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in x:
        given = module.second(module.first(row).relu()).detach()
        slope = torch.autograd.functional.jacobian(lambda z: module.head(z.tanh()), given)  # (2, 6)
        p = module.head(given.tanh()).softmax(0).detach()
        expected += slope.T @ (torch.diag(p) - torch.outer(p, p)) @ slope / 2
    torch.testing.assert_close(found, expected / 40, rtol=1e-9, atol=1e-12)
    assert float(found.abs().max()) > 1e-4


class Joined(nn.Module):
    """A convolution that reads channels of two others, 8 and 4 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
        self.last, self.head = nn.Conv2d(12, 5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = torch.cat([self.one(x).relu(), self.other(x).tanh()], 1)
        return {"logits": self.head(self.last(both).mean((2, 3)))}


def test_channels_beside_those_of_another_group_are_ordered_while_the_others_stay() -> None:
    module = made(Joined).double()
    with torch.no_grad():
        module.one.weight[3], module.one.bias[3] = 0, -1
    x = torch.randn(32, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    subject = Subject.make(find(read_module(module, {"x": x}, dynamo=False)))
    scores = {group.name: torch.zeros(group.units) for group in subject.layout.groups}
    curves = unit_curves(subject, scores, [{"x": x}])
    first, other = (next(c for name, c in curves.items() if len(c.order) == units) for units in (8, 4))
    assert sorted(other.order) == list(range(4))
    assert sorted(first.order) == list(range(8))
    assert first.order[-1] == 3, "it says nothing"


def test_curves_keep_units_in_an_order_of_their_own() -> None:
    subject, batches = Subject.make(find(read(bert()))), texts()
    groups = [group for group in subject.layout.groups if group.kind == "neurons"]
    scores = {group.name: torch.arange(group.units).double() for group in groups}
    curves = unit_curves(subject, scores, batches)
    for group in groups:
        assert sorted(curves[group.name].order) == list(range(group.units))
        assert curves[group.name].order != tuple(range(group.units))[::-1], "not that of the scores"
