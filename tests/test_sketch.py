"""The sketch equals Jacobians by autograd, projected on the same signs, and averages to their squared norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import pytest
import torch
from oracle_scoring import (
    CASES,
    TEXT,
    Slopes,
    case,
    drawn_tokens,
    flat,
    signs_of,
    slopes,
    slopes_of,
    stream_of,
)
from tiny_scoring import (
    BERT,
    Batch,
    bare_bert,
    bert,
    dinov2,
    image_batch,
    masked_lm,
    one_thread,
    padded,
    rows,
    text_batch,
    vit,
)
from torch import Tensor

from optin_deploy.arch.resolve import resolve
from optin_deploy.masking import inference
from optin_deploy.scoring import Features, ScoreSettings, Terms, exact_terms, score, sketch_terms
from optin_deploy.scoring import exact as exact_module
from optin_deploy.scoring import losses as losses_module
from optin_deploy.scoring import sketch as sketch_module
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY, VARIANCE, combined

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

FEW = ("3 classes", "3 classes, 3 layers", "2 classes, 1 layer", "regression", "2 regression targets")
EXACT_OUTPUT = (*FEW, "images, 3 classes")
RANDOM_OUTPUT = tuple(name for name in CASES if name not in EXACT_OUTPUT)


def run(
    model: Any,
    batches: Sequence[Batch],
    *,
    probes: int | range = 1,
    output_probes: int | range = 1,
    seed: int = 0,
    **how: Any,
) -> Terms:
    ranges = {
        name: range(value) if isinstance(value, int) else value
        for name, value in (("probes", probes), ("output_probes", output_probes))
    }
    with inference(model), torch.no_grad():
        return sketch_terms(model, resolve(model), batches, seed=seed, **ranges, **how)


# --- the same signs, the same numbers -------------------------------------------------------------------------


def projected(sample: Slopes, seed: int, probe: int) -> Tensor:
    """d / d mask of the Grams of all layers, projected on the signs of the generator in plain integers."""
    size = sample.grams.shape[1]
    noise = [signs_of(sample.key, stream_of(seed, f"layer {k}", probe), size, size) for k in range(len(sample.grams))]
    return torch.einsum("kij,kiju->u", torch.stack(noise), sample.grams)


def projected_output(sample: Slopes, seed: int, probe: int) -> Tensor:
    """The same of the output: on signs, or for KL on sqrt(p) e - p <sqrt(p), e> over sqrt(2)."""
    noise = signs_of(sample.key, stream_of(seed, "output", probe), *sample.dense.shape)
    if sample.kind in ("logits", "words"):
        p = sample.dense.softmax(1)
        noise = (p.sqrt() * noise - p * (p.sqrt() * noise).sum(1, keepdim=True)) / 2**0.5
    return torch.einsum("pc,pcu->u", noise, sample.vectors) / len(noise) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_sums_and_variances_are_those_of_projected_jacobians(name: str) -> None:
    found = flat(run(case(name).model, case(name).batches, probes=range(1, 4), output_probes=2, seed=7))
    trajectory = torch.stack([projected(s, 7, probe) for s in slopes(name) for probe in range(1, 4)]).square()
    output = torch.stack([projected_output(s, 7, probe) for s in slopes(name) for probe in range(2)]).square()
    wanted = torch.zeros_like(found)
    wanted[TRAJECTORY], wanted[VARIANCE] = trajectory.sum(0), 2 / 3 * trajectory.square().sum(0)
    wanted[OUTPUT], wanted[VARIANCE + OUTPUT] = output.sum(0), 2 / 3 * output.square().sum(0)
    if name in EXACT_OUTPUT:
        wanted[OUTPUT], wanted[VARIANCE + OUTPUT] = sum(s.output() for s in slopes(name)), 0
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-20)
    assert float(found[:2].min()) > 0


@pytest.mark.parametrize("site", ["block", "ffn"])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", ["3 classes", "images, embeddings"])
def test_other_features_are_projected_the_same_way(name: str, site: Any, count: int | None) -> None:
    pick = {} if count is None else {"pick": drawn_tokens(count, 5)}
    bends = slopes_of(case(name), site=site, **pick)
    found = flat(run(case(name).model, case(name).batches, probes=2, features=Features(site, count), seed=5))
    wanted = torch.stack([projected(s, 5, probe) for s in bends for probe in range(2)]).square()
    torch.testing.assert_close(found[TRAJECTORY], wanted.sum(0), rtol=1e-7, atol=1e-20)
    torch.testing.assert_close(found[VARIANCE], 2 / 3 * wanted.square().sum(0), rtol=1e-7, atol=1e-20)


# --- no bias --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [Features(), Features("ffn"), Features(tokens=4)], ids=["all", "ffn", "4"])
@pytest.mark.parametrize("name", ["3 classes, 3 layers", "images, 3 classes", "words"])
def test_summed_over_all_unit_projections_the_sketch_is_the_exact_curvature(
    name: str, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With R_k running over all matrices that have a single 1, the sum of squares is ||dG/dm||^2 without noise."""
    depth, tokens = case(name).depth(), features.tokens or 5

    def unit_noise(keys: Any, at: tuple[str, int], height: int, width: int, *, like: Tensor) -> Tensor:
        layer, probe = int(at[0].removeprefix("layer ")), at[1]
        noise = torch.zeros(depth, tokens * tokens)
        noise[probe // tokens**2, probe % tokens**2] = 1
        return noise[layer].view(tokens, tokens)[:height, :width].expand(len(keys), -1, -1).to(like)

    monkeypatch.setattr(sketch_module, "signs", unit_noise)
    monkeypatch.setattr(sketch_module, "stream", lambda seed, name, index: (name, index))
    probes = depth * tokens**2
    terms = run(case(name).model, case(name).batches, probes=probes, output_probes=0, features=features)
    pick = {"pick": drawn_tokens(features.tokens, 0)} if features.tokens else {}
    wanted = sum(s.trajectory() for s in slopes_of(case(name), site=features.site, **pick))
    torch.testing.assert_close(flat(terms)[TRAJECTORY], wanted, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("name", RANDOM_OUTPUT)
def test_summed_over_all_unit_projections_the_output_sketch_is_its_exact_curvature(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs enter the random directions linearly, so that single ones give the matrix they are the root of."""
    positions, width = max((s.dense.shape for s in slopes(name)), key=lambda shape: shape[0])

    def unit_noise(keys: Any, probe: int, height: int, across: int, *, like: Tensor) -> Tensor:
        noise = torch.zeros(positions, width)
        noise[probe // width, probe % width] = 1
        return noise[:height].expand(len(keys), -1, -1).to(like)

    monkeypatch.setattr(losses_module, "signs", unit_noise)
    monkeypatch.setattr(sketch_module, "stream", lambda seed, name, index: index)
    found = flat(run(case(name).model, case(name).batches, probes=0, output_probes=positions * width))
    torch.testing.assert_close(found[OUTPUT], sum(s.output() for s in slopes(name)), rtol=1e-9, atol=1e-20)
    assert float(found[TRAJECTORY].abs().max()) == 0


@pytest.mark.parametrize("name", ["12 classes", "words"])
def test_over_many_probes_the_mean_is_the_exact_curvature_within_four_standard_errors(name: str) -> None:
    probes = 200
    found = flat(run(case(name).model, case(name).batches, probes=probes, output_probes=probes))
    for row, curvature in ((TRAJECTORY, Slopes.trajectory), (OUTPUT, Slopes.output)):
        wanted = sum(curvature(s) for s in slopes(name))
        error = found[VARIANCE + row].sqrt() / probes
        assert float(((found[row] / probes - wanted) / error).abs().max()) < 4
        assert float((found[row].sum() / probes / wanted.sum() - 1).abs()) < 3 * (2 / probes) ** 0.5
        assert float((error / wanted).max()) < 1.5 * (2 / probes) ** 0.5, "that is no wide error"


def test_the_sketch_is_the_limit_of_the_exact_score_for_small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a unit whose columns are scaled by e gives e^2 times the curvature, when e is small."""
    model, small = bert(), 1e-4
    branch = resolve(model).layers[0].ffn
    monkeypatch.setattr(
        exact_module,
        "_one_out",
        lambda branch, chunk, valid: (
            1 - small * torch.eye(branch.units, dtype=valid.dtype)[chunk].repeat_interleave(len(valid), 0)[:, None]
        ),
    )
    with inference(model), torch.no_grad():
        terms = exact_terms(model, resolve(model), TEXT, {branch: range(branch.units)})
    neurons = slice(-2 * branch.units, -branch.units)  # of the first of two layers
    wanted = sum(torch.stack([s.trajectory(), s.output()]) for s in slopes("3 classes"))[:, neurons]
    torch.testing.assert_close(terms.sums[branch][:2] / small**2, wanted, rtol=1e-2, atol=0)


# --- standard errors ------------------------------------------------------------------------------------------


def repeats(
    monkeypatch: pytest.MonkeyPatch, model: Any, batch: Batch, row: int, *, copies: int, probes: int
) -> tuple[Tensor, Tensor]:
    """Single estimates of one sample, (copies * probes, units), and the mean variance that is reported for them.

    Copies of the sample get keys, and so signs, of their own.
    """
    kept: list[Tensor] = []
    slopes_in = sketch_module._slopes

    def keep(*args: Any) -> Tensor:
        kept.append(slopes_in(*args))
        return kept[-1]

    keys = torch.randint(2**48, (copies,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(sketch_module, "sample_keys", lambda batch: tuple(keys))
    monkeypatch.setattr(sketch_module, "_slopes", keep)
    many = {name: value.repeat(copies, 1) for name, value in batch.items()}
    numbers = (probes, 0) if row == TRAJECTORY else (0, probes)
    terms = run(model, [many], probes=numbers[0], output_probes=numbers[1])
    # One entry a block from the last to the first, a probe and a branch; layers of one branch stand together.
    depth = len(resolve(model).layers)
    table = [kept[2 * probes * block :][: 2 * probes] for block in reversed(range(depth))]
    branches = [torch.cat(block[branch::2]) for branch in (0, 1) for block in table]
    estimates = torch.cat(branches, 1).square()
    torch.testing.assert_close(estimates.sum(0), flat(terms)[row])
    return estimates, flat(terms)[VARIANCE + row] / len(estimates)


@pytest.mark.parametrize(("row", "model"), [(TRAJECTORY, bert), (OUTPUT, masked_lm)])
def test_the_spread_of_estimates_is_the_variance_that_is_reported(
    row: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates, reported = repeats(monkeypatch, model(), text_batch((16,)), row, copies=400, probes=20)
    ratio = reported / estimates.var(0)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert float((ratio - 1).abs().max()) < 0.2


def test_where_few_numbers_are_projected_the_reported_variance_is_too_large_but_not_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of few signs are less spread than Gaussian ones."""
    estimates, reported = repeats(monkeypatch, bert(labels=12), text_batch((4,)), OUTPUT, copies=400, probes=20)
    ratio = reported / estimates.var(0)
    assert float(ratio.min()) > 0.95
    assert 1 < float(ratio.mean()) < 2


# --- probes and samples in parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["3 classes", "12 classes", "embeddings"])
def test_ranges_of_probes_and_samples_in_parts_combine_to_the_whole(name: str) -> None:
    model, batches = case(name).model, case(name).batches

    def part(batch: Batch, probes: range, output_probes: range) -> Terms:
        return run(model, [batch], probes=probes, output_probes=output_probes)

    whole = combined([[run(model, batches, probes=5, output_probes=3)]])
    pieces = [(range(0, 2), range(0, 1)), (range(2, 5), range(1, 3))]
    found = combined([[part(batch, *some) for batch in batches] for some in pieces])
    torch.testing.assert_close(flat(found), flat(whole), rtol=1e-12, atol=0)
    counts = (found.samples, found.probes, found.output_probes)
    assert counts == (whole.samples, 5, 1 if name == "3 classes" else 3)
    assert found.samples == sum(len(batch["input_ids"]) for batch in batches)
    if name == "3 classes":  # exact directions are taken once, whatever the probes
        torch.testing.assert_close(flat(found)[OUTPUT], sum(s.output() for s in slopes(name)), rtol=1e-8, atol=0)
    # The variance of a mean falls with the number of probes.
    single = [flat(run(model, batches, probes=range(p, p + 1))) for p in range(5)]
    variance = torch.stack([x[VARIANCE] for x in single]).sum(0) / 25
    torch.testing.assert_close(flat(found)[VARIANCE], variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("limit", [1, 2, 100])
@pytest.mark.parametrize("name", ["3 classes", "12 classes", "words", "images, embeddings"])
def test_micro_batches_and_padding_change_rounding_at_most(name: str, limit: int) -> None:
    model, batches = case(name).model, case(name).batches
    base = flat(run(model, batches, probes=2, output_probes=2))
    small = micro_batches(batches, limit)
    if "images" not in name:
        small = [padded(batch, 2) for batch in small]
    torch.testing.assert_close(flat(run(model, small, probes=2, output_probes=2)), base, rtol=1e-9, atol=1e-20)


def test_another_seed_draws_other_signs_for_trajectory_and_output() -> None:
    model, batches = case("12 classes").model, case("12 classes").batches
    a, same, b = (flat(run(model, batches, seed=seed))[:2] for seed in (1, 1, 2))
    assert torch.equal(a, same)
    assert not bool(torch.isclose(a, b, rtol=1e-3).any())


def test_samples_do_not_share_their_signs() -> None:
    """Estimates of two samples with the same slopes differ; a repeated sample has the same."""
    model = bert()
    one, other = text_batch((5,)), text_batch((5,), seed=1)
    apart = [flat(run(model, [x]))[TRAJECTORY] for x in (one, other)]
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    torch.testing.assert_close(flat(run(model, [both]))[TRAJECTORY], apart[0] + apart[1], rtol=1e-9, atol=0)
    twice = {name: value.repeat(2, 1) for name, value in one.items()}
    torch.testing.assert_close(flat(run(model, [twice]))[TRAJECTORY], 2 * apart[0], rtol=1e-9, atol=0)


def test_only_the_block_in_hand_computes_and_keeps_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run again one by one, the last one first, when the graph of the one before is gone."""
    model, ran, alive = bert(layers=3), list[int](), WeakSet[Any]()

    class Watched(sketch_module._Block):
        def __init__(self, *args: Any) -> None:
            assert not alive
            alive.add(self)
            super().__init__(*args)

    monkeypatch.setattr(sketch_module, "_Block", Watched)
    hooks = [
        model.get_submodule(layer.ffn.output).register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, layer in enumerate(resolve(model).layers)
    ]
    run(model, TEXT[:1])
    assert ran == [0, 1, 2, 2, 1, 0]
    for hook in hooks:
        hook.remove()


def test_progress_counts_blocks_of_batches() -> None:
    seen: list[tuple[int, int]] = []
    run(bert(), TEXT, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- other models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_a_language_model_with_a_full_vocabulary_has_finite_positive_scores(scorer: str) -> None:
    model = masked_lm(words=30_522).float()
    found = score(model, resolve(model), [text_batch((3, 2))], ScoreSettings(scorer=scorer, probes=2))
    for values in (*found.heads, *found.neurons):
        assert bool(torch.isfinite(values).all())
        assert float(values.min()) > 0
    assert found.provenance["output_probes"] == (1 if scorer == "sketch" else None)


def test_bfloat16_images_can_be_sketched() -> None:
    model = vit().bfloat16()
    batch = {"pixel_values": image_batch(3)["pixel_values"].bfloat16()}
    found = score(model, resolve(model), [batch], ScoreSettings(probes=1))
    assert all(float(values.max()) > 0 for values in (*found.heads, *found.neurons))


def test_a_dead_unit_is_zero_in_both_terms_and_their_variances() -> None:
    model = bert(labels=12)
    layout = resolve(model)
    with torch.no_grad():
        for units, unit in (("heads", 1), ("neurons", 4)):
            path, columns = BERT.columns(0, units, unit)
            model.get_submodule(path).weight[:, columns] = 0
    terms = run(model, [rows(TEXT[0], [1, 2])], probes=2, output_probes=2)
    for branch, unit in ((layout.layers[0].attention, 1), (layout.layers[0].ffn, 4)):
        dead = (terms.sums[branch][:4] == 0).all(0)
        assert dead.nonzero().flatten().tolist() == [unit]


@pytest.mark.parametrize("make", [bert, bare_bert, vit, dinov2, masked_lm])
def test_passes_in_bfloat16_move_scores_far_less_than_their_noise(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().float()
    images = {"pixel_values": image_batch(4)["pixel_values"].float()}
    batches = [images] if "pixel_values" in model.main_input_name else TEXT
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sketch_module, "pass_dtype", lambda weight, dtype=dtype: dtype)
        found.append(score(model, resolve(model), batches, ScoreSettings(probes=4)))
    moved = False
    for plain, half, error in zip(found[0].neurons, found[1].neurons, found[0].neuron_errors, strict=True):
        moved |= not torch.equal(plain, half)
        assert float(((plain - half).abs() / error).max()) < 0.2
    assert moved, "bfloat16 was used"


@pytest.mark.parametrize(
    ("dtype", "able", "expected"),
    [
        (torch.float32, {"avx512_bf16": True}, torch.bfloat16),
        (torch.float32, {"avx512_bf16": False, "avx2": True}, torch.float32),
        (torch.float64, {"avx512_bf16": True}, torch.float64),
        (torch.float16, {}, torch.float16),
    ],
)
def test_only_float32_models_on_able_hardware_get_bfloat16_passes(
    dtype: torch.dtype, able: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert sketch_module.pass_dtype(torch.zeros(1, dtype=dtype)) is expected
