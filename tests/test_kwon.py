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

from benchmarks.accuracy.kwon import DAMPING, rearranged, tuned
from benchmarks.scoring.rivals import mask_gradients
from optin_deploy.arch.resolve import resolve
from optin_deploy.plan import Masks, PruningPlan

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


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_first_tuned_branch_is_a_damped_least_squares_fit(kind: str) -> None:
    """Before it both streams are equal: the kept units' outputs make up for those that went."""
    model = bert()
    layout = resolve(model)
    before = state_of(model)
    units = HEADS if kind == "heads" else NEURONS
    kept = (0, 2) if kind == "heads" else (1, 3, 4)
    everything = tuple(range(HEADS)), tuple(range(NEURONS))
    heads, neurons = (kept, everything[1]) if kind == "heads" else (everything[0], kept)
    plan = PruningPlan((heads, everything[0]), (neurons, everything[1]), layout.hash, 100, 60, 10, 8)
    found = tuned(model, layout, plan, BATCHES)
    assert state_of(model) == before
    path, _ = BERT.columns(0, kind, 0)
    weight = model.get_parameter(f"{path}.weight").detach()
    rows = torch.tensor(np.concatenate(projection_inputs(model, path, BATCHES)))
    outputs = [
        (rows[:, columns] @ weight[:, columns].T).flatten().numpy()
        for unit in range(units)
        for columns in [BERT.columns(0, kind, unit)[1]]
    ]
    lost = sum(outputs[u] for u in range(units) if u not in kept)
    left = np.concatenate([np.stack([outputs[u] for u in kept], 1), DAMPING * np.eye(len(kept))])
    factors = 1 + np.linalg.lstsq(left, np.concatenate([lost, np.zeros(len(kept))]), rcond=None)[0]
    assert abs(factors - 1).max() > 0.01, "there is something to make up for"
    for factor, unit in zip(factors, kept, strict=True):
        columns = BERT.columns(0, kind, unit)[1]
        np.testing.assert_allclose(found[f"{path}.weight"][:, columns], factor * weight[:, columns], rtol=1e-9)
    assert found[f"{path}.weight"].shape == weight.shape
    assert weight.shape[0] == HIDDEN


def test_with_nothing_cut_tuning_changes_nothing() -> None:
    model = bert()
    layout = resolve(model)
    whole = PruningPlan((tuple(range(HEADS)),) * 2, (tuple(range(NEURONS)),) * 2, layout.hash, 100, 60, 10, 8)
    for name, weight in tuned(model, layout, whole, BATCHES).items():
        np.testing.assert_allclose(weight, model.get_parameter(name).detach(), rtol=1e-9)
