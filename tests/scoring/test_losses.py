"""Distances, directions, Grams and noise equal what their formulas say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.scoring import losses as losses_module
from optin_deploy.scoring.features import draw_tokens, trajectory_distance
from optin_deploy.scoring.losses import (
    FEW_CLASSES,
    Readout,
    exact_directions,
    output_distance,
    random_direction,
)
from optin_deploy.scoring.noise import drawn, sample_keys, signs, stream, uniform_order
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.settings import PAPER, Features
from support.oracle_scoring import drawn_tokens, key_of, signs_of, splitmix, stream_of
from support.tiny_scoring import Batch, image_batch, one_thread, padded, rows, text_batch

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def readout(kind: Any, values: Tensor, valid: Tensor | None = None) -> Readout:
    return Readout(kind, values, torch.ones(values.shape[:2]).to(values) if valid is None else valid.to(values))


# --- what an output is compared by ----------------------------------------------------------------------------


def test_real_tokens_come_first_wherever_the_padding_is() -> None:
    logits, right, left = randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]), torch.zeros(2, 4)
    turned = torch.zeros_like(logits)
    for i, count in enumerate((2, 3)):
        left[i, -count:] = 1
        turned[i, -count:] = logits[i, :count]
    read = [Reading("y", "logits").read({"y": x}, v) for x, v in ((logits, right), (turned, left))]
    for found in read:
        assert found.valid.tolist() == right.tolist()
        for i, count in enumerate((2, 3)):
            assert torch.equal(found.values[i, :count], logits[i, :count])


def test_embeddings_are_the_unit_mean_of_real_tokens() -> None:
    states = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
    found = Reading("y", "embedding").read({"y": states}, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found.values, torch.tensor([[[0.6, 0.8]]]))


def test_distances_are_those_of_the_definition() -> None:
    def distance(kind: Any, dense: Tensor, moved: Tensor) -> list[list[float]]:
        return output_distance(readout(kind, dense), moved).tolist()

    one = torch.tensor([[[1.0, 0.0]]])
    assert distance("embedding", one, torch.tensor([[[0.0, 2.0]]])) == [[5.0]]
    assert distance("regression", one, torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])) == [[9.0], [1.0]]
    even, skewed = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, math.log(3.0)]]])  # (1/2, 1/2), (1/4, 3/4)
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert distance("logits", even, skewed) == [[pytest.approx(wanted, rel=1e-6)]]
    assert distance("logits", skewed, skewed) == [[0]]


def test_a_distance_over_tokens_is_the_mean_over_the_real_ones() -> None:
    dense, moved = randn(2, 3, 4), randn(2 * 2, 3, 4, seed=1)
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]])
    p, q = dense.repeat(2, 1, 1).softmax(2), moved.softmax(2)
    each = (p * (p / q).log()).sum(2)
    wanted = [[float(each[2 * t + i, :count].mean()) for i, count in enumerate((2, 3))] for t in range(2)]
    found = output_distance(readout("logits", dense, valid), moved)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_in_float32_the_divergence_of_a_small_change_is_not_lost_in_the_rounding_of_log_p() -> None:
    logits = randn(8, 1, 5).float()
    moved = logits + 1e-4 * randn(8, 1, 5, seed=1).float()
    p, q = (x.double().softmax(2) for x in (logits, moved))
    wanted = (p * (p / q).log()).sum((1, 2))
    assert 1e-10 < float(wanted.min()) < float(wanted.max()) < 1e-7
    found = output_distance(readout("logits", logits), moved)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=0)


# --- directions -----------------------------------------------------------------------------------------------

CONFIDENT = [[0.0, 40.0, -40.0, 3.0], [300.0, 0.0, 0.0, 0.0], [-900.0, -1800.0, 0.0, 900.0], [0.0, 0.0, 200.0, 200.0]]


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_less_than_classes_gives_the_curvature_of_kl_exactly(classes: int, dtype: torch.dtype) -> None:
    logits = torch.cat([3 * randn(9, 4), torch.tensor(CONFIDENT, dtype=torch.float64), torch.zeros(1, 4)])[:, :classes]
    found = exact_directions(readout("logits", logits.unsqueeze(1).to(dtype)))
    assert found is not None
    assert len(found) == classes - 1
    directions = torch.stack(found, 1).squeeze(2)  # (samples, directions, classes)
    assert bool(torch.isfinite(directions).all())
    p = logits.softmax(1)
    others = (p.unsqueeze(1) * (1 - torch.eye(classes))).sum(2)  # 1 - p without its rounding
    wanted = (torch.diag_embed(p * others) - p.unsqueeze(2) * p.unsqueeze(1) * (1 - torch.eye(classes))) / 2
    directions = directions.double()
    spread = wanted.diagonal(dim1=1, dim2=2).sqrt()
    error = (directions.mT @ directions - wanted).abs()
    limit, least = (1e-12, 1e-300) if dtype == torch.float64 else (1e-5, 1e-34)
    assert bool((error <= limit * spread.unsqueeze(2) * spread.unsqueeze(1) + least).all())


def test_two_classes_give_the_textbook_direction() -> None:
    (found,) = exact_directions(readout("logits", torch.tensor([[[0.3, 1.1]]], dtype=torch.float64))) or ()
    p = 1 / (1 + math.exp(0.8))
    wanted = math.sqrt(p * (1 - p) / 2)
    assert (found.abs() - wanted).abs().max() < 1e-12
    assert float(found.sum()) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("targets", [1, 2, FEW_CLASSES])
def test_regression_looks_along_each_target(targets: int) -> None:
    found = exact_directions(readout("regression", randn(3, 1, targets))) or []
    torch.testing.assert_close(torch.stack(found, 2).squeeze(1), torch.eye(targets).double().expand(3, -1, -1))


def test_many_classes_tokens_and_embeddings_have_no_exact_directions() -> None:
    for kind, shape in (("logits", (2, 1, FEW_CLASSES + 1)), ("logits", (2, 3, 2)), ("embedding", (2, 1, 3))):
        assert exact_directions(readout(kind, randn(*shape))) is None
    assert exact_directions(readout("logits", randn(2, 1, FEW_CLASSES))) is not None


@pytest.mark.parametrize("kind", ["logits", "regression", "embedding"])
def test_over_all_signs_the_mean_outer_product_of_random_directions_is_the_curvature(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, width = 2 * randn(1, 2, 5), 5
    every = torch.tensor(list(itertools.product((1.0, -1.0), repeat=2 * width)), dtype=torch.float64)
    monkeypatch.setattr(losses_module, "signs", lambda *args, like: every.view(-1, 2, width))
    repeated = readout(kind, logits.expand(len(every), -1, -1))
    found = random_direction(repeated, (), 0).flatten(1)
    metric = torch.eye(width, dtype=torch.float64).expand(2, -1, -1)
    if kind == "logits":
        p = logits[0].softmax(1)
        metric = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 2
    wanted = torch.block_diag(*metric) / 2  # the mean over two positions
    torch.testing.assert_close(found.T @ found / len(found), wanted, rtol=1e-10, atol=1e-15)


def test_random_directions_leave_padding_out_and_are_finite_for_certain_classes() -> None:
    certain = torch.tensor([[[300.0, 0, 0, 0, 0], [0, -300.0, 0, 300.0, 1], [1, 2, 3, 4, 5]]])
    for dtype in (torch.float32, torch.float64):
        found = random_direction(readout("logits", certain.to(dtype), torch.tensor([[1, 1, 0]])), [1], 2)
        assert bool(torch.isfinite(found).all())
        assert float(found[0, 2].abs().max()) == 0


# --- features -------------------------------------------------------------------------------------------------


def test_grams_hold_cosines_over_the_token_count_and_zeros_for_padding() -> None:
    features = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [5.0, 5.0]]])
    batch = {"input_ids": torch.tensor([[7, 8, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    tokens = draw_tokens(Features(), batch, batch["attention_mask"].float(), 0)
    wanted = torch.tensor([[[0.5, 0.4, 0.0], [0.4, 0.5, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(tokens.gram(features), wanted)
    torch.testing.assert_close(tokens.gram(torch.cat([features, 2 * features])), wanted.repeat(2, 1, 1))
    assert tokens.weight == 1


def test_the_trajectory_distance_is_summed_over_layers_for_each_unit_and_sample() -> None:
    dense = [torch.eye(2)[None].repeat(2, 1, 1)] * 2
    moved = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = trajectory_distance(dense, [torch.cat([moved, moved]), torch.cat([dense[0], 3 * dense[0]])])
    assert found.tolist() == [[5.0, 0.0], [13.0, 8.0]]


def left(batch: Batch) -> Batch:
    """The same text with its padding in front."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}


