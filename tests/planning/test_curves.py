"""Error curves are what an own regression and a forward of the changed module give, of any product."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import read_module
from optin_deploy.planning import unit_curves as unit_curves_module
from optin_deploy.planning.curve import Curve, fitted_curve
from optin_deploy.planning.unit_curves import RIDGE, unit_curves
from optin_deploy.scoring.hearing import token_weights
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from support.own_regression import distance, images, inputs_of, judged_rows, ridge, texts
from support.tiny_networks import made
from support.tiny_scoring import (
    BARE_BERT,
    BERT,
    LAYERS,
    SWIGLU,
    VIT,
    Batch,
    Family,
    bare_bert,
    bert,
    dinov2,
    one_thread,
    vit,
)

pytestmark = pytest.mark.usefixtures("by_torchscript")

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


Case = tuple[nn.Module, Family, list[Batch]]
CASES: dict[str, Callable[[], Case]] = {
    "bert: post-LN": lambda: (bert(), BERT, texts()),
    "bare bert: no logits": lambda: (bare_bert(), BARE_BERT, texts()),
    "vit: pre-LN": lambda: (vit(), VIT, images()),
    "dinov2: gated FFN": lambda: (dinov2(gated=True), SWIGLU, images()),
}


Measured = list[tuple[list[int], list[float]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """What is measured of each group in turn: counts and errors."""
    found: Measured = []

    def noted(counts: list[int], errors: list[float], expected: np.ndarray, order: tuple[int, ...]) -> Curve:
        found.append((counts, errors))
        return fitted_curve(counts, errors, expected, order)

    monkeypatch.setattr(unit_curves_module, "fitted_curve", noted)
    return found


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("case", CASES)
def test_every_point_is_an_own_regression_and_a_forward_of_the_changed_model(
    case: str, kind: str, measured: Measured
) -> None:
    model, family, batches = CASES[case]()
    subject = Subject.make(find(read(model)))
    generator = torch.Generator().manual_seed(0)
    random = {
        group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in subject.layout.groups
    }
    found = unit_curves(subject, random, batches, kinds=(kind,))
    groups = [group for group in subject.layout.groups if group.kind == kind][:LAYERS]
    for layer, group in enumerate(groups):
        path, order = family.columns(layer, kind, 0)[0], found[group.name].order
        a = np.concatenate(inputs_of(model, path, judged_rows(batches, False)))
        counts, told = measured[layer]
        errors = []
        for count in counts:
            kept = [c for unit in sorted(order[:count]) for c in family.columns(layer, kind, unit)[1]]
            cut = [c for c in range(a.shape[1]) if c not in kept]
            changed = copy.deepcopy(model)
            linear = changed.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            weight = linear.weight.detach().numpy().copy()
            w, b = ridge(a[:, kept], a[:, cut] @ weight[:, cut].T, RIDGE)
            weight[:, kept] += w.T
            weight[:, cut] = 0
            linear.weight.data, linear.bias.data = torch.tensor(weight), linear.bias.data + torch.tensor(b)
            errors.append(distance(changed, model, judged_rows(batches, True)))
        assert max(errors) > 1e-6, "the branch matters"
        assert (counts[0], found[group.name].counts[-1]) == (0, group.units)
        np.testing.assert_allclose(told, errors, rtol=1e-6, atol=1e-12)


class Convolved(nn.Module):
    """Channels that a strided convolution reads, with a BatchNorm behind it and a second output that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.other, self.last = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pooled = self.norm(self.second(self.first(x).relu())).relu().mean((2, 3))
        return {"logits": self.head(pooled), "more": self.last(self.other(pooled).tanh())}


