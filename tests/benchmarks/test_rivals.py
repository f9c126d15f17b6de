"""The rival scores equal independent arithmetic: finite differences, norms and |w * dw| of weights found by hand."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.scoring.rivals import (
    KINDS,
    RIVALS,
    Importance,
    Loss,
    Rival,
    fisher,
    magnitude,
    random,
    torch_pruning_taylor,
)
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.network.read import read
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from support.tiny_models import tiny_batches, tiny_model
from support.tiny_scoring import (
    BARE_BERT,
    BERT,
    DINOV2,
    HEADS,
    HIDDEN,
    LAYERS,
    NEURONS,
    Batch,
    Family,
    bare_bert,
    bert,
    dinov2,
    image_batch,
    one_thread,
    rows,
    state_of,
    text_batch,
)

pytestmark = pytest.mark.usefixtures("by_torchscript")

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

TEXT = [
    {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    for batch in (text_batch((3, 7, 5)), text_batch((6, 2), padding=1, seed=1))
]
LABELS = [torch.tensor([0, 2, 1]), torch.tensor([2, 0])]
IMAGES = [image_batch(2), image_batch(1, seed=1)]
INPUTS = {
    BERT: {
        "heads": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "neurons": ("intermediate.dense",),
    },
    DINOV2: {"heads": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "neurons": ("mlp.fc1",)},
}
"""Input projections inside a block, written down by hand."""
INPUTS[BARE_BERT] = INPUTS[BERT]


def cross_entropy(output: Any, index: int) -> Tensor:
    return nn.functional.cross_entropy(output["logits"], LABELS[index], reduction="none")


def first_token(output: Any, index: int) -> Tensor:
    """A loss for models without logits: how far the first token's state is from a fixed direction."""
    states: Tensor = output["last_hidden_state"][:, 0]
    return (states - torch.linspace(-1, 1, states.shape[1], dtype=states.dtype)).square().mean(1)


Case = tuple[Any, Family, list[Batch], Loss]
CASES: dict[str, Callable[[], Case]] = {
    "bert, 3 classes": lambda: (bert(), BERT, TEXT, cross_entropy),
    "bert, states": lambda: (bare_bert(), BARE_BERT, TEXT, first_token),
    "dinov2, states": lambda: (dinov2(), DINOV2, IMAGES, first_token),
}


@cache
def made(name: str) -> Case:
    return CASES[name]()


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


@pytest.fixture(params=RIVALS, name="rival")
def _rival(request: pytest.FixtureRequest) -> Rival:
    if request.param.startswith("torch_pruning"):
        pytest.importorskip("torch_pruning")
    return RIVALS[request.param]


@pytest.fixture(name="taylor")
def _taylor() -> Rival:
    pytest.importorskip("torch_pruning")
    return torch_pruning_taylor


# --- the independent implementation ---------------------------------------------------------------------------


def places(model: Any) -> list[tuple[str, int, int]]:
    """(kind, layer, unit) of all units, in the order of `flat`."""
    neurons = model.config.intermediate_size if hasattr(model.config, "intermediate_size") else HIDDEN
    return [(k, i, u) for k, n in (("heads", HEADS), ("neurons", neurons)) for i in range(LAYERS) for u in range(n)]


def weights_of(model: nn.Module, family: Family, kind: str, layer: int, unit: int) -> list[tuple[Tensor, list[int]]]:
    """The weights that belong to a unit, each with the unit along dim 0, and the unit's places there."""
    path, columns = family.columns(layer, kind, unit)
    inputs = [f"{family.blocks}.{layer}.{name}" for name in INPUTS[family][kind]]
    output, *others = (model.get_parameter(f"{each}.weight").detach() for each in (path, *inputs))
    return [(output.T, columns), *((weight, columns) for weight in others)]


@cache
def subject(model: nn.Module) -> Subject:
    """Made once: no test changes a model afterwards."""
    return Subject.make(find(read(model)))


def flat(found: Importance) -> Tensor:
    """In the order of `places`; a pooler is none of the layers that these tests know."""
    kinds = ([values for name, values in found.items() if kind in name and "layer" in name] for kind in KINDS)
    return torch.cat([values for some in kinds for values in some])


