"""Scores equal independent arithmetic: masks by zeroed weight columns, full forwards, Jacobians by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_scoring import (
    BARE_BERT,
    BERT,
    HEADS,
    LAYERS,
    NEURONS,
    VIT,
    Batch,
    Family,
    bare_bert,
    bert,
    image_batch,
    one_thread,
    padded,
    rows,
    state_of,
    text_batch,
    vit,
)
from torch import Tensor, nn
from torch.func import functional_call

from optin_deploy.arch.resolve import resolve
from optin_deploy.errors import BadInput, NonFiniteActivation, PlanMismatch
from optin_deploy.masking import inference
from optin_deploy.scoring import Scores, drawn, exact_terms, score, sketch_terms
from optin_deploy.scoring import exact as exact_module
from optin_deploy.scoring import sketch as sketch_module
from optin_deploy.scoring.losses import output_directions, output_distance, token_gram, trajectory_distance
from optin_deploy.scoring.terms import Terms

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

TEXT = [text_batch((3, 7, 5)), text_batch((6, 2), padding=1, seed=1)]
IMAGES = [image_batch(2), image_batch(1, seed=1)]
Case = tuple[nn.Module, Family, list[Batch], str]
CASES: dict[str, Callable[[], Case]] = {
    "bert, 3 classes, padded": lambda: (bert(), BERT, TEXT, "logits"),
    "bert, 2 classes": lambda: (bert(labels=2), BERT, TEXT, "logits"),
    "bert, regression": lambda: (bert(labels=1), BERT, TEXT, "regression"),
    "bert, 2 regression targets": lambda: (bert(labels=2, problem_type="regression"), BERT, TEXT, "regression"),
    "bert, embeddings": lambda: (bare_bert(), BARE_BERT, TEXT, "embedding"),
    "vit, 3 classes": lambda: (vit(), VIT, IMAGES, "logits"),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


# --- the independent implementation ---------------------------------------------------------------------------


def look(model: nn.Module, family: Family, batch: Batch, kind: str) -> tuple[list[list[Tensor]], Tensor]:
    """Cosine Grams (samples x layers, real tokens only, over the token count), and the vector outputs compare by."""
    states: list[Tensor] = []
    hooks = [
        model.get_submodule(f"{family.blocks}.{i}").register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for i in range(LAYERS)
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    grams, vectors = [], []
    for i in range(len(states[0])):
        real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones(len(states[0][i])).bool()
        tokens = [state[i][real] for state in states]
        units = [t / t.norm(dim=1, keepdim=True) for t in tokens]
        grams.append([u @ u.T / len(u) for u in units])
        mean = tokens[-1].mean(0) if kind == "embedding" else torch.zeros(1)
        vectors.append(mean / mean.norm() if kind == "embedding" else output.logits[i])
    return grams, torch.stack(vectors)


def simple_terms(model: nn.Module, family: Family, batches: list[Batch], kind: str) -> dict[str, Tensor]:
    """Trajectory and output term of each unit, mean over samples: one full forward per unit, (2, layers, units)."""
    found = {"heads": torch.zeros(2, LAYERS, HEADS).double(), "neurons": torch.zeros(2, LAYERS, NEURONS).double()}
    samples = sum(len(next(iter(b.values()))) for b in batches)
    with torch.no_grad():
        for units, table in found.items():
            for layer in range(LAYERS):
                for unit in range(table.shape[2]):
                    bent = copy.deepcopy(model)
                    path, columns = family.columns(layer, units, unit)
                    bent.get_submodule(path).weight[:, columns] = 0
                    for batch in batches:
                        (grams, dense), (bent_grams, out) = (look(m, family, batch, kind) for m in (model, bent))
                        for i in range(len(dense)):
                            table[0, layer, unit] += sum(
                                (a - b).pow(2).sum()
                                for a, b in zip(grams[i][layer:], bent_grams[i][layer:], strict=True)
                            )
                            if kind == "logits":
                                p, q = dense[i].softmax(0), out[i].softmax(0)
                                table[1, layer, unit] += (p * (p / q).log()).sum()
                            else:
                                table[1, layer, unit] += (dense[i] - out[i]).pow(2).sum()
    return {units: table / samples for units, table in found.items()}


def lambda_of(terms: dict[str, Tensor]) -> float:
    """0.1 * mean_u D / mean_u KL over all units of the model."""
    trajectory, output = (torch.cat([t[i].flatten() for t in terms.values()]).mean() for i in (0, 1))
    return 0.1 * float(trajectory / output)


def close(found: Scores, terms: dict[str, Tensor], weight: float, *, rtol: float, atol: float) -> None:
    for units in ("heads", "neurons"):
        wanted = terms[units][0] + weight * terms[units][1]
        torch.testing.assert_close(torch.stack(getattr(found, units)).double(), wanted, rtol=rtol, atol=atol)


def same(a: Scores, b: Scores, rtol: float = 1e-5) -> bool:
    pairs = zip((*a.heads, *a.neurons), (*b.heads, *b.neurons), strict=True)
    return all(torch.allclose(x, y, rtol=rtol, atol=1e-14) for x, y in pairs)


# --- exact ----------------------------------------------------------------------------------------------------


def test_exact_scores_equal_one_full_forward_per_unit_in_float64(case: Case) -> None:
    model, family, batches, kind = case
    terms = simple_terms(model, family, batches, kind)
    found = score(model, resolve(model), batches, scorer="exact")
    assert found.provenance["kl_weight"] == pytest.approx(lambda_of(terms), rel=1e-6)
    close(found, terms, lambda_of(terms), rtol=1e-6, atol=1e-15)
    assert all(float(s.min()) > 1e-6 for s in (*found.heads, *found.neurons)), "every unit of the tiny model matters"


def test_exact_scores_in_float32_agree_to_one_percent_of_themselves_plus_a_ten_thousandth_of_the_mean(
    case: Case,
) -> None:
    model, family, batches, kind = case
    terms = simple_terms(model, family, batches, kind)
    weight = lambda_of(terms)
    floor = 1e-4 * float(torch.cat([(t[0] + weight * t[1]).flatten() for t in terms.values()]).mean())
    single = [{k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    layout = resolve(model)
    close(score(model.float(), layout, single, scorer="exact"), terms, weight, rtol=1e-2, atol=floor)


def test_a_given_kl_weight_replaces_the_default_and_zero_leaves_the_trajectory_alone() -> None:
    model = bert()
    terms = simple_terms(model, BERT, TEXT, "logits")
    for weight in (0.0, 7.0):
        found = score(model, resolve(model), TEXT, scorer="exact", kl_weight=weight)
        assert found.provenance["kl_weight"] == weight
        close(found, terms, weight, rtol=1e-6, atol=1e-15)


def test_exact_scores_do_not_depend_on_how_many_units_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    layout = resolve(model)
    together = score(model, layout, TEXT, scorer="exact")
    monkeypatch.setattr(exact_module, "TOKENS_PER_FORWARD", 2 * TEXT[0]["input_ids"].numel())
    assert same(together, score(model, layout, TEXT, scorer="exact"), rtol=1e-10)


def test_exact_terms_of_chosen_units_leave_the_others_at_zero() -> None:
    model = bert()
    layout = resolve(model)
    branch = layout.layers[1].ffn
    with inference(model), torch.no_grad():
        terms = exact_terms(model, layout, TEXT, {branch: [1, 4]})
    assert set(terms.trajectory) == {branch}
    assert terms.trajectory[branch].nonzero().flatten().tolist() == [1, 4]
    wanted = simple_terms(model, BERT, TEXT, "logits")["neurons"][0, 1, [1, 4]]
    torch.testing.assert_close(terms.total(branch, 0.0)[[1, 4]], wanted, rtol=1e-6, atol=0)


def test_the_sketch_scorer_scores_heads_exactly() -> None:
    model = bert()
    layout = resolve(model)
    exact = score(model, layout, TEXT, scorer="exact", kl_weight=2.0)
    sketch = score(model, layout, TEXT, probes=1, kl_weight=2.0)
    for a, b in zip(exact.heads, sketch.heads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
    assert not torch.allclose(exact.neurons[0], sketch.neurons[0], rtol=1e-3), "neurons are sketched"


# --- the sketch against exact curvature -----------------------------------------------------------------------


def jacobians(model: nn.Module, family: Family, sample: Batch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """d Gram / d mask (all layers' entries x units) and d output / d mask of one sample, by autograd; the output.

    Units: heads of all layers, then neurons of all layers. Masks multiply the columns of the weights.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    places = [
        (kind_, i, u) for kind_, n in (("heads", HEADS), ("neurons", NEURONS)) for i in range(LAYERS) for u in range(n)
    ]

    def run(mask: Tensor) -> tuple[Tensor, Tensor]:
        changed = dict(parameters)
        for at, (units, layer, unit) in enumerate(places):
            path, columns = family.columns(layer, units, unit)
            factor = torch.ones(changed[f"{path}.weight"].shape[1], dtype=mask.dtype)
            factor = factor.index_put((torch.tensor(columns),), mask[at].expand(len(columns)))
            changed[f"{path}.weight"] = changed[f"{path}.weight"] * factor
        grams, vector = look(_Called(model, changed), family, sample, kind)  # type: ignore[arg-type]
        return torch.cat([g.flatten() for g in grams[0]]), vector[0]

    ones = torch.ones(len(places), dtype=torch.float64)
    trajectory, output = torch.autograd.functional.jacobian(run, ones, vectorize=False)
    return trajectory, output, run(ones)[1]


class _Called:
    """A model with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, **batch: Tensor) -> Any:
        return functional_call(self.model, self.parameters, kwargs=batch)

    def get_submodule(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def curvature(model: nn.Module, family: Family, batches: list[Batch], kind: str) -> tuple[Tensor, Tensor]:
    """Exact Gauss-Newton curvature of both terms, summed over samples, (units,) each."""
    trajectory, output = (
        torch.zeros(LAYERS * (HEADS + NEURONS)).double(),
        torch.zeros(LAYERS * (HEADS + NEURONS)).double(),
    )
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            bends, moves, dense = jacobians(model, family, rows(batch, [i]), kind)
            trajectory += bends.pow(2).sum(0)
            metric = torch.eye(len(dense), dtype=torch.float64)
            if kind == "logits":
                p = dense.softmax(0)
                metric = (p.diag() - torch.outer(p, p)) / 2
            output += ((metric @ moves) * moves).sum(0)
    return trajectory, output


def sketched(model: nn.Module, batches: list[Batch], *, probes: int, seed: int = 0) -> Terms:
    with inference(model), torch.no_grad():
        return sketch_terms(model, resolve(model), batches, probes=probes, seed=seed)


def flat(terms: dict[Any, Tensor]) -> Tensor:
    return torch.cat(list(terms.values()))


@pytest.mark.parametrize("name", ["bert, 3 classes, padded", "bert, 2 classes", "bert, regression", "vit, 3 classes"])
def test_few_outputs_have_exact_directions(name: str) -> None:
    model, family, batches, kind = CASES[name]()
    _, output = curvature(model, family, batches, kind)
    # Masks and their gradients are float32 in the product: 1e-6 is its rounding, squared.
    torch.testing.assert_close(flat(sketched(model, batches, probes=1).output), output, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bert, 3 classes, padded", "vit, 3 classes"])
def test_the_trajectory_sketch_summed_over_all_unit_projections_is_the_exact_curvature(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With R_k running over all matrices that have a single 1, the sum of squares is ||dG/dm||^2 without noise."""
    model, family, batches, kind = CASES[name]()
    tokens = 7 if family is BERT else 5

    def unit_noise(keys: Any, seed: int, layer: int, probe: int, valid: Tensor) -> Tensor:
        noise = torch.zeros(LAYERS, tokens * tokens)
        noise[probe // tokens**2, probe % tokens**2] = 1
        size = valid.shape[1]
        return noise[layer].view(tokens, tokens)[:size, :size].expand(len(valid), -1, -1).to(valid)

    monkeypatch.setattr(sketch_module, "_token_noise", unit_noise)
    probes = LAYERS * tokens**2
    found = flat(sketched(model, batches, probes=probes).trajectory) * probes
    torch.testing.assert_close(found, curvature(model, family, batches, kind)[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bert, 3 classes, padded", "bert, embeddings"])
def test_the_sketch_averages_to_the_exact_curvature_within_four_standard_errors(name: str) -> None:
    model, family, _, kind = CASES[name]()
    batch, probes = text_batch((4, 3)), 600
    exact = curvature(model, family, [batch], kind)
    terms = sketched(model, [batch], probes=probes)
    for found, wanted in ((flat(terms.trajectory), exact[0]), (flat(terms.output), exact[1])):
        # A squared Gaussian has relative variance 2; two samples can only lower it.
        assert float((found / wanted - 1).abs().max()) < 4 * math.sqrt(2 / probes)
        assert float((found.sum() / wanted.sum() - 1).abs()) < 3 * math.sqrt(2 / probes)


def test_random_directions_for_many_classes_have_half_the_covariance_of_the_softmax() -> None:
    classes, draws = 12, 40_000
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(draws, 2, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions, factor = output_directions("logits", logits.expand(draws, -1), noise)
    assert directions.shape == (draws, 2, classes)
    found = factor * torch.einsum("npc,npd->cd", directions, directions) / draws
    p = logits.softmax(0)
    wanted = (p.diag() - torch.outer(p, p)) / 2
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_directions_for_few_classes_are_exact_for_any_logits(classes: int) -> None:
    logits = 3 * torch.randn(5, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions, factor = output_directions("logits", logits, torch.full((5, 1, classes), torch.nan))
    assert directions.shape[1] == (1 if classes == 2 else classes), "two classes need one backward pass"
    p = logits.softmax(1)
    wanted = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 2
    torch.testing.assert_close(factor * directions.transpose(1, 2) @ directions, wanted, rtol=1e-6, atol=1e-15)


def test_many_classes_are_sketched_without_bias() -> None:
    model, seeds = bert(labels=12), 150
    batch = text_batch((4, 3))
    _, output = curvature(model, BERT, [batch], "logits")
    found = sum(flat(sketched(model, [batch], probes=2, seed=seed).output) for seed in range(seeds)) / seeds
    assert float((found / output - 1).abs().max()) < 4 * math.sqrt(2 / (2 * seeds))


def test_the_sketch_is_the_limit_of_the_exact_score_for_small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a unit whose columns are scaled by e gives e^2 times the curvature, when e is small."""
    model, small = bert(), 1e-3
    layout = resolve(model)
    branch = layout.layers[0].ffn
    wanted_trajectory, wanted_output = (t[LAYERS * HEADS + 2] for t in curvature(model, BERT, TEXT, "logits"))
    monkeypatch.setattr(
        exact_module,
        "_one_out",
        lambda branch, chunk, valid: (
            1 - small * torch.eye(branch.units)[chunk].repeat_interleave(len(valid), 0)[:, None]
        ),
    )
    with inference(model), torch.no_grad():
        terms = exact_terms(model, layout, TEXT, {branch: [2]})
    assert float(terms.trajectory[branch][2]) / small**2 == pytest.approx(float(wanted_trajectory), rel=1e-2)
    assert float(terms.output[branch][2]) / small**2 == pytest.approx(float(wanted_output), rel=1e-2)


def test_noise_is_standard_normal_not_symmetric_and_its_own_for_each_sample_layer_probe_and_seed() -> None:
    valid = torch.ones(2, 60)
    draws = {
        (seed, layer, probe): sketch_module._token_noise((1, 2), seed, layer, probe, valid)
        for seed in (0, 1)
        for layer in (0, 1)
        for probe in (0, 1)
    }
    flattened = torch.stack([n[row].flatten() for n in draws.values() for row in (0, 1)])
    correlation = torch.corrcoef(flattened) - torch.eye(len(flattened))
    assert float(correlation.abs().max()) < 0.08
    assert float(flattened.mean().abs()) < 0.02
    assert float(flattened.var()) == pytest.approx(1, abs=0.03)
    first = draws[0, 0, 0][0]
    assert float(torch.corrcoef(torch.stack([first.flatten(), first.T.flatten()]))[0, 1].abs()) < 0.08


# --- invariances ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
@pytest.mark.parametrize("change", ["permuted", "one a batch", "one batch", "more padding", "repeated"])
def test_scores_do_not_change_when_the_same_samples_come(scorer: str, change: str) -> None:
    model = bert()
    layout = resolve(model)
    first, second = TEXT
    wide = padded(second, first["input_ids"].shape[1] - second["input_ids"].shape[1])
    merged = {name: torch.cat([first[name], wide[name]]) for name in first}
    other = {
        "permuted": [rows(second, [1, 0]), rows(first, [2, 0, 1])],
        "one a batch": [rows(batch, [i]) for batch in TEXT for i in range(len(batch["input_ids"]))],
        "one batch": [merged],
        "more padding": [padded(first, 4), padded(second, 1)],
        "repeated": [*TEXT, *TEXT],
    }[change]
    base = score(model, layout, TEXT, scorer=scorer, probes=2)
    assert same(base, score(model, layout, other, scorer=scorer, probes=2))
    assert not same(base, score(model, layout, [first], scorer=scorer, probes=2)), "the samples do matter"


@pytest.mark.parametrize("change", ["reversed", "one batch", "repeated"])
def test_head_scores_of_the_sketch_do_not_change_with_the_order_of_many_samples(change: str) -> None:
    model = bert(layers=1)
    layout = resolve(model)
    many = [text_batch((3,) * 11, seed=seed) for seed in range(7)]
    merged = {name: torch.cat([batch[name] for batch in many]) for name in many[0]}
    other = {"reversed": [rows(merged, list(range(76, -1, -1)))], "one batch": [merged], "repeated": [*many, *many]}
    scores = (score(model, layout, batches, probes=1) for batches in (many, other[change]))
    assert same(*scores)


def test_the_head_sample_has_the_size_asked_and_does_not_depend_on_order_batches_or_repetition() -> None:
    many = text_batch((4,) * 50)
    batches = [rows(many, list(range(i, i + 10))) for i in range(0, 50, 10)]

    def texts_of(chosen: list[Batch]) -> list[list[int]]:
        return sorted(row.tolist() for batch in chosen for row in batch["input_ids"])

    found = drawn(batches, 16)
    assert all(batch.keys() == many.keys() for batch in found)
    assert len(texts_of(found)) == 16
    for other in ([many], batches[::-1], [*batches, *batches], [padded(many, 2)]):
        assert texts_of([rows(b, list(range(len(b["input_ids"])))) for b in drawn(other, 16)]) in (
            texts_of(found),
            [[*row, 0, 0] for row in texts_of(found)],
        )
    assert texts_of(drawn(batches, 99)) == texts_of(batches), "all, if there are fewer"


def test_scores_are_finite_not_negative_and_differ_between_units(case: Case) -> None:
    model, _, batches, _ = case
    for scorer in ("exact", "sketch"):
        found = score(model, resolve(model), batches, scorer=scorer, probes=1)
        for layer in (*found.heads, *found.neurons):
            assert bool((layer > 0).all())
            assert bool(torch.isfinite(layer).all())
            assert len(set(layer.tolist())) == len(layer)


def test_a_dead_unit_scores_zero_in_the_sketch_and_next_to_nothing_in_exact() -> None:
    model = bert()
    layout = resolve(model)
    with torch.no_grad():
        for units, unit in (("heads", 1), ("neurons", 4)):
            path, columns = BERT.columns(0, units, unit)
            model.get_submodule(path).weight[:, columns] = 0
    terms = sketched(model, TEXT, probes=3)
    exact = score(model, layout, TEXT, scorer="exact")
    for branch, unit, exact_scores in (
        (layout.layers[0].attention, 1, exact.heads[0]),
        (layout.layers[0].ffn, 4, exact.neurons[0]),
    ):
        for term in (terms.trajectory[branch], terms.output[branch]):
            assert term[unit] == 0
            assert int((term == 0).sum()) == 1
        assert float(exact_scores[unit]) < 1e-15
        assert float(exact_scores[unit - 1]) > 1e-6


def test_bfloat16_images_can_be_sketched() -> None:
    model = vit().bfloat16()
    batch = {"pixel_values": image_batch(3)["pixel_values"].bfloat16()}
    found = score(model, resolve(model), [batch], probes=1)
    assert all(float(values.max()) > 0 for values in (*found.heads, *found.neurons))


def test_lambda_is_zero_when_the_output_never_moves() -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight.zero_()
    for scorer in ("exact", "sketch"):
        found = score(model, resolve(model), TEXT, scorer=scorer)
        assert found.provenance["kl_weight"] == 0
        assert float(found.heads[0].min()) > 0


def test_the_same_seed_gives_the_same_scores_and_another_seed_others() -> None:
    model = bert()
    layout = resolve(model)
    first, again, other = (score(model, layout, TEXT, probes=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.neurons, again.neurons, strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(first.neurons, other.neurons, strict=True))
    torch.manual_seed(12345)
    assert same(first, score(model, layout, TEXT, probes=2, seed=3), rtol=1e-12), "the global seed has no part in it"


def test_provenance_says_how_the_scores_were_made() -> None:
    model = bert()
    layout = resolve(model)
    found = score(model, layout, TEXT, seed=5)
    told = {k: v for k, v in found.provenance.items() if k not in ("seconds", "kl_weight")}
    assert told == {"scorer": "sketch", "samples": 5, "head_samples": 5, "probes": 52, "seed": 5}  # 5 * 52 >= 256
    assert found.layout_hash == layout.hash
    assert score(model, layout, TEXT, scorer="exact").provenance["probes"] is None


# --- losses ---------------------------------------------------------------------------------------------------


def test_grams_hold_cosines_over_the_token_count_and_zeros_for_padding() -> None:
    features = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [5.0, 5.0]]])
    gram = token_gram(features, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(gram, torch.tensor([[[0.5, 0.4, 0.0], [0.4, 0.5, 0.0], [0.0, 0.0, 0.0]]]))


def test_distances_are_those_of_the_definition() -> None:
    a, b = torch.eye(2)[None], torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    assert trajectory_distance(a, b).tolist() == [5.0]
    assert output_distance("embedding", torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).tolist() == [5.0]
    even, skewed = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])  # (1/2, 1/2), (1/4, 3/4)
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(output_distance("logits", even, skewed)) == pytest.approx(wanted, rel=1e-6)
    assert float(output_distance("logits", skewed, skewed)) == 0


# --- errors and clean-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_nan_in_weights_names_the_first_bad_layer_and_leaves_the_model_as_it_was(scorer: str) -> None:
    model = bert()
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.intermediate.dense").weight[0, 0] = torch.nan
    _odd_flags(model)
    before = state_of(model)
    with pytest.raises(
        NonFiniteActivation, match=r"^bert\.encoder\.layer\.1\.intermediate\.dense put out NaN or infinity"
    ):
        score(model, resolve(model), TEXT, scorer=scorer)
    assert state_of(model) == before
    terms_of = sketch_terms if scorer == "sketch" else exact_terms
    options: Any = {"probes": 1, "seed": 0} if scorer == "sketch" else {"units": {}}
    with pytest.raises(NonFiniteActivation), inference(model), torch.no_grad():
        terms_of(model, resolve(model), TEXT, **options)


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_nan_after_the_last_block_is_a_non_finite_activation_too(scorer: str) -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteActivation, match=r"^classifier put out"):
        score(model, resolve(model), TEXT, scorer=scorer)


def _odd_flags(model: nn.Module) -> None:
    """Training, but for one module; gradients, but for one parameter."""
    model.train()
    model.get_submodule("bert.encoder.layer.0.output").eval()
    model.get_submodule("classifier").weight.requires_grad_(False)


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_a_finished_score_leaves_the_model_as_it_was_and_does_not_depend_on_its_flags(scorer: str) -> None:
    model = bert()
    layout = resolve(model)
    wanted = score(model, layout, TEXT, scorer=scorer, probes=1)
    _odd_flags(model)
    before = state_of(model)
    assert same(wanted, score(model, layout, TEXT, scorer=scorer, probes=1), rtol=1e-12), "no dropout while scoring"
    assert state_of(model) == before


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(scorer: str, at: int) -> None:
    model = bert()
    _odd_flags(model)
    before = state_of(model)
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, resolve(model), TEXT, scorer=scorer, probes=1, progress=interrupt)
    assert state_of(model) == before


def test_a_forward_that_fails_under_a_mask_leaves_no_hooks_behind() -> None:
    model = bert()
    calls = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("out of memory")

    hook = model.get_submodule("bert.encoder.layer.1.output.dense").register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        score(model, resolve(model), TEXT, scorer="exact")
    assert state_of(model) == before
    hook.remove()


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_progress_never_goes_back_and_ends_at_the_total(scorer: str) -> None:
    model = bert()
    seen: list[float] = []
    score(model, resolve(model), TEXT, scorer=scorer, probes=1, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) >= 4


def test_an_unknown_scorer_is_refused_with_the_possible_ones() -> None:
    model = bert()
    with pytest.raises(BadInput, match="'magnitude'; possible: sketch, exact"):
        score(model, resolve(model), TEXT, scorer="magnitude")


def test_no_batches_are_refused() -> None:
    model = bert()
    with pytest.raises(BadInput, match="no calibration batches"):
        score(model, resolve(model), [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
@pytest.mark.parametrize("field", ["heads", "neurons"])
def test_scores_that_are_negative_or_not_finite_cannot_be_made(field: str, value: float) -> None:
    fine = (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    bad = (fine[0], torch.tensor([1.0, value]))
    with pytest.raises(BadInput, match=f"{field} of layer 1"):
        Scores(**{"heads": fine, "neurons": fine, field: bad}, layout_hash="x", provenance={})


def test_scores_of_another_version_cannot_be_made() -> None:
    with pytest.raises(BadInput, match="schema_version 2; this version reads 1"):
        Scores((), (), "x", {}, schema_version=2)


def test_scores_of_another_model_are_refused() -> None:
    model = bert()
    scores = score(model, resolve(model), TEXT, probes=1)
    scores.check(resolve(model))
    other = resolve(bare_bert())
    with pytest.raises(PlanMismatch, match=f"{scores.layout_hash[:12]}, this model has {other.hash[:12]}"):
        scores.check(other)
