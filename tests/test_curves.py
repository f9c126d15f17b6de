"""Error curves are what masking a branch, an own ridge regression and a plain forward give; nothing is left changed."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from test_compensate import CASES as COMPENSATED
from test_compensate import Case, centred_ridge, counts_of, images, projection_inputs, repeated, texts
from tiny_scoring import (
    BARE_BERT,
    BERT,
    HEADS,
    LAYERS,
    NEURONS,
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
from optin_deploy.curves import RIDGE, Curve, Curves, error_curves
from optin_deploy.errors import BadInput
from optin_deploy.scoring import Scores

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


CASES = {**COMPENSATED, "bare bert: no logits": lambda: (bare_bert(), BARE_BERT, NEURONS, texts)}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def scores_of(model: nn.Module, seed: int = 0) -> Scores:
    layout = resolve(model)
    generator = torch.Generator().manual_seed(seed)

    def random(units: int) -> Tensor:
        return torch.rand(units, generator=generator, dtype=torch.float64)

    heads, neurons = (tuple(random(getattr(layer, kind)) for layer in layout.layers) for kind in ("heads", "neurons"))
    return Scores(heads, neurons, layout.hash, {})


def measured(model: nn.Module, batches: list[Batch]) -> Curves:
    return error_curves(model, resolve(model), scores_of(model), batches)


def judged_rows(batches: list[Batch], judged: bool, every: int) -> list[Batch]:
    """Every so many-th sample over all batches, or the others, one a batch."""
    singles = [rows(batch, [i]) for batch in batches for i in range(len(next(iter(batch.values()))))]
    return [one for i, one in enumerate(singles) if (i % every == every - 1) is judged]


def distance(model: nn.Module, dense: nn.Module, batches: list[Batch]) -> float:
    """Mean over samples of KL, or of the squared distance of unit mean states."""
    found = []
    for batch in batches:
        with torch.no_grad():
            before, after = dense(**batch), model(**batch)
        if "logits" in before:
            p, q = before.logits.log_softmax(-1)[0], after.logits.log_softmax(-1)[0]
            found.append(float((p.exp() * (p - q)).sum()))
        else:
            mask = batch.get("attention_mask", torch.ones(before.last_hidden_state.shape[:2]))[0].bool()
            a, b = (x.last_hidden_state[0][mask].mean(0) for x in (before, after))
            found.append(float((a / a.norm() - b / b.norm()).square().sum()))
    return float(np.mean(found))


@pytest.mark.parametrize(("kind", "most", "at_once"), [("heads", 128, 32), ("neurons", 128, 2), ("neurons", 3, 2)])
def test_every_point_equals_an_own_regression_and_a_forward_of_the_changed_model(
    case: Case, kind: str, most: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optin_deploy.judging.MOST_JUDGED", most)
    monkeypatch.setattr("optin_deploy.judging.JUDGED_BATCH", at_once)
    model, family, neurons, data = case
    batches, units = data(0), HEADS if kind == "heads" else neurons
    every = max(4, math.ceil(sum(len(next(iter(batch.values()))) for batch in batches) / most))
    assert 0 < len(judged_rows(batches, True, every)) <= most
    curves, scores = measured(model, batches), scores_of(model)
    for layer in range(LAYERS):
        curve, order = getattr(curves, kind)[layer], getattr(scores, kind)[layer].argsort(descending=True).tolist()
        errors = []
        for count in curve.counts[:-1]:
            changed = copy.deepcopy(model)
            path = family.columns(layer, kind, 0)[0]
            linear = changed.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            kept = [c for unit in sorted(order[:count]) for c in family.columns(layer, kind, unit)[1]]
            a = np.concatenate(projection_inputs(model, path, judged_rows(batches, False, every)))
            weight = linear.weight.detach().numpy().copy()
            target = a @ weight.T + linear.bias.detach().numpy()
            narrow = np.zeros_like(weight)
            if kept:
                narrow[:, kept], bias = centred_ridge(a[:, kept], target, weight[:, kept], RIDGE)
            else:
                bias = target.mean(0)
            linear.weight.data, linear.bias.data = torch.tensor(narrow), torch.tensor(bias)
            errors.append(distance(changed, model, judged_rows(batches, True, every)))
        assert max(errors) > 1e-6, "the branch matters"
        assert curve.counts[-1] == units
        assert curve.errors[-1] == 0
        np.testing.assert_allclose(curve.errors[:-1], np.minimum.accumulate(errors), rtol=1e-6, atol=1e-12)


def test_the_fit_weighs_tokens() -> None:
    """A token of weight 3 counts as three tokens; here of the last block's neurons, none of them kept."""
    model, batches = bert(), texts(0)
    weights, counts = counts_of(batches, LAYERS)
    curve = error_curves(model, resolve(model), scores_of(model), batches, token_weights=weights).neurons[-1]
    changed, path = copy.deepcopy(model), BERT.columns(LAYERS - 1, "neurons", 0)[0]
    times = [n for i, n in enumerate(counts[-1]) if i % 4 != 3]
    a = np.concatenate(repeated(projection_inputs(model, path, judged_rows(batches, False, 4)), times))
    linear = changed.get_submodule(path)
    linear.bias.data = torch.tensor(a @ linear.weight.detach().numpy().T).mean(0) + linear.bias.data
    linear.weight.data = torch.zeros_like(linear.weight)
    assert curve.errors[0] == pytest.approx(distance(changed, model, judged_rows(batches, True, 4)), rel=1e-6)


