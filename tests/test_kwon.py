"""The peer's rearrangement and tuning are what an enumeration and a plain least-squares fit give."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from test_compensate import projection_inputs
from tiny_scoring import BERT, HEADS, HIDDEN, NEURONS, bert, one_thread, state_of, text_batch
from torch import Tensor, nn

from benchmarks.accuracy import kwon
from benchmarks.accuracy.kwon import DAMPING, rearranged, tuned
from benchmarks.scoring.rivals import mask_gradients
from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import Weights
from optin_deploy.plan import Masks, PruningPlan

Kept = tuple[tuple[int, ...], ...]

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

BATCHES = [text_batch((3, 7, 5, 6)), text_batch((6, 2, 8), padding=1, seed=1)]
LABELS = [torch.tensor([0, 2, 1, 1]), torch.tensor([2, 0, 1])]


def loss(output: object, index: int) -> Tensor:
    return nn.functional.cross_entropy(output.logits, LABELS[index], reduction="none")  # type: ignore[attr-defined]


def joint(gradients: Tensor, removed: tuple[int, ...]) -> float:
    return float(gradients[:, list(removed)].sum(1).square().sum())


@pytest.mark.parametrize("kept", range(NEURONS + 1))
def test_a_rearranged_mask_keeps_the_count_and_is_no_worse_than_the_cheapest_units(kept: int) -> None:
    model = bert()
    layout = resolve(model)
    gradients = mask_gradients(model, layout, BATCHES, loss)
    neurons = tuple(kept > u for u in range(NEURONS))
    masks = rearranged(Masks(((True,) * HEADS,) * 2, (neurons,) * 2, layout.hash), layout, gradients)
    assert masks.heads == ((True,) * HEADS,) * 2
    for layer, keep in zip(layout.layers, masks.neurons, strict=True):
        assert sum(keep) == kept
        g = gradients[layer.ffn]
        removed = tuple(u for u in range(NEURONS) if not keep[u])
        cheapest = tuple(g.square().sum(0).argsort().tolist()[: NEURONS - kept])
        least = min(joint(g, some) for some in itertools.combinations(range(NEURONS), NEURONS - kept))
        assert least - 1e-12 <= joint(g, removed) <= joint(g, cheapest) + 1e-12


def test_gradients_are_finite_differences_of_the_loss() -> None:
    model = bert()
    layout = resolve(model)
    gradients = mask_gradients(model, layout, BATCHES, loss)
    path, columns = BERT.columns(1, "neurons", 4)
    step = 1e-6
    found = []
    for sign in (1, -1):
        changed = copy.deepcopy(model)
        changed.get_parameter(f"{path}.weight").data[:, columns] *= 1 + sign * step
        with torch.no_grad():
            found.append(torch.cat([loss(changed(**batch), i) for i, batch in enumerate(BATCHES)]))
    np.testing.assert_allclose(gradients[layout.layers[1].ffn][:, 4], (found[0] - found[1]) / (2 * step), atol=1e-7)


WHOLE = ((tuple(range(HEADS)),) * 2, (tuple(range(NEURONS)),) * 2)


def plan_of(model: nn.Module, heads: Kept = WHOLE[0], neurons: Kept = WHOLE[1]) -> PruningPlan:
    return PruningPlan(heads, neurons, resolve(model).hash, 100, 60, 10, 8)


def tune(model: nn.Module, plan: PruningPlan, *, first_token: bool = False, teacher: Masks | None = None) -> Weights:
    layout = resolve(model)
    teacher = teacher or Masks.all_kept(layout)
    return tuned(model, layout, plan, BATCHES, teacher=teacher, first_token=first_token)


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_first_tuned_branch_is_a_damped_least_squares_fit(kind: str, first_token: bool) -> None:
    """Before it both streams are equal: the kept units' outputs make up for those that went."""
    model = bert()
    before = state_of(model)
    units = HEADS if kind == "heads" else NEURONS
    kept = (0, 2) if kind == "heads" else (1, 3, 4)
    heads, neurons = ((WHOLE[0][0], kept), WHOLE[1]) if kind == "heads" else (WHOLE[0], (WHOLE[1][0], kept))
    plan = plan_of(model, heads, neurons)
    found = tune(model, plan, first_token=first_token)
    assert state_of(model) == before
    path, _ = BERT.columns(1, kind, 0)
    weight = model.get_parameter(f"{path}.weight").detach()
    rows = projection_inputs(model, path, BATCHES)
    if first_token and kind == "neurons":  # of the last block alone
        lengths = [int(n) for batch in BATCHES for n in batch["attention_mask"].sum(1)]
        rows = [np.concatenate(rows)[np.cumsum([0, *lengths[:-1]])]]
    rows = torch.tensor(np.concatenate(rows))
    outputs = [
        (rows[:, columns] @ weight[:, columns].T).flatten().numpy()
        for unit in range(units)
        for columns in [BERT.columns(1, kind, unit)[1]]
    ]
    left = np.stack([outputs[u] for u in kept], 1)
    lost = sum(outputs[u] for u in range(units) if u not in kept)
    if kind == "heads":  # and a number that is added everywhere; it starts at 1, as the factors
        left, lost = np.column_stack([left, np.ones(len(left))]), lost - 1
    normal, right = left.T @ left, left.T @ lost
    system = np.concatenate([normal, DAMPING * np.eye(len(normal))])
    factors = 1 + np.linalg.lstsq(system, np.concatenate([right, np.zeros(len(right))]), rcond=None)[0]
    assert abs(factors[: len(kept)] - 1).max() > 0.01, "there is something to make up for"
    for factor, unit in zip(factors[: len(kept)], kept, strict=True):
        columns = BERT.columns(1, kind, unit)[1]
        np.testing.assert_allclose(found[f"{path}.weight"][:, columns], factor * weight[:, columns], rtol=1e-3)
    assert found[f"{path}.weight"].shape == weight.shape
    assert weight.shape[0] == HIDDEN


def test_the_heads_of_the_first_layer_and_emptied_branches_are_not_tuned() -> None:
    model = bert()
    found = tune(model, plan_of(model, heads=((0,), ()), neurons=((), (1, 2))))
    assert set(found) == {f"{BERT.columns(1, 'neurons', 0)[0]}.weight"}


def test_tuning_ends_at_the_first_factor_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    plan = plan_of(model, neurons=((1, 3), (1, 3)))
    assert len(tune(model, plan)) == 3
    monkeypatch.setattr(kwon, "LARGEST", 1e-3)
    assert tune(model, plan) == {}


def test_the_teacher_may_be_pruned_itself() -> None:
    """Where teacher and student are the same model, there is nothing to tune."""
    model = bert()
    plan = plan_of(model, neurons=((1, 3, 4), (0, 2)))
    same = plan.masks(resolve(model))
    path = BERT.columns(0, "neurons", 0)[0]
    for name, weight in tune(model, plan, teacher=same).items():
        if name == f"{path}.weight":
            np.testing.assert_allclose(weight, model.get_parameter(name).detach(), rtol=1e-9)
    assert not torch.allclose(tune(model, plan)[f"{path}.weight"], model.get_parameter(f"{path}.weight"))