def same(a: Importance, b: Importance) -> bool:
    return torch.equal(flat(a), flat(b))


# --- all rivals -----------------------------------------------------------------------------------------------


def test_every_rival_scores_every_unit_above_zero_in_float64(rival: Rival, case: Case) -> None:
    model, _, batches, loss = case
    scored = subject(model)
    found = rival(model, scored, batches, loss)
    assert {n: len(v) for n, v in found.items()} == {g.name: g.units for g in scored.layout.groups if g.kind in KINDS}
    assert len(flat(found)) == len(places(model))
    for values in found.values():
        assert values.dtype == torch.float64
        assert not values.requires_grad
        assert bool(torch.isfinite(values).all())
        assert bool((values > 0).all())


@pytest.mark.parametrize("training", [False, True])
def test_no_rival_changes_the_model_nor_needs_anything_of_its_state(rival: Rival, training: bool) -> None:
    model = bert()
    scored = subject(model)
    expected = rival(model, scored, TEXT, cross_entropy)
    model.train(training)
    model.bert.embeddings.requires_grad_(False)
    before = state_of(model)
    with torch.no_grad():
        found = rival(model, scored, TEXT, cross_entropy)
    assert state_of(model) == before
    assert same(found, expected), "dropout, frozen weights and no_grad of the caller do not matter"


@pytest.mark.parametrize("name", ["fisher", "torch_pruning_taylor"])
def test_the_model_is_left_as_it_was_after_an_error_too(name: str) -> None:
    if name == "torch_pruning_taylor":
        pytest.importorskip("torch_pruning")
    model = bert()
    before = state_of(model)

    def broken(output: Any, index: int) -> Tensor:
        if index:
            raise ValueError("labels of another task")
        return cross_entropy(output, index)

    with pytest.raises(ValueError, match="another task"):
        RIVALS[name](model, subject(model), TEXT, broken)
    assert state_of(model) == before


@pytest.mark.parametrize(("kind", "unit"), [("heads", 1), ("neurons", 4)])
@pytest.mark.parametrize("name", ["magnitude", "fisher", "torch_pruning_taylor"])
def test_a_dead_unit_scores_zero(name: str, kind: str, unit: int) -> None:
    if name == "torch_pruning_taylor":
        pytest.importorskip("torch_pruning")
    model = bert()
    # Columns of the output projection alone make it dead, except for the norm of all weights.
    for weight, at in weights_of(model, BERT, kind, 1, unit)[: None if name == "magnitude" else 1]:
        weight[at] = 0
    scores = flat(RIVALS[name](model, subject(model), TEXT, cross_entropy))
    assert [place for place, score in zip(places(model), scores, strict=True) if score == 0] == [(kind, 1, unit)]


# --- one by one -----------------------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_all_weights_of_the_unit(case: Case) -> None:
    model, family, batches, loss = case
    expected = [
        sum(float(weight[at].square().sum()) for weight, at in weights_of(model, family, *place)) ** 0.5
        for place in places(model)
    ]
    found = flat(magnitude(model, subject(model), batches, loss))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_magnitude_counts_the_gate_of_a_gated_feed_forward() -> None:
    model = tiny_model("dinov2-swiglu")
    mlp = model.encoder.layer[2].mlp
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1)  # (neurons, 3 * hidden)
    found = magnitude(model, subject(model), [], first_token)
    (neurons,) = (values for name, values in found.items() if "neurons" in name and "layer.2" in name)
    torch.testing.assert_close(neurons, weights.double().norm(dim=1), rtol=1e-6, atol=0)


def test_random_scores_depend_on_seed_and_layout_alone() -> None:
    one, other = bert(), bert(seed=5)
    first = random(one, subject(one), TEXT, cross_entropy, seed=3)
    assert same(first, random(other, subject(other), [], first_token, seed=3))
    assert not same(first, random(one, subject(one), TEXT, cross_entropy, seed=4))
    assert same(
        RIVALS["random"](one, subject(one), [], first_token), random(one, subject(one), [], first_token, seed=0)
    )
    assert len(flat(first).unique()) == LAYERS * (HEADS + NEURONS)