@pytest.mark.parametrize("count", [None, 2, 4, 6, 99])
def test_the_same_tokens_are_compared_in_the_same_order_wherever_the_padding_is(count: int | None) -> None:
    batch = text_batch((3, 6, 5))
    for other in (batch, padded(batch, 2), left(batch), left(padded(batch, 3))):
        words = other["input_ids"].unsqueeze(-1).double()
        tokens = draw_tokens(Features(tokens=count), other, other["attention_mask"].double(), 4)
        groups = words if tokens.places is None else words.reshape(-1, 1)[tokens.places]
        for i, length in enumerate((3, 6, 5)):
            shown = [w for w, real in zip(groups[i, :, 0].tolist(), tokens.valid[i].tolist(), strict=True) if real]
            pick = range(length) if count is None else drawn_tokens(count, 4)(batch, i)
            assert shown == batch["input_ids"][i, list(pick)].tolist()
            assert tokens.valid[i].tolist() == sorted(tokens.valid[i].tolist(), reverse=True), "real ones first"


def test_every_token_is_drawn_about_equally_often() -> None:
    batch = text_batch((8,))
    drawn_at = [draw_tokens(Features(tokens=2), batch, torch.ones(1, 8), seed).places for seed in range(400)]
    counts = torch.stack([places.flatten() for places in drawn_at if places is not None]).flatten().bincount()
    assert counts.sum() == 800
    assert float((counts - 100).abs().max()) < 4 * math.sqrt(400 * 1 / 4 * 3 / 4)


