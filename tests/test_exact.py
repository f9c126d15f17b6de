"""Exact scores equal one full forward per unit by zeroed weight columns, whatever is compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle_scoring import (
    CASES,
    TEXT,
    Case,
    case,
    cosines,
    drawn_tokens,
    flat,
    key_of,
    one_removed,
    real_tokens,
    simple_terms,
    stream_of,
    terms_of,
    watched,
    word,
)
from tiny_scoring import BERT, NEURONS, Batch, bert, one_thread, padded, rows, text_batch
from torch import Tensor

from optin_deploy.arch.resolve import resolve
from optin_deploy.masking import inference
from optin_deploy.scoring import PAPER, Features, Terms, exact_terms
from optin_deploy.scoring import exact as exact_module
from optin_deploy.scoring.exact import units_at_once
from optin_deploy.scoring.terms import attention_branches, ffn_branches

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


def run(model: Any, batches: Sequence[Batch], **options: Any) -> Terms:
    """All units."""
    layout = resolve(model)
    units = {b: range(b.units) for b in (*attention_branches(layout), *ffn_branches(layout))}
    with inference(model), torch.no_grad():
        return exact_terms(model, layout, batches, units, **options)


def sums_of(table: Tensor) -> Tensor:
    """Sums over samples of D, O, DD, OO and DO: (2, units, samples) -> (5, units)."""
    d, o = table
    return torch.stack([d, o, d * d, o * o, d * o]).sum(2)


@pytest.mark.parametrize("site", ["block", "ffn"])
@pytest.mark.parametrize("name", CASES)
def test_both_terms_and_their_second_moments_equal_one_full_forward_per_unit(name: str, site: Any) -> None:
    found = run(case(name).model, case(name).batches, features=Features(site))
    table = terms_of(name, site)
    assert found.samples == table.shape[2]
    torch.testing.assert_close(flat(found), sums_of(table), rtol=1e-7, atol=1e-20)
    assert float(table.sum(2).min()) > 1e-7, "every unit of the tiny model matters"


@pytest.mark.parametrize("name", ["3 classes", "embeddings", "images, 3 classes", "words"])
def test_in_float32_the_terms_agree_to_one_percent_of_themselves_plus_a_ten_thousandth_of_the_mean(name: str) -> None:
    wanted = sums_of(terms_of(name))[:2]
    single = [{k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in case(name).batches]
    found = flat(run(copy.deepcopy(case(name).model).float(), single))[:2]
    assert bool(((found - wanted).abs() <= 1e-2 * wanted + 1e-4 * wanted.mean(1, keepdim=True)).all())


# --- drawn tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "count"), [("block", 2), ("ffn", 4)])
@pytest.mark.parametrize("name", ["3 classes", "words", "images, 3 classes"])
def test_drawn_tokens_are_those_with_the_smallest_numbers_of_their_sample(name: str, site: Any, count: int) -> None:
    found = run(case(name).model, case(name).batches, features=Features(site, count), seed=3)
    table = simple_terms(case(name), site=site, pick=drawn_tokens(count, 3))
    torch.testing.assert_close(flat(found), sums_of(table), rtol=1e-7, atol=1e-20)
    assert not torch.allclose(flat(found)[0], sums_of(terms_of(name, site))[0], rtol=1e-3)


def test_drawing_as_many_tokens_as_there_are_compares_all() -> None:
    model = bert()
    for count in (7, 100):
        torch.testing.assert_close(
            flat(run(model, TEXT, features=Features(tokens=count))), flat(run(model, TEXT)), rtol=1e-9, atol=0
        )


def test_the_draw_depends_on_content_and_seed_alone() -> None:
    model, few = bert(), Features(tokens=3)
    base = flat(run(model, TEXT, features=few))
    others = [[padded(batch, 3) for batch in TEXT], [rows(TEXT[1], [1, 0]), *(rows(TEXT[0], [i]) for i in (2, 0, 1))]]
    for other in others:
        torch.testing.assert_close(flat(run(model, other, features=few)), base, rtol=1e-9, atol=0)
    assert not torch.allclose(flat(run(model, TEXT, features=few, seed=1)), base, rtol=1e-2)


# --- the paper's features: tokens of different samples in one Gram --------------------------------------------


def paper_sums(case: Case, count: int, seed: int) -> Tensor:
    """Batch by batch: Gram over tokens drawn from all samples, counted once for each of them; (units,)."""
    bent = copy.deepcopy(case)
    sums = torch.zeros(len(case.places()), dtype=torch.float64)
    with one_removed(bent) as remove:
        for batch in case.batches:
            size = len(batch["input_ids"])
            numbers = {}
            for i in range(size):
                key = key_of(rows(batch, [i]))
                for order, place in enumerate(real_tokens(batch, i)):
                    number = word(key, stream_of(seed, "tokens", 0), order)
                    numbers[i, place] = number - 2**64 if number >= 2**63 else number
            chosen = sorted(numbers, key=lambda at: numbers[at])[:count]

            def grams(model: Any, batch: Batch = batch, chosen: Any = chosen) -> list[Tensor]:
                with watched(model, case.family, "ffn") as states:
                    model(**batch)
                return [cosines(torch.stack([state[at] for at in chosen])) for state in states]

            dense = grams(case.model)
            for at, place in enumerate(case.places()):
                remove(place)
                pairs = list(zip(dense, grams(bent.model), strict=True))[place[1] :]
                sums[at] += size * sum(float((a - b).square().sum()) for a, b in pairs)
    return sums


@pytest.mark.parametrize("count", [6, 768])
def test_tokens_across_the_batch_are_compared_in_one_gram(count: int) -> None:
    found = flat(run(case("3 classes").model, TEXT, features=Features("ffn", count, across=True), seed=2))
    torch.testing.assert_close(found[0], paper_sums(case("3 classes"), count, 2), rtol=1e-7, atol=0)
    torch.testing.assert_close(found[1], terms_of("3 classes")[1].sum(1), rtol=1e-7, atol=0)
    assert Features("ffn", 768, across=True) == PAPER


def test_the_order_of_samples_in_a_batch_does_not_change_what_is_drawn_across_it() -> None:
    model, some = bert(), Features("ffn", 6, across=True)
    base = flat(run(model, TEXT, features=some))[:2]
    turned = [rows(TEXT[0], [2, 0, 1]), padded(rows(TEXT[1], [1, 0]), 2)]
    torch.testing.assert_close(flat(run(model, turned, features=some))[:2], base, rtol=1e-9, atol=0)
    apart = [rows(batch, [i]) for batch in TEXT for i in range(len(batch["input_ids"]))]
    assert not torch.allclose(flat(run(model, apart, features=some))[0], base[0], rtol=1e-2), "the batch matters"


# --- how the work is cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 7, 10**9])
@pytest.mark.parametrize("features", [Features(), Features("ffn", 3), PAPER], ids=["all", "some", "paper"])
def test_how_many_units_share_a_forward_changes_rounding_at_most(limit: int, features: Features) -> None:
    model = bert()
    torch.testing.assert_close(
        flat(run(model, TEXT, features=features, rows=limit)),
        flat(run(model, TEXT, features=features)),
        rtol=1e-9,
        atol=0,
    )


def test_as_many_units_share_a_forward_as_fill_it_within_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_module, "TOKENS_PER_FORWARD", {"cpu": 100})
    valid = torch.ones(3, 7)  # 21 tokens a unit
    assert [units_at_once(valid, limit) for limit in (None, 100, 12, 11, 6, 5, 1)] == [4, 4, 4, 3, 2, 1, 1]
    assert units_at_once(torch.ones(3, 700), None) == 1
    assert units_at_once(torch.ones(1, 6, device="meta"), None) == exact_module.MOST_TOKENS // 6


def test_a_limit_of_rows_holds_for_every_forward_under_a_mask() -> None:
    model, seen = bert(), []
    path = BERT.columns(1, "neurons", 0)[0]
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    try:
        run(model, TEXT, rows=7)
        assert max(seen) == 6  # 3 samples x 2 units, 2 samples x 3 units
    finally:
        hook.remove()


def test_terms_of_chosen_units_leave_the_others_at_zero() -> None:
    model = bert()
    layout = resolve(model)
    branch = layout.layers[1].ffn
    with inference(model), torch.no_grad():
        terms = exact_terms(model, layout, TEXT, {branch: [1, 4]})
    assert set(terms.sums) == {branch}
    assert terms.sums[branch].any(0).nonzero().flatten().tolist() == [1, 4]
    torch.testing.assert_close(
        terms.sums[branch][:, [1, 4]], sums_of(terms_of("3 classes")[:, [-5, -2]]), rtol=1e-7, atol=0
    )


def test_terms_of_disjoint_samples_add_up() -> None:
    model = bert()
    parts = [flat(run(model, [batch])) for batch in TEXT]
    torch.testing.assert_close(parts[0] + parts[1], flat(run(model, TEXT)), rtol=1e-12, atol=0)


def test_forwards_under_a_mask_start_at_the_units_own_layer() -> None:
    model = bert(layers=3)
    layout = resolve(model)
    calls = [0, 0, 0]
    hooks = [
        model.get_submodule(layer.ffn.output).register_forward_pre_hook(
            lambda m, a, i=i: calls.__setitem__(i, calls[i] + 1)
        )
        for i, layer in enumerate(layout.layers)
    ]
    with inference(model), torch.no_grad():
        exact_terms(model, layout, [text_batch((3, 2))], {layout.layers[1].ffn: range(NEURONS)}, rows=2)
    assert calls == [1, 1 + NEURONS, 1 + NEURONS]  # dense once, then one unit a forward
    for hook in hooks:
        hook.remove()


def test_progress_counts_units_on_batches() -> None:
    seen: list[tuple[int, int]] = []
    run(bert(), TEXT, rows=5, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {2 * 18}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (36, 36)