def test_fisher_is_the_squared_derivative_of_each_samples_loss_by_finite_differences(case: Case) -> None:
    model, family, batches, loss = case
    step = 1e-5
    expected = torch.zeros(len(places(model)), dtype=torch.float64)
    for at, (kind, layer, unit) in enumerate(places(model)):
        path, columns = family.columns(layer, kind, unit)
        sides = []
        for scale in (1 + step, 1 - step):
            bent = copy.deepcopy(model)
            with torch.no_grad():
                bent.get_parameter(f"{path}.weight")[:, columns] *= scale
                sides.append(torch.cat([loss(bent(**batch), index) for index, batch in enumerate(batches)]))
        expected[at] = ((sides[0] - sides[1]) / (2 * step)).square().sum()
    found = flat(fisher(model, subject(model), batches, loss))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_fisher_keeps_samples_apart_whatever_the_batches() -> None:
    model = bert()
    scored = subject(model)
    together = flat(fisher(model, scored, TEXT, cross_entropy))
    singles = [rows(batch, [i]) for batch in TEXT for i in range(len(batch["input_ids"]))]
    labels = torch.cat(LABELS)

    def one_label(output: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], labels[index : index + 1], reduction="none")

    alone = [
        flat(fisher(model, scored, [single], lambda o, _, i=i: one_label(o, i))) for i, single in enumerate(singles)
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(together, flat(fisher(model, scored, singles, one_label)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_torch_prunings_taylor_is_the_sum_of_w_dw_of_the_channels_over_the_mean_of_the_layer(
    taylor: Rival, case: Case, attention: str
) -> None:
    model, family, batches, loss = case
    model.set_attn_implementation(attention)
    found = flat(taylor(model, subject(model), batches, loss))
    twin = copy.deepcopy(model)
    torch.stack([loss(twin(**batch), index).sum() for index, batch in enumerate(batches)]).sum().backward()
    products = copy.deepcopy(model)
    for product, weight in zip(products.parameters(), twin.parameters(), strict=True):
        product.data = weight.detach() * (torch.zeros(()) if weight.grad is None else weight.grad)
    raw = {
        place: sum(float(w[at].abs().sum()) for w, at in weights_of(products, family, *place))
        for place in places(model)
    }
    expected = []
    for kind, layer, unit in raw:
        group = [value for (k, i, _), value in raw.items() if (k, i) == (kind, layer)]
        expected.append(raw[kind, layer, unit] * len(group) / sum(group))
    # torch-pruning adds up a group in float32.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["vit", "distilbert+head", "roberta", "dinov2-swiglu"])
def test_torch_pruning_groups_the_same_layers_as_the_layout(taylor: Rival, name: str) -> None:
    model = tiny_model(name)

    def loss(output: Any, index: int) -> Tensor:
        return next(iter(output.values())).flatten(1).square().mean(1)

    for name, values in taylor(model, subject(model), tiny_batches(model), loss).items():
        assert "layer" not in name or bool((values > 0).all())  # a ReLU behind them may be dead
        assert float(values.mean()) == pytest.approx(1, rel=1e-5)


def test_a_group_of_other_layers_than_the_layouts_is_refused(taylor: Rival) -> None:
    model = bert()
    scored = subject(model)
    first = next(group for group in scored.layout.groups if group.kind == "heads")
    without = tuple(part for part in first.slices if "query" not in part.weight)
    others = [group for group in scored.layout.groups if group is not first]
    layout = replace(scored.layout, groups=(replace(first, slices=without), *others))
    with pytest.raises(BadInput, match=r"4 layers with weights where the layout has 3"):
        taylor(model, replace(scored, layout=layout), TEXT, cross_entropy)


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = bert()
    with pytest.raises(MissingDependency, match=r"optin-deploy\[peers\]"):
        torch_pruning_taylor(model, subject(model), TEXT, cross_entropy)
