"""`score` joins the terms as asked, tells how, depends on the samples alone, and leaves the model as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_scoring import TEXT, case, flat, key_of, terms_of
from tiny_scoring import BERT, Batch, bare_bert, bert, one_thread, padded, rows, state_of, text_batch
from torch import Tensor, nn

from optin_deploy.arch.resolve import resolve
from optin_deploy.errors import BadInput, NonFiniteActivation, PlanMismatch
from optin_deploy.masking import inference
from optin_deploy.scoring import PAPER, Features, Scores, ScoreSettings, exact_terms, score, sketch_terms

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

SCORERS = ("exact", "sketch")
HEADS = slice(0, 6)
"""Places of the heads among the 18 units of the tiny model; neurons of layer 0 and 1 follow."""


def scored(model: Any, batches: Sequence[Batch], **options: Any) -> Scores:
    return score(model, resolve(model), batches, ScoreSettings(**options))


def all_of(found: Scores) -> Tensor:
    return torch.cat((*found.heads, *found.neurons))


def errors_of(found: Scores) -> Tensor:
    return torch.cat((*found.head_errors, *found.neuron_errors))


def same(a: Scores, b: Scores, rtol: float = 1e-9) -> bool:
    return torch.allclose(all_of(a), all_of(b), rtol=rtol, atol=1e-20)


# --- terms become scores --------------------------------------------------------------------------------------


def shares(weighting: str) -> Tensor:
    """What the trajectory term of each unit counts, with two layers."""
    first, second = {"paper": (1.0, 1.0), "normalised": (1 / 2, 1.0), "output": (0.0, 0.0)}[weighting]
    return torch.tensor([first] * 3 + [second] * 3 + [first] * 6 + [second] * 6, dtype=torch.float64)


@pytest.mark.parametrize("weighting", ["paper", "normalised", "output"])
@pytest.mark.parametrize("name", ["3 classes", "embeddings", "words"])
def test_exact_scores_are_the_weighted_sum_of_the_mean_terms(name: str, weighting: Any) -> None:
    found = scored(case(name).model, case(name).batches, scorer="exact", weighting=weighting)
    trajectory, output = terms_of(name).mean(2)
    trajectory = shares(weighting) * trajectory
    weight = 1.0 if weighting == "output" else 0.1 * float(trajectory.mean() / output.mean())
    assert found.provenance["kl_weight"] == pytest.approx(weight, rel=1e-8)
    torch.testing.assert_close(all_of(found), trajectory + weight * output, rtol=1e-8, atol=0)
    assert float(errors_of(found).abs().max()) == 0, "nothing is estimated"


def sketched(name: str, *, probes: int, output_probes: int) -> Tensor:
    """Sums of the sketch, over the number of projections: (5, 18), variances over its square."""
    model = case(name).model
    ranges = {"probes": range(probes), "output_probes": range(output_probes)}
    with inference(model), torch.no_grad():
        sums = flat(sketch_terms(model, resolve(model), case(name).batches, seed=4, **ranges))
    counts = [probes, output_probes, probes**2, output_probes**2, 1]
    return sums / torch.tensor(counts, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("weighting", ["paper", "normalised", "output"])
@pytest.mark.parametrize(("name", "output_probes"), [("3 classes", 1), ("embeddings", 2)])
def test_the_sketch_estimates_neurons_and_masks_heads_on_a_few_samples(
    name: str, output_probes: int, weighting: Any
) -> None:
    """Probes of the output are a quarter of five, rounded up; the same lambda holds for heads and neurons."""
    found = scored(case(name).model, TEXT, weighting=weighting, probes=5, head_samples=3, seed=4)
    if weighting == "output":
        sums = sketched(name, probes=1, output_probes=5 if name == "embeddings" else 1)
    else:
        sums = sketched(name, probes=5, output_probes=output_probes)
    share, samples = shares(weighting), 5
    weight = 1.0 if weighting == "output" else 0.1 * float((share * sums[0]).mean() / sums[1].mean())
    assert found.provenance["kl_weight"] == pytest.approx(weight, rel=1e-9)
    wanted = (share * sums[0] + weight * sums[1]) / samples
    torch.testing.assert_close(torch.cat(found.neurons), wanted[6:], rtol=1e-9, atol=0)
    error = (share**2 * sums[2] + weight**2 * sums[3]).sqrt() / samples
    torch.testing.assert_close(torch.cat(found.neuron_errors), error[6:], rtol=1e-9, atol=0)
    # Heads: the three samples with the smallest keys, and the spread of the mean of 3 drawn from 5.
    keys = [key_of(sample) for sample in case(name).samples()]
    table = terms_of(name)[:, HEADS, sorted(range(5), key=lambda i: keys[i])[:3]]
    each = share[HEADS, None] * table[0] + weight * table[1]
    torch.testing.assert_close(torch.cat(found.heads), each.mean(1), rtol=1e-8, atol=0)
    spread = (each.var(1) / 3 * (1 - 3 / 5)).sqrt()
    torch.testing.assert_close(torch.cat(found.head_errors), spread, rtol=1e-6, atol=0)


def test_on_all_samples_heads_of_the_sketch_are_exact_without_an_error() -> None:
    exact, sketch = (scored(bert(), TEXT, scorer=name, probes=1, kl_weight=2.0) for name in SCORERS)
    torch.testing.assert_close(torch.cat(sketch.heads), torch.cat(exact.heads), rtol=1e-9, atol=0)
    assert not torch.allclose(torch.cat(sketch.neurons), torch.cat(exact.neurons), rtol=1e-2), "neurons are sketched"
    assert float(torch.cat(sketch.head_errors).max()) == 0 < float(torch.cat(sketch.neuron_errors).min())


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_given_kl_weight_replaces_the_default_and_zero_leaves_the_trajectory_alone(scorer: str) -> None:
    none, some, more = (scored(bert(), TEXT, scorer=scorer, probes=2, kl_weight=weight) for weight in (0.0, 2.0, 6.0))
    assert [x.provenance["kl_weight"] for x in (none, some, more)] == [0.0, 2.0, 6.0]
    torch.testing.assert_close(all_of(more) - all_of(none), 3 * (all_of(some) - all_of(none)), rtol=1e-8, atol=0)
    if scorer == "exact":
        torch.testing.assert_close(all_of(none), terms_of("3 classes")[0].mean(1), rtol=1e-8, atol=0)


@pytest.mark.parametrize("scorer", SCORERS)
def test_lambda_is_zero_when_the_output_never_moves(scorer: str) -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = scored(model, TEXT, scorer=scorer, probes=1)
    assert found.provenance["kl_weight"] == 0
    assert float(all_of(found).min()) > 0


@pytest.mark.parametrize(("scorer", "features"), [*((x, Features("ffn", 3)) for x in SCORERS), ("exact", PAPER)])
def test_settings_of_features_reach_the_scorer(scorer: str, features: Features) -> None:
    model = bert()
    found = scored(model, TEXT, scorer=scorer, features=features, seed=2, probes=2, kl_weight=0.0)
    units = {b: range(b.units) for x in resolve(model).layers for b in (x.attention, x.ffn)}
    with inference(model), torch.no_grad():
        wanted = flat(exact_terms(model, resolve(model), TEXT, units, features=features, seed=2))[0] / 5
    exact = slice(None) if scorer == "exact" else HEADS
    torch.testing.assert_close(all_of(found)[exact], wanted[exact], rtol=1e-9, atol=0)


def test_the_same_seed_gives_the_same_scores_and_another_seed_others() -> None:
    first, again, other = (scored(bert(), TEXT, probes=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(all_of(first), all_of(again))
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(first.neurons, other.neurons, strict=True))
    torch.manual_seed(12345)
    assert same(first, scored(bert(), TEXT, probes=2, seed=3), rtol=1e-12), "the global seed has no part in it"


def test_provenance_says_how_the_scores_were_made() -> None:
    model = bert()
    found = scored(model, TEXT, seed=5, probes=6, features=Features(tokens=4))
    told = dict(found.provenance)
    for measured in ("seconds", "forward_equivalents", "kl_weight"):
        assert told.pop(measured) > 0
    assert set(told.pop("memory")) == {"budget_bytes", "row_bytes", "rows", "peak_bytes"}
    assert told.pop("rank_stability")["heads"] == 1.0
    assert told == {
        **{"scorer": "sketch", "weighting": "paper", "features": {"site": "block", "tokens": 4, "across": False}},
        **{"samples": 5, "head_samples": 5, "probes": 6, "output_probes": 1, "seed": 5},
        "pass_dtype": "float64",
    }
    assert found.layout_hash == resolve(model).hash
    exact = scored(model, TEXT, scorer="exact").provenance
    assert (exact["samples"], exact["head_samples"], exact["probes"], exact["output_probes"]) == (5, 5, None, None)
    assert exact["forward_equivalents"] > 1
    # Nothing but plain values: it is stored as JSON.
    assert all(isinstance(value, dict | str | int | float | None) for value in found.provenance.values())


# --- only the samples count -----------------------------------------------------------------------------------

few = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
MANY = text_batch((2, 4, 3, 4))


@pytest.fixture(scope="module", name="base")
def _base(_one_thread: None) -> dict[str, Scores]:
    return {scorer: scored(case("3 classes").model, [MANY], scorer=scorer, probes=2) for scorer in SCORERS}


@pytest.mark.parametrize("scorer", SCORERS)
@given(
    order=st.permutations(range(4)),
    cuts=st.sets(st.integers(1, 3)),
    more=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    times=st.integers(1, 2),
)
@few
def test_the_order_batches_padding_and_repetition_of_samples_change_nothing(
    base: dict[str, Scores], scorer: str, order: list[int], cuts: set[int], more: list[int], times: int
) -> None:
    bounds = [0, *sorted(cuts), 4]
    parts = [order[a:b] for a, b in pairwise(bounds)]
    batches = [padded(rows(MANY, part), extra) for part, extra in zip(parts, more, strict=False)] * times
    assert same(scored(case("3 classes").model, batches, scorer=scorer, probes=2), base[scorer])


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_samples_themselves_do_matter(base: dict[str, Scores], scorer: str) -> None:
    fewer = scored(case("3 classes").model, [rows(MANY, [0, 1, 2])], scorer=scorer, probes=2)
    assert not same(fewer, base[scorer], rtol=1e-2)


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@few
def test_scores_are_finite_and_never_negative(seed: int, lengths: list[int]) -> None:
    model, batches = bert(seed=seed, layers=1).float(), [text_batch(tuple(lengths), seed=seed)]
    for scorer in SCORERS:
        for values in (*(found := scored(model, batches, scorer=scorer, probes=1)).heads, *found.neurons):
            assert bool(torch.isfinite(values).all())
            assert float(values.min()) >= 0


@given(head=st.integers(0, 5), neuron=st.integers(0, 11), seed=st.integers(0, 10**6))
@few
def test_a_dead_unit_scores_zero_in_the_sketch_and_next_to_nothing_in_exact(head: int, neuron: int, seed: int) -> None:
    model = bert(seed=seed)
    with torch.no_grad():
        for kind, (layer, unit) in (("heads", divmod(head, 3)), ("neurons", divmod(neuron, 6))):
            path, columns = BERT.columns(layer, kind, unit)
            model.get_submodule(path).weight[:, columns] = 0
    exact, sketch = (scored(model, TEXT[1:], scorer=scorer, probes=1) for scorer in SCORERS)
    assert float(torch.cat(sketch.neurons)[neuron]) == 0 == float(torch.cat(sketch.neuron_errors)[neuron])
    dead = torch.tensor([head, 6 + neuron])
    assert float(all_of(exact)[dead].max()) < 1e-12 * float(all_of(exact).mean())
    assert float(all_of(sketch)[dead].max()) < 1e-12 * float(all_of(sketch).mean()), "heads are masked"


# --- the model is left as it was ------------------------------------------------------------------------------


def odd_flags(model: nn.Module) -> list[object]:
    """Training, but for one module; gradients, but for one parameter."""
    model.train()
    model.get_submodule("bert.encoder.layer.0.output").eval()
    model.get_submodule("classifier").weight.requires_grad_(False)
    return state_of(model)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_finished_score_leaves_the_model_as_it_was_and_does_not_depend_on_its_flags(scorer: str) -> None:
    model = bert()
    wanted = scored(model, TEXT, scorer=scorer, probes=1)
    before = odd_flags(model)
    assert same(wanted, scored(model, TEXT, scorer=scorer, probes=1), rtol=1e-12), "no dropout while scoring"
    assert state_of(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scorer", SCORERS)
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(scorer: str) -> None:
    model = bert(layers=1)
    before, left = odd_flags(model), 0

    def interrupt(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    chosen, batches = ScoreSettings(scorer, probes=1), [text_batch((3, 2))]
    for at in range(1, 100):
        left = at
        try:
            score(model, resolve(model), batches, chosen, progress=interrupt)
        except KeyboardInterrupt:
            assert state_of(model) == before
            assert torch.is_grad_enabled()
        else:
            break
    assert 4 <= at < 99, "it was interrupted, and it came to an end"


@pytest.mark.parametrize("call", [1, 5, 9])
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_forward_that_fails_leaves_no_hooks_behind(scorer: str, call: int) -> None:
    model = bert()
    calls = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("out of memory")

    hook = model.get_submodule("bert.encoder.layer.1.output.dense").register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises((RuntimeError, BadInput), match="out of memory"):
        scored(model, TEXT, scorer=scorer, probes=1)
    assert state_of(model) == before
    hook.remove()


@pytest.mark.parametrize("scorer", SCORERS)
def test_progress_never_goes_back_and_ends_at_the_total(scorer: str) -> None:
    model, seen = bert(), list[float]()
    chosen = ScoreSettings(scorer, probes=1)
    score(model, resolve(model), TEXT, chosen, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) >= 4


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("layer", ["bert.encoder.layer.1.intermediate.dense", "classifier"])
def test_nan_in_weights_names_the_first_bad_layer_and_leaves_the_model_as_it_was(layer: str, scorer: str) -> None:
    model = bert()
    with torch.no_grad():
        model.get_submodule(layer).weight[0, 0] = torch.nan
    before = odd_flags(model)
    with pytest.raises(NonFiniteActivation, match=f"^{layer} put out NaN or infinity"):
        scored(model, TEXT, scorer=scorer)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "magnitude"}, "unknown --scorer 'magnitude'; possible: sketch, exact"),
        ({"weighting": "equal"}, "unknown --weighting 'equal'; possible: paper, normalised, output"),
        ({"features": PAPER}, r"\(--paper\) are compared only by --scorer exact"),
        ({"probes": 0}, "--probes 0: possible are 1 to 65536"),
        ({"head_samples": -1}, "--head-samples -1: possible are 1 to"),
        ({"kl_weight": math.nan}, "--kl-weight nan: give a number, 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ScoreSettings(**options)


def test_no_batches_are_refused() -> None:
    with pytest.raises(BadInput, match="no calibration batches"):
        scored(bert(), [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
@pytest.mark.parametrize("field", ["heads", "neurons"])
def test_scores_that_are_negative_or_not_finite_cannot_be_made(field: str, value: float) -> None:
    fine = (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    bad = (fine[0], torch.tensor([1.0, value]))
    with pytest.raises(BadInput, match=f"{field} of layer 1"):
        Scores(**{"heads": fine, "neurons": fine, field: bad}, layout_hash="x", provenance={})


def test_scores_of_another_version_cannot_be_made() -> None:
    with pytest.raises(BadInput, match="schema_version 1; this version reads 2"):
        Scores((), (), "x", {}, schema_version=1)


def test_scores_of_another_model_are_refused() -> None:
    scores = scored(bert(), TEXT, probes=1)
    scores.check(resolve(bert()))
    other = resolve(bare_bert())
    with pytest.raises(PlanMismatch, match=f"{scores.layout_hash[:12]}, this model has {other.hash[:12]}"):
        scores.check(other)