def test_features_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown --features 'attention'; possible: block, ffn"):
        Features("attention")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--tokens 1: possible are 2 to"):
        Features(tokens=1)
    with pytest.raises(BadInput, match="give their number"):
        Features(across=True)
    assert (PAPER.site, PAPER.tokens, PAPER.across) == ("ffn", 768, True)


# --- noise ----------------------------------------------------------------------------------------------------


def test_the_reference_of_these_tests_is_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    state, found = 1234567, []
    for _ in range(3):
        state = (state + golden) % 2**64
        found.append(splitmix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # as published


@pytest.mark.parametrize("number", [0, 5, -1, -(2**63), 2**63 - 1])
def test_signs_equal_those_of_plain_integers(number: int) -> None:
    keys = (0, 1, 2**48 - 1, 123456789)
    found = signs(keys, number, 3, 130, like=torch.zeros(1))
    assert found.dtype == torch.float32
    for row, key in enumerate(keys):
        assert torch.equal(found[row].double(), signs_of(key, number % 2**64, 3, 130))


def test_streams_and_keys_equal_their_hashes() -> None:
    assert stream(3, "layer 1", 2) % 2**64 == stream_of(3, "layer 1", 2)
    assert -(2**63) <= stream(3, "layer 1", 2) < 2**63
    batch = text_batch((3, 6))
    assert sample_keys(batch) == tuple(key_of(rows(batch, [i])) for i in range(2))
    assert sample_keys(batch) == sample_keys(padded(batch, 2)) == sample_keys(left(batch))
    images = image_batch(2)
    assert sample_keys(images) == tuple(key_of(rows(images, [i])) for i in range(2))


def test_more_rows_columns_or_samples_leave_the_others_as_they_were() -> None:
    like = torch.zeros(1)
    base = signs((5, 6), 9, 4, 70, like=like)
    assert torch.equal(signs((5, 6), 9, 7, 200, like=like)[:, :4, :70], base)
    assert torch.equal(signs((8, 6, 5), 9, 4, 70, like=like)[[2, 1]], base)


def test_signs_are_balanced_and_independent_across_rows_samples_and_streams() -> None:
    draws = [signs((1, 2, 3), stream(seed, name, 0), 4, 4096, like=torch.zeros(1)) for seed in (0, 1) for name in "ab"]
    series = torch.cat(draws).flatten(0, 1)  # (48, 4096)
    assert set(series.flatten().tolist()) == {-1.0, 1.0}
    limit = 4.5 / math.sqrt(4096)
    assert float(series.mean(1).abs().max()) < limit
    products = series @ series.T / 4096 - torch.eye(len(series))
    assert float(products.abs().max()) < limit
    shifted = [(series[:, shift:] * series[:, :-shift]).mean(1).abs().max() for shift in (1, 8, 64)]
    assert max(map(float, shifted)) < limit
    square = signs((7,), 11, 64, 64, like=torch.zeros(1))[0]
    assert abs(float((square * square.T).triu(1).sum())) < 4.5 * math.sqrt(64 * 63 / 2), "not symmetric"


def test_orders_are_random_and_grow_without_a_change() -> None:
    found = uniform_order((1, 2), 3, 500, CPU)
    assert torch.equal(uniform_order((1, 2), 3, 900, CPU)[:, :500], found)
    ranks = found.argsort(1).argsort(1).double()
    mixed = torch.cat([ranks, torch.arange(500).double()[None]])
    assert float((torch.corrcoef(mixed) - torch.eye(3)).abs().max()) < 4.5 / math.sqrt(500)


def test_drawn_rows_are_those_with_the_keys_each_once_and_whole() -> None:
    many = text_batch((4, 2, 3, 5, 1, 4))
    batches = [rows(many, [0, 1]), padded(rows(many, [2, 3]), 2), rows(many, [4, 5]), rows(many, [3, 0])]
    keys = sample_keys(many)
    for chosen in ([0], [1, 3], [5, 2, 0], list(range(6))):
        found = drawn(batches, [keys[i] for i in chosen])
        assert sorted(key for batch in found for key in sample_keys(batch)) == sorted(keys[i] for i in chosen)
        assert all(batch.keys() == many.keys() for batch in found)
        assert len(found) <= 2, "rows of one width share a batch"
    assert drawn(batches, []) == []


def test_other_names_in_a_batch_are_drawn_along() -> None:
    batch = {**text_batch((3, 3, 3)), "token_type_ids": torch.arange(9).view(3, 3)}
    (found,) = drawn([batch], sample_keys(batch)[1:])
    assert found["token_type_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("count", [None, 3])
def test_the_gradient_of_a_gram_is_autograds(count: int | None) -> None:
    batch = text_batch((4, 6, 2), seed=3)
    valid = batch["attention_mask"].double()
    tokens = draw_tokens(Features(tokens=count), batch, valid, 0)
    features = randn(3, 6, 5, seed=1).requires_grad_()
    gram = tokens.gram(features)
    weights = [randn(*gram.shape, seed=seed) for seed in (2, 3)]
    with torch.no_grad():
        found = tokens.pulled(features, weights)
    for each, weight in zip(found, weights, strict=True):
        (expected,) = torch.autograd.grad(gram, features, weight, retain_graph=True)
        torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-12)
        assert bool(each.any())