def test_a_convolution_is_solved_for_patches_of_the_dense_network(measured: Measured) -> None:
    module = made(Convolved).double()
    x = torch.randn(24, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    subject = Subject.make(find(read_module(module, {"x": x}, dynamo=False)))
    group, other = (next(g for g in subject.layout.groups if g.units == units) for units in (8, 7))
    scores = {each.name: torch.arange(each.units).double() for each in (group, other)}
    found = unit_curves(subject, scores, [{"x": x[:10]}, {"x": x[10:]}])
    assert found.keys() == scores.keys()
    assert set(found[other.name].errors) == {0.0}, "what is compared does not hear of it"
    judged = torch.arange(24) % 4 == 3
    flat = module.second.weight.detach().flatten(1)
    with torch.no_grad():
        patches = nn.functional.unfold(module.first(x[~judged]).relu(), 3, padding=1, stride=2).transpose(1, 2)
        dense = module(x[judged])["logits"].log_softmax(-1)
    ((counts, told),) = measured
    errors = []
    for count in counts:
        kept = [9 * channel + tap for channel in sorted(found[group.name].order[:count]) for tap in range(9)]
        cut = [column for column in range(72) if column not in kept]
        a, y = (values.flatten(0, 1).numpy() for values in (patches[..., kept], patches[..., cut] @ flat[:, cut].T))
        centred = a - a.mean(0)
        spread = np.sqrt(RIDGE * centred.var(0).mean() * len(a)) if kept else 0.0
        left = np.concatenate([centred, spread * np.eye(len(kept))])
        right = np.concatenate([y - y.mean(0), np.zeros((len(kept), 6))])
        w = np.linalg.lstsq(left, right, rcond=None)[0] if kept else np.zeros((0, 6))
        changed = copy.deepcopy(module)
        with torch.no_grad():
            narrow = torch.zeros_like(flat)
            narrow[:, kept] = flat[:, kept] + torch.from_numpy(w).T
            changed.second.weight.copy_(narrow.view(6, 8, 3, 3))
            scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
            changed.norm.bias += scale * torch.from_numpy(y.mean(0) - a.mean(0) @ w)
            after = changed(x[judged])["logits"].log_softmax(-1)
        errors.append(float((dense.exp() * (dense - after)).sum(-1).mean()))
    np.testing.assert_allclose(told, errors, rtol=1e-6, atol=1e-12)
    assert errors[0] > 1e-5


def test_a_curve_is_a_power_of_what_is_expected_and_without_units_as_measured() -> None:
    order, expected = tuple(range(200)), np.linspace(1, 0, 201) ** 3
    curve = fitted_curve([0, 25, 75, 150], [9.0, *(0.5 * expected[[25, 75, 150]] ** 1.25)], expected, order)
    assert (curve.counts[0], curve.counts[-1], curve.order) == (0, 200, order)
    inside = np.array(curve.counts[1:-1])
    np.testing.assert_allclose(curve.errors[1:-1], 0.5 * expected[inside] ** 1.25, rtol=1e-9)
    assert curve.errors[0] == 9
    assert len(curve.counts) < 70
    noisy = fitted_curve([0, 25, 75, 150], [0.0, 0.9, 1.1, 0.0], expected, order)
    assert noisy.errors[0] == max(noisy.errors) > 0.5, "never rises, though nothing was lost without units"
    one = fitted_curve([0, 1], [2.0, 0.5], np.array([4.0, 1.0, 0.0]), (1, 0))
    assert (one.counts, one.errors) == ((0, 1, 2), (2.0, 0.5, 0.0))
    idle = fitted_curve([0, 1], [0.0, 0.0], np.zeros(3), (0, 1))
    np.testing.assert_allclose(idle.errors, 0, atol=1e-12)


def test_values_that_take_too_much_memory_are_computed_again_and_give_the_same() -> None:
    model, _, batches = CASES["bert: post-LN"]()
    subject = Subject.make(find(read(model)))
    scores = {group.name: torch.arange(group.units).double() for group in subject.layout.groups}
    weights = token_weights(subject, batches)
    one, other, plain = (
        unit_curves(subject, scores, batches, kinds=("neurons",), token_weights=each, budget_bytes=budget)
        for each, budget in ((weights, None), (weights, 0), (None, None))
    )
    assert {subject.layout.by_name[name].kind for name in one} == {"neurons"}
    for name, curve in one.items():
        np.testing.assert_allclose(curve.errors, other[name].errors, rtol=1e-8)
    assert any(not np.allclose(curve.errors, plain[name].errors, rtol=1e-3) for name, curve in one.items())


def test_too_few_samples_are_refused() -> None:
    model, _, batches = CASES["vit: pre-LN"]()
    subject = Subject.make(find(read(model)))
    with pytest.raises(BadInput, match="too few"):
        unit_curves(subject, {}, [{"pixel_values": batches[0]["pixel_values"][:3]}])
