"""The peer's rearrangement and tuning are what an enumeration and a plain least-squares fit give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import kwon
from benchmarks.accuracy.kwon import DAMPING, rearranged, tuned
from benchmarks.scoring.rivals import groups_of, mask_gradients
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.planning.widths import Keep
from optin_deploy.pruning.networks import find_in
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.groups import UnitGroup
from support.tiny_scoring import BERT, HEADS, HIDDEN, NEURONS, bert, one_thread, text_batch

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

BATCHES = [
    {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    for batch in (text_batch((3, 7, 5, 6)), text_batch((6, 2, 8), padding=1, seed=1))
]
LABELS = [torch.tensor([0, 2, 1, 1]), torch.tensor([2, 0, 1])]


def loss(outputs: object, index: int) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], LABELS[index], reduction="none")  # type: ignore[index]


@pytest.fixture(scope="module", name="subject")
def _subject() -> Subject:
    return Subject.make(find_in(bert()).layout)


def group_of(subject: Subject, layer: int, kind: str) -> UnitGroup:
    """Of a block, written down by the order of work: heads, neurons, heads, neurons."""
    found = [group for group in groups_of(subject) if group.name in bypassed(subject.layout)]
    assert [group.kind for group in found] == ["heads", "neurons"] * 2
    return found[2 * layer + (kind == "neurons")]


def joint(gradients: Tensor, removed: tuple[int, ...]) -> float:
    return float(gradients[:, list(removed)].sum(1).square().sum())


@pytest.mark.parametrize("kept", range(NEURONS + 1))
def test_rearranged_units_keep_the_count_and_are_no_worse_than_the_cheapest(subject: Subject, kept: int) -> None:
    gradients = mask_gradients(subject, BATCHES, loss)
    names = [group_of(subject, layer, "neurons").name for layer in (0, 1)]
    found = rearranged({name: tuple(range(kept)) for name in names}, gradients)
    assert list(found) == names
    for name in names:
        assert len(found[name]) == kept
        g = gradients[name]
        removed = tuple(u for u in range(NEURONS) if u not in found[name])
        cheapest = tuple(g.square().sum(0).argsort().tolist()[: NEURONS - kept])
        least = min(joint(g, some) for some in itertools.combinations(range(NEURONS), NEURONS - kept))
        assert least - 1e-12 <= joint(g, removed) <= joint(g, cheapest) + 1e-12


def tune(subject: Subject, keep: Keep, *, first_token: bool = False, teacher: Keep | None = None) -> dict[str, Tensor]:
    """Matrices of output projections that differ from the stored ones, by the torch names of their modules."""
    network = tuned(subject, keep, BATCHES, teacher=teacher or {}, first_token=first_token)
    found = {}
    for layer, kind in itertools.product((0, 1), ("heads", "neurons")):
        name = f"{BERT.columns(layer, kind, 0)[0]}.weight"
        value = torch_tensor(network.weights[name])
        if not torch.equal(value, stored(subject, name)):
            found[name] = value
    return found


def stored(subject: Subject, name: str) -> Tensor:
    return torch_tensor(subject.structure.network.weights[name])


def inputs_of(subject: Subject, layer: int, kind: str, rows: str) -> np.ndarray:
    """What an output projection reads in the dense network: of real tokens, or of the first of each text."""
    group = group_of(subject, layer, kind)
    site = next(site for site in group.sites if site.with_weight)
    name = subject.structure.network.nodes[site.node].inputs[site.place]
    found = []
    for batch in BATCHES:
        with torch.no_grad():
            value = Program(subject.structure.network)(batch, watch=[name]).watched[name].flatten(2)
        found.append(value[:, 0] if rows == "first" else value[batch["attention_mask"].bool()])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_first_tuned_branch_is_a_damped_least_squares_fit(subject: Subject, kind: str, first_token: bool) -> None:
    """Before it both streams are equal: the kept units' outputs make up for those that went."""
    units = HEADS if kind == "heads" else NEURONS
    kept = (0, 2) if kind == "heads" else (1, 3, 4)
    found = tune(subject, {group_of(subject, 1, kind).name: kept}, first_token=first_token)
    name = f"{BERT.columns(1, kind, 0)[0]}.weight"
    weight = stored(subject, name)
    assert weight.shape[0] == HIDDEN
    first = first_token and kind == "neurons"  # of the last block alone
    rows = torch.tensor(inputs_of(subject, 1, kind, "first" if first else "real"))
    outputs = [
        (rows[:, columns] @ weight[:, columns].T).flatten().numpy()
        for unit in range(units)
        for columns in [BERT.columns(1, kind, unit)[1]]
    ]
    left = np.stack([outputs[u] for u in kept], 1)
    lost = sum(outputs[u] for u in range(units) if u not in kept)
    if kind == "heads":  # and a number that is added everywhere; it starts at 1, as the factors
        left, lost = np.column_stack([left, np.ones(len(left))]), lost - 1
    system = np.concatenate([left.T @ left, DAMPING * np.eye(left.shape[1])])
    factors = 1 + np.linalg.lstsq(system, np.concatenate([left.T @ lost, np.zeros(left.shape[1])]), rcond=None)[0]
    assert abs(factors[: len(kept)] - 1).max() > 0.01, "there is something to make up for"
    for factor, unit in zip(factors[: len(kept)], kept, strict=True):
        columns = BERT.columns(1, kind, unit)[1]
        np.testing.assert_allclose(found[name][:, columns], factor * weight[:, columns], rtol=1e-3)


def test_the_heads_of_the_first_layer_and_emptied_branches_are_not_tuned(subject: Subject) -> None:
    keep = {group_of(subject, 0, "heads").name: (0,), group_of(subject, 1, "heads").name: ()}
    found = tune(subject, {**keep, group_of(subject, 0, "neurons").name: ()})
    assert set(found) == {f"{BERT.columns(1, 'neurons', 0)[0]}.weight"}


def test_tuning_ends_at_the_first_factor_that_is_too_large(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = {group_of(subject, layer, "neurons").name: (1, 3) for layer in (0, 1)}
    assert len(tune(subject, keep)) == 3
    monkeypatch.setattr(kwon, "LARGEST", 1e-3)
    assert tune(subject, keep) == {}


def test_the_teacher_may_be_pruned_itself(subject: Subject) -> None:
    """Where teacher and student are the same network, there is nothing to tune but the number that starts at 1."""
    keep = {group_of(subject, 0, "neurons").name: (1, 3, 4)}
    name = f"{BERT.columns(0, 'neurons', 0)[0]}.weight"
    same = tune(subject, keep, teacher=keep)
    kept = [BERT.columns(0, "neurons", unit)[1][0] for unit in (1, 3, 4)]
    if name in same:
        np.testing.assert_allclose(same[name][:, kept], stored(subject, name)[:, kept], rtol=1e-6)
    assert not torch.allclose(tune(subject, keep)[name][:, kept], stored(subject, name)[:, kept])
