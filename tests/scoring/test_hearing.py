"""Token weights equal norms of Jacobians by autograd through the whole module."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optin_deploy.network.read import read
from optin_deploy.scoring.hearing import FLOOR, token_weights
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from support.tiny_scoring import BERT, VIT, Batch, Family, bert, image_batch, one_thread, padded, rows, text_batch, vit

pytestmark = pytest.mark.usefixtures("by_torchscript")

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

LENGTHS = (3, 7, 5, 9)
Case = tuple[nn.Module, Family, Batch]


def text(*, padding: int = 0) -> Batch:
    batch = text_batch(LENGTHS, padding=padding)
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


EXACT: dict[str, Callable[[], Case]] = {
    "3 classes": lambda: (bert(), BERT, text()),
    "2 classes, 3 layers": lambda: (bert(labels=2, layers=3), BERT, text()),
    "regression": lambda: (bert(labels=1), BERT, text()),
    "images": lambda: (vit(), VIT, image_batch(4)),
}
DRAWN: dict[str, Callable[[], Case]] = {
    "6 classes": lambda: (bert(labels=6), BERT, text()),
    "images, 6 classes": lambda: (vit(labels=6), VIT, image_batch(4)),
}


def measured(model: nn.Module, batches: list[Batch]) -> list[tuple[Tensor, ...]]:
    """Of the stream behind each block, in their order."""
    subject = Subject.make(find(read(model)))
    found = token_weights(subject, batches)
    assert found is not None
    ends = [feature.value for feature in subject.features][1::2]  # behind both branches of a block
    return [found.of[value] for value in ends]


def by_jacobian(model: nn.Module, family: Family, batch: Batch) -> list[list[Tensor]]:
    """[block][sample]: weights of its real tokens, from the curvature of the output distance written out."""
    blocks = list(model.get_submodule(family.blocks).children())
    found: list[list[Tensor]] = [[] for _ in blocks]
    for i in range(len(next(iter(batch.values())))):
        one = rows(batch, [i])
        real = one["attention_mask"][0].bool() if "attention_mask" in one else slice(None)
        states: list[Tensor] = []

        def keep(module: nn.Module, args: object, out: Tensor, states: list[Tensor] = states) -> None:
            states.append(out)

        hooks = [block.register_forward_hook(keep) for block in blocks]
        out = model(**one)
        for hook in hooks:
            hook.remove()
        y, p = out.logits[0], out.logits[0].detach().softmax(0)
        curvature = torch.eye(1).double() if len(y) == 1 else (torch.diag(p) - torch.outer(p, p)) / 2
        slopes = [torch.autograd.grad(value, states, retain_graph=True) for value in y]
        for block, weights in enumerate(found):
            jacobian = torch.stack([slope[block][0] for slope in slopes])[:, real]  # (outputs, tokens, hidden)
            norms = torch.einsum("cth,cd,dth->t", jacobian, curvature, jacobian).clamp(min=0).sqrt()
            weights.append(FLOOR + (1 - FLOOR) * norms / norms.mean())
    return found


def check(case: Case, rtol: float, least: float = 0) -> None:
    model, family, batch = case
    wanted = by_jacobian(model, family, batch)
    assert max(float(w.max()) for w in wanted[0]) > 1.2, "tokens differ"
    for (weights,), samples in zip(measured(model, [batch]), wanted, strict=False):
        for i, expected in enumerate(samples):
            real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones(weights.shape[1]) > 0
            np.testing.assert_allclose(weights[i, real].numpy(), expected.numpy(), rtol=rtol, atol=least)
            assert not weights[i, ~real].any(), "padding counts nothing"


@pytest.mark.parametrize("name", EXACT)
def test_few_outputs_give_the_norm_of_the_curvature_exactly(name: str) -> None:
    check(EXACT[name](), 1e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_of_many_outputs_random_directions_come_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.scoring.hearing.PROBES", 500)
    check(DRAWN[name](), 0.15, 0.02)


def test_padding_and_other_batches_change_nothing() -> None:
    model = bert()
    (alone,), *_ = measured(model, [text()])
    (wide, other), *_ = measured(model, [padded(text(), 3), text()])
    np.testing.assert_allclose(wide[:, : max(LENGTHS)], alone, rtol=1e-6)
    np.testing.assert_allclose(other, alone, rtol=1e-6)
