"""Token weights equal norms of Jacobians by autograd through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_scoring import (
    Batch,
    bare_bert,
    bert,
    dinov2,
    image_batch,
    one_thread,
    padded,
    rows,
    state_of,
    text_batch,
    vit,
)
from torch import Tensor, nn

from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import apply_weights, compensate
from optin_deploy.pruning import prune
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.token_weights import FLOOR, TokenWeights, measure_token_weights

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

LENGTHS = (3, 7, 5, 9)
Case = tuple[nn.Module, Batch]
EXACT: dict[str, Callable[[], Case]] = {
    "3 classes": lambda: (bert(), text_batch(LENGTHS)),
    "2 classes, 3 layers": lambda: (bert(labels=2, layers=3), text_batch(LENGTHS)),
    "regression": lambda: (bert(labels=1), text_batch(LENGTHS)),
    "images": lambda: (vit(), image_batch(4)),
}
DRAWN: dict[str, Callable[[], Case]] = {
    "6 classes": lambda: (bert(labels=6), text_batch(LENGTHS)),
    "images, 6 classes": lambda: (vit(labels=6), image_batch(4)),
}


def measured(model: nn.Module, batches: list[Batch], seed: int = 0) -> TokenWeights:
    found = measure_token_weights(model, resolve(model), batches, seed=seed)
    assert found is not None
    return found


def by_jacobian(model: nn.Module, batch: Batch) -> list[list[Tensor]]:
    """[layer][sample]: weights of its real tokens, from the curvature of the output distance written out."""
    paths = [layer.path for layer in resolve(model).layers]
    found: list[list[Tensor]] = [[] for _ in paths]
    for i in range(len(next(iter(batch.values())))):
        one = rows(batch, [i])
        real = one["attention_mask"][0].bool() if "attention_mask" in one else slice(None)
        states: list[Tensor] = []

        def keep(module: nn.Module, args: object, out: Tensor, states: list[Tensor] = states) -> None:
            states.append(out)

        hooks = [model.get_submodule(path).register_forward_hook(keep) for path in paths]
        out = model(**one)
        for hook in hooks:
            hook.remove()
        y, p = out.logits[0], out.logits[0].detach().softmax(0)
        curvature = torch.eye(1).double() if len(y) == 1 else (torch.diag(p) - torch.outer(p, p)) / 2
        slopes = [torch.autograd.grad(value, states, retain_graph=True) for value in y]
        for layer, weights in enumerate(found):
            jacobian = torch.stack([slope[layer][0] for slope in slopes])[:, real]  # (outputs, tokens, hidden)
            norms = torch.einsum("cth,cd,dth->t", jacobian, curvature, jacobian).clamp(min=0).sqrt()
            weights.append(FLOOR + (1 - FLOOR) * norms / norms.mean())
    return found


def assert_equal(found: TokenWeights, batch: Batch, wanted: list[list[Tensor]], rtol: float, least: float = 0) -> None:
    for [weights], samples in zip(found, wanted, strict=True):
        for i, expected in enumerate(samples):
            real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones(weights.shape[1]) > 0
            np.testing.assert_allclose(weights[i, real].numpy(), expected.numpy(), rtol=rtol, atol=least)
            assert not weights[i, ~real].any(), "padding counts nothing"


@pytest.mark.parametrize("name", EXACT)
def test_few_outputs_give_the_norm_of_the_curvature_exactly(name: str) -> None:
    model, batch = EXACT[name]()
    wanted = by_jacobian(model, batch)
    assert max(float(w.max()) for w in wanted[0]) > 1.2, "tokens differ"
    assert_equal(measured(model, [batch]), batch, wanted, 1e-7)


@pytest.mark.parametrize("name", DRAWN)
def test_of_many_outputs_random_directions_come_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.token_weights.PROBES", 500)
    model, batch = DRAWN[name]()
    assert_equal(measured(model, [batch]), batch, by_jacobian(model, batch), 0.15, 0.02)


def test_in_the_last_block_a_classifier_of_the_first_token_hears_no_other() -> None:
    *_, [last] = measured(bert(), [text_batch(LENGTHS)])
    for length, weights in zip(LENGTHS, last, strict=True):
        assert float(weights[0]) == pytest.approx(FLOOR + (1 - FLOOR) * length)
        np.testing.assert_allclose(weights[1:length].numpy(), FLOOR)


@pytest.mark.parametrize("model", [bare_bert(), dinov2()], ids=["texts", "images"])
def test_of_embeddings_all_tokens_count_the_same(model: nn.Module) -> None:
    batch = image_batch(4) if "dinov2" in model.config.model_type else text_batch(LENGTHS)
    assert measure_token_weights(model, resolve(model), [batch]) is None


@pytest.mark.parametrize("labels", [3, 6])
def test_padding_and_batching_do_not_enter(labels: int) -> None:
    model, batch = bert(labels=labels), text_batch(LENGTHS)
    apart = measured(model, [padded(rows(batch, [i]), 1) for i in range(len(LENGTHS))])
    for [whole], singles in zip(measured(model, [batch]), apart, strict=True):
        for row, single in zip(whole, singles, strict=True):
            np.testing.assert_allclose(row.numpy(), single[0, : len(row)].numpy(), rtol=1e-7, atol=1e-12)


def test_the_seed_draws_the_directions() -> None:
    model, batches = bert(labels=6), [text_batch(LENGTHS)]
    first, again, other = (measured(model, batches, seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)


def test_where_nothing_moves_the_output_real_tokens_count_the_same() -> None:
    model = bert()
    nn.init.zeros_(model.classifier.weight)
    batch = text_batch(LENGTHS)
    for [weights] in measured(model, [batch]):
        assert torch.equal(weights, batch["attention_mask"].to(weights))


def test_the_model_is_untouched() -> None:
    model = bert()
    before = state_of(model)
    measured(model, [text_batch(LENGTHS)])
    assert state_of(model) == before


def test_a_pruned_model_is_compensated_by_them() -> None:
    model, batches = bert(labels=6), [text_batch(LENGTHS, seed=seed) for seed in range(6)]
    pruned = prune(model, batches, flops=0.5, seq_len=9, align=1, seed=3)

    def compensated(weights: TokenWeights | None) -> dict[str, Tensor]:
        found = compensate(model, pruned.layout, pruned.plan, batches, token_weights=weights)
        return rewrite_torch(apply_weights(model, found), pruned.layout, pruned.plan).state_dict()

    found = pruned.model.state_dict()
    wanted, plain, other = (compensated(w) for w in (measured(model, batches, 3), None, measured(model, batches, 4)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for different in (plain, other):
        assert max(float((found[name] - different[name]).abs().max()) for name in different) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_weights(dtype: torch.dtype) -> None:
    """Slopes of a sure classifier are small: their squares would be 0 in float16."""
    model, batch = bert(), text_batch(LENGTHS)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
    exact = measured(model, [batch])
    for [found], [wanted] in zip(measured(model.to(dtype), [batch]), exact, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0.3, atol=0.05)


def test_large_batches_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = bert(), text_batch(LENGTHS)
    whole = measured(model, [batch])
    monkeypatch.setattr("optin_deploy.token_weights.ROWS", 3)
    for [parts], [weights] in zip(measured(model, [batch]), whole, strict=True):
        np.testing.assert_allclose(parts.numpy(), weights.numpy(), rtol=1e-7, atol=1e-12)