def test_texts_without_a_mask_and_images_of_other_sizes_are_never_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = ({name: x for name, x in text_batch((n,) * 8, seed=n).items() if "mask" not in name} for n in (4, 9))
    for model, batches in ((bert(), [short, long]), (dinov2(), [image_batch(8), image_batch(8, size=12)])):
        found = measured(model, batches)
        with monkeypatch.context() as patched:
            patched.setattr("optin_deploy.judging.JUDGED_BATCH", 1)
            apart = measured(model, batches)
        for one, other in zip(found.neurons, apart.neurons, strict=True):
            np.testing.assert_allclose(one.errors, other.errors, rtol=1e-8, atol=1e-14)


def test_padding_and_batching_do_not_enter() -> None:
    model, batches = bert(), texts(0)
    merged = [{name: torch.cat([padded(b, 2)[name] for b in batches]) for name in batches[0]}]
    for a, b in zip(measured(model, batches).neurons, measured(model, merged).neurons, strict=True):
        np.testing.assert_allclose(a.errors, b.errors, rtol=1e-8, atol=1e-14)


def test_the_model_is_untouched_also_after_an_error(case: Case) -> None:
    model, family, _, data = case
    before = state_of(model)
    measured(model, data(0))
    assert state_of(model) == before
    calls = 0

    def fail(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise RuntimeError("in the middle")

    handle = model.get_submodule(family.columns(1, "neurons", 0)[0]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        measured(model, data(0))
    handle.remove()
    assert state_of(model) == before


def test_progress_counts_layers() -> None:
    model, seen = vit(), []
    error_curves(
        model, resolve(model), scores_of(model), images(0), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, LAYERS), (2, LAYERS)]


def test_too_few_samples_are_refused_with_what_is_needed() -> None:
    with pytest.raises(BadInput, match=r"3 calibration samples are too few .* at least 4"):
        measured(vit(), [image_batch(3)])


def test_curves_come_back_from_json_and_are_checked() -> None:
    model = vit()
    curves = measured(model, images(0))
    assert Curves.from_json(curves.to_json()) == curves
    curves.check(resolve(model))
    with pytest.raises(BadInput, match="another model"):
        curves.check(resolve(bert()))
    short = dataclasses.replace(curves, heads=curves.heads[:1])
    with pytest.raises(BadInput, match="another model"):
        short.check(resolve(model))


@pytest.mark.parametrize(
    ("counts", "errors"),
    [
        ((0,), (0.0,)),
        ((1, 4), (1.0, 0.0)),
        ((0, 4, 4), (2.0, 1.0, 0.0)),
        ((0, 4), (1.0, 0.5)),
        ((0, 2, 4), (1.0, 1.5, 0.0)),
        ((0, 4), (float("nan"), 0.0)),
        ((0, 4), (float("inf"), 0.0)),
        ((0, 2, 4), (1.0, 0.0)),
    ],
)
def test_what_is_no_curve_is_refused(counts: tuple[int, ...], errors: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="curve"):
        Curve(counts, errors)


def test_between_measured_widths_the_error_is_monotone_and_hits_the_measured_ones() -> None:
    curve = Curve((0, 96, 192, 768, 1536), (1.0, 0.3, 0.25, 0.01, 0.0))
    np.testing.assert_allclose(curve.at(curve.counts), curve.errors, atol=1e-15)
    between = curve.at(range(1537))
    assert (np.diff(between) <= 1e-15).all()
    assert between.min() >= 0
