"""Compensation solves the regression of its docstring, helps on data it has not seen, and touches nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_scoring import (
    BERT,
    DINOV2,
    HEADS,
    HIDDEN,
    LAYERS,
    NEURONS,
    SWIGLU,
    VIT,
    Batch,
    Family,
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

from optin_deploy import compensate as module
from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import RIDGES, apply_weights, compensate
from optin_deploy.errors import PlanMismatch
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import PruningPlan

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

Kept = tuple[tuple[int, ...], ...]
Case = tuple[nn.Module, Family, int, Callable[[int], list[Batch]]]


def texts(seed: int) -> list[Batch]:
    return [text_batch((3, 7, 5, 6, 9, 4, 8, 10), seed=seed + i) for i in range(5)]


def images(seed: int) -> list[Batch]:
    return [image_batch(12, seed=seed), image_batch(7, seed=seed + 1), image_batch(13, seed=seed + 2)]


CASES: dict[str, Callable[[], Case]] = {
    "bert: post-LN": lambda: (bert(), BERT, NEURONS, texts),
    "vit: pre-LN": lambda: (vit(), VIT, NEURONS, images),
    "dinov2: LayerScale": lambda: (dinov2(), DINOV2, HIDDEN, images),
    "dinov2: gated FFN": lambda: (dinov2(gated=True), SWIGLU, 8, images),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def plan_of(model: nn.Module, heads: Kept, neurons: Kept) -> PruningPlan:
    return PruningPlan(heads, neurons, resolve(model).hash, 100, 60, 10, 8)


HALF_HEADS: Kept = ((0, 2), (1, 2))
HALF_NEURONS: Kept = ((0, 1, 4), (1, 3, 5))


def columns_of(family: Family, layer: int, kind: str, kept: tuple[int, ...]) -> list[int]:
    return [column for unit in kept for column in family.columns(layer, kind, unit)[1]]


# --- the independent regression -------------------------------------------------------------------------------


def projection_inputs(model: nn.Module, path: str, batches: list[Batch]) -> list[np.ndarray]:
    """What goes into a projection, real tokens only, one array (tokens, units) a sample."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    samples = []
    for batch, values in zip(batches, seen, strict=True):
        for i, row in enumerate(values):
            samples.append((row[batch["attention_mask"][i].bool()] if "attention_mask" in batch else row).numpy())
    return samples


def repeated(values: list[np.ndarray], counts: list[np.ndarray] | None) -> list[np.ndarray]:
    """Each token of each sample so many times."""
    return values if counts is None else [np.repeat(v, n, axis=0) for v, n in zip(values, counts, strict=True)]


def centred_ridge(a: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """argmin mean |target - W a - b|^2 + ridge * (mean variance of a) * |W - start|^2, as one least squares."""
    mean_a, mean_t = a.mean(0), target.mean(0)
    weight = np.sqrt(ridge * (a - mean_a).var(0).mean() * len(a))
    left = np.concatenate([a - mean_a, weight * np.eye(a.shape[1])])
    right = np.concatenate([target - mean_t, weight * start.T])
    found = np.linalg.lstsq(left, right, rcond=None)[0]  # (units, hidden)
    return found.T, mean_t - found.T @ mean_a


def chosen_ridge(a: list[np.ndarray], target: list[np.ndarray], start: np.ndarray, ridges: tuple[float, ...]) -> float:
    """The ridge of least squared error on every fifth sample, fitted on the others."""

    def part(values: list[np.ndarray], judged: bool) -> np.ndarray:
        return np.concatenate([v for i, v in enumerate(values) if (i % 5 == 4) is judged])

    def error(ridge: float) -> float:
        weight, bias = centred_ridge(part(a, False), part(target, False), start, ridge)
        return float(((part(a, True) @ weight.T + bias - part(target, True)) ** 2).sum())

    errors = sorted((error(ridge), ridge) for ridge in ridges)
    assert errors[1][0] > errors[0][0] * (1 + 1e-6), "the choice is clear"
    return errors[0][1]


@pytest.mark.parametrize("ridges", [RIDGES, (0.03,), (100.0, 1e-6, 1.0)], ids=["all", "one", "three"])
def test_the_first_sub_layer_solves_the_ridge_regression_of_its_docstring(
    case: Case, ridges: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it both streams are equal, so that the target is the dense projection's output."""
    model, family, _, data = case
    monkeypatch.setattr(module, "RIDGES", ridges)
    batches = data(0)
    path = family.columns(0, "heads", 0)[0]
    columns = columns_of(family, 0, "heads", HALF_HEADS[0])
    projection = model.get_submodule(path)
    weight, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()
    full = projection_inputs(model, path, batches)
    a, target = [x[:, columns] for x in full], [x @ weight.T + bias for x in full]
    start = weight[:, columns]
    if family in (DINOV2, SWIGLU):
        # The error of the residual stream: each output counts by its LayerScale. Rows of W are independent, so
        # that this changes which ridge is best, and not the solution for a given one.
        scale = model.get_parameter("encoder.layer.0.layer_scale1.lambda1").detach().numpy()
        ridge = (
            chosen_ridge(a, [t * scale for t in target], start * scale[:, None], ridges) if ridges[1:] else ridges[0]
        )
    else:
        ridge = chosen_ridge(a, target, start, ridges) if ridges[1:] else ridges[0]
    wanted, wanted_bias = centred_ridge(np.concatenate(a), np.concatenate(target), start, ridge)

    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), batches)
    np.testing.assert_allclose(found[f"{path}.weight"].numpy()[:, columns], wanted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[f"{path}.bias"].numpy(), wanted_bias, rtol=1e-6, atol=1e-9)
    assert float(np.abs(wanted_bias - bias).max()) > 1e-2, "there was something to solve"


FFN_RESIDUAL = {BERT: "intermediate", VIT: "layernorm_after", DINOV2: "norm2", SWIGLU: "norm2"}


INPUTS = {
    BERT: {
        "heads": [f"attention.self.{name}" for name in ("query", "key", "value")],
        "neurons": ["intermediate.dense"],
    },
    VIT: {"heads": [f"attention.{name}_proj" for name in "qkv"], "neurons": ["mlp.fc1"]},
}
INPUTS[DINOV2] = INPUTS[VIT]
INPUTS[SWIGLU] = {**INPUTS[VIT], "neurons": ["mlp.gate_proj", "mlp.up_proj"]}


def input_paths(family: Family, layer: int, kind: str) -> list[str]:
    return [f"{family.blocks}.{layer}.{name}" for name in INPUTS[family][kind]]


def inputs_and_target(
    model: nn.Module, student: nn.Module, family: Family, batches: list[Batch], layer: int, kind: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of one sub-layer, per sample: the student's projection inputs, and W a + b + (x - x') / s; real tokens."""
    path, block = family.columns(layer, kind, 0)[0], f"{family.blocks}.{layer}"
    residual = block if kind == "heads" else f"{block}.{FFN_RESIDUAL[family]}"
    a, a_student = (projection_inputs(m, path, batches) for m in (model, student))
    x, x_student = (projection_inputs(m, residual, batches) for m in (model, student))
    projection = model.get_submodule(path)
    weight, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()
    scale = np.ones(HIDDEN)
    if family in (DINOV2, SWIGLU):
        number = 1 if kind == "heads" else 2
        scale = model.get_parameter(f"{block}.layer_scale{number}.lambda1").detach().numpy()
    target = [v @ weight.T + bias + (r - q) / scale for v, r, q in zip(a, x, x_student, strict=True)]
    if (layer, kind) != (0, "heads"):
        assert float(np.abs(np.concatenate(x) - np.concatenate(x_student)).max()) > 0.05, "the streams differ"
    return a_student, target


def set_columns(student: nn.Module, found: dict[str, Tensor], path: str, columns: list[int]) -> None:
    """Give the student the solution of one projection, cut columns zero."""
    with torch.no_grad():
        projection = student.get_submodule(path)
        projection.weight.zero_()
        projection.weight[:, columns] = found[f"{path}.weight"][:, columns]
        projection.bias.copy_(found[f"{path}.bias"])


def set_rows(student: nn.Module, found: dict[str, Tensor], path: str, rows: list[int]) -> None:
    """Give the student the solution of one input projection."""
    with torch.no_grad():
        projection = student.get_submodule(path)
        projection.weight[rows] = found[f"{path}.weight"][rows]
        projection.bias[rows] = found[f"{path}.bias"][rows]


def counts_of(batches: list[Batch], layers: int) -> tuple[list[list[Tensor]], list[list[np.ndarray]]]:
    """Random numbers of times for each token of each layer: as weights, and of each sample's real tokens."""
    generator = torch.Generator().manual_seed(0)
    masks = [b.get("attention_mask", torch.ones(len(next(iter(b.values()))), 5)) for b in batches]
    drawn = [[torch.randint(0, 4, mask.shape, generator=generator) for mask in masks] for _ in range(layers)]
    real = [
        [n[m.bool()].numpy() for rows, mask in zip(layer, masks, strict=True) for n, m in zip(rows, mask, strict=True)]
        for layer in drawn
    ]
    return [[counts.double() for counts in layer] for layer in drawn], real


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*CASES, "bert, 3 layers"])
def test_every_sub_layer_aims_at_the_dense_stream_as_the_solutions_before_it_leave_the_pruned_one(
    name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads, and what it adds. A token of weight 3 counts as three tokens.

    What attention reads counts by the weights of the block before.
    """
    deep = name not in CASES
    model, family, _, data = (bert(layers=3), BERT, NEURONS, texts) if deep else CASES[name]()
    heads, neurons = (*HALF_HEADS, (0,))[: LAYERS + deep], (*HALF_NEURONS, (1, 2, 5))[: LAYERS + deep]
    monkeypatch.setattr(module, "RIDGES", (0.03,))
    batches = data(0)
    weights, counts = counts_of(batches, LAYERS + deep) if weighted else (None, None)
    found = compensate(model, resolve(model), plan_of(model, heads, neurons), batches, token_weights=weights)
    student = copy.deepcopy(model)
    for layer in range(LAYERS + deep):
        times = None if counts is None else counts[layer]
        for kind, kept in (("heads", heads[layer]), ("neurons", neurons[layer])):
            path, columns = family.columns(layer, kind, 0)[0], columns_of(family, layer, kind, kept)
            if (layer, kind) != (0, "heads"):
                read = input_paths(family, layer, kind)
                heard = times if counts is None or kind == "neurons" else counts[layer - 1]
                z, seen = (
                    np.concatenate(repeated(projection_inputs(m, read[0], batches), heard)) for m in (model, student)
                )
                mapped, offset = centred_ridge(seen, z - seen, np.zeros((HIDDEN, HIDDEN)), 0.03)
                for each in read:
                    dense = model.get_submodule(each)
                    weight, bias = (p.detach().numpy()[columns] for p in (dense.weight, dense.bias))
                    new, moved = (found[f"{each}.{name}"].numpy()[columns] for name in ("weight", "bias"))
                    np.testing.assert_allclose(new, weight + weight @ mapped, rtol=1e-6, atol=1e-9)
                    np.testing.assert_allclose(moved, bias + weight @ offset, rtol=1e-6, atol=1e-9)
                    assert float(np.abs(new - weight).max()) > 1e-3, "there was something to solve"
                    set_rows(student, found, each, columns)
            inputs, target = inputs_and_target(model, student, family, batches, layer, kind)
            start = model.get_submodule(path).weight.detach().numpy()[:, columns]
            a = np.concatenate(repeated(inputs, times))[:, columns]
            wanted, wanted_bias = centred_ridge(a, np.concatenate(repeated(target, times)), start, 0.03)
            np.testing.assert_allclose(found[f"{path}.weight"].numpy()[:, columns], wanted, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(found[f"{path}.bias"].numpy(), wanted_bias, rtol=1e-6, atol=1e-9)
            set_columns(student, found, path, columns)


# --- what it is for -------------------------------------------------------------------------------------------


@contextmanager
def cut(model: nn.Module, family: Family, heads: Kept, neurons: Kept) -> Iterator[nn.Module]:
    """A copy with the columns of cut units zeroed by hand."""
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for layer in range(LAYERS):
            for kind, kept in (("heads", heads[layer]), ("neurons", neurons[layer])):
                weight = smaller.get_submodule(family.columns(layer, kind, 0)[0]).weight
                gone = sorted(set(range(weight.shape[1])) - set(columns_of(family, layer, kind, kept)))
                weight[:, gone] = 0
        yield smaller


def final_states(model: nn.Module, family: Family, batches: list[Batch]) -> Tensor:
    """Output of the last block, real tokens of all batches, (tokens, hidden)."""
    seen: list[Tensor] = []
    block = model.get_submodule(f"{family.blocks}.{LAYERS - 1}")
    hook = block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    real = [
        s[b["attention_mask"].bool()] if "attention_mask" in b else s.flatten(0, 1)
        for s, b in zip(seen, batches, strict=True)
    ]
    return torch.cat(real)


def error_after(model: nn.Module, family: Family, weights: dict[str, Tensor], neurons: Kept, heads: Kept) -> float:
    """Squared error of the final hidden states on data that the fit has not seen, relative to their variance."""
    unseen = texts(100) if family is BERT else images(100)
    dense = final_states(model, family, unseen)
    with cut(apply_weights(model, weights), family, heads, neurons) as smaller:
        return float((final_states(smaller, family, unseen) - dense).square().mean() / dense.var())


def test_it_brings_the_final_hidden_states_nearer_to_dense_on_unseen_data(case: Case) -> None:
    model, family, width, data = case
    heads: Kept = ((0, 2), (1, 2))
    neurons: Kept = (tuple(range(0, width, 2)), tuple(range(1, width, 2)))
    weights = compensate(model, resolve(model), plan_of(model, heads, neurons), data(0))
    without = error_after(model, family, {}, neurons, heads)
    limit = 0.9 if family is SWIGLU else 0.75  # products of random gates hardly tell of each other
    assert error_after(model, family, weights, neurons, heads) < limit * without
    assert without > 0.01, "the cut hurts"


def test_ignoring_layer_scale_would_be_visibly_worse() -> None:
    """All heads of the first layer go; its FFN can see in x' what they did (one patch an image), and make up for it."""
    model = dinov2(size=4, widening=4, scales=(0.05, 0.2))
    heads: Kept = ((), tuple(range(HEADS)))
    neurons: Kept = (tuple(range(4 * HIDDEN)),) * LAYERS
    layout, unseen = resolve(model), [image_batch(100, seed=1, size=4)]

    def error(layout: ModelLayout) -> float:
        plan = PruningPlan(heads, neurons, layout.hash, 100, 60, 10, 8)
        weights = compensate(model, layout, plan, [image_batch(300, size=4)])
        with cut(apply_weights(model, weights), DINOV2, heads, neurons) as smaller:
            return float((final_states(smaller, DINOV2, unseen) - final_states(model, DINOV2, unseen)).square().mean())

    blind = [
        replace(each, attention=replace(each.attention, scale=None), ffn=replace(each.ffn, scale=None))
        for each in layout.layers
    ]
    assert error(replace(layout, layers=tuple(blind))) > 1.4 * error(layout)


def test_a_layer_scale_of_zero_leaves_the_projection_as_it_was() -> None:
    model = dinov2()
    with torch.no_grad():
        model.get_parameter("encoder.layer.0.layer_scale1.lambda1")[3] = 0
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), images(0))
    path = "encoder.layer.0.attention.o_proj"
    assert torch.equal(found[f"{path}.weight"][3], model.get_parameter(f"{path}.weight")[3])
    assert all(bool(torch.isfinite(entry).all()) for entry in found.values())


# --- edges ----------------------------------------------------------------------------------------------------


def test_with_nothing_cut_it_changes_nothing(case: Case) -> None:
    model, family, width, data = case
    plan = plan_of(model, (tuple(range(HEADS)),) * LAYERS, (tuple(range(width)),) * LAYERS)
    found = compensate(model, resolve(model), plan, data(0))
    outputs, ffn_inputs, qkv = 4 * LAYERS, 2 * len(INPUTS[family]["neurons"]) * LAYERS, 6 * (LAYERS - 1)
    assert len(found) == outputs + ffn_inputs + qkv
    for name, entry in found.items():
        torch.testing.assert_close(entry, model.state_dict()[name], rtol=0, atol=1e-6)


def test_an_emptied_branch_gets_the_mean_of_its_target_as_bias(case: Case) -> None:
    model, family, _, data = case
    batches = data(0)
    path = family.columns(0, "heads", 0)[0]
    found = compensate(model, resolve(model), plan_of(model, ((), (0,)), ((), (1, 2))), batches)
    projection = model.get_submodule(path)
    with torch.no_grad():
        target = projection(torch.from_numpy(np.concatenate(projection_inputs(model, path, batches))))
    torch.testing.assert_close(found[f"{path}.bias"], target.mean(0), rtol=1e-6, atol=1e-9)
    assert torch.equal(found[f"{path}.weight"], projection.weight)


def test_an_emptied_ffn_after_an_emptied_attention_aims_at_the_dense_stream(case: Case) -> None:
    model, family, _, data = case
    batches = data(0)
    found = compensate(model, resolve(model), plan_of(model, ((), (0,)), ((), (1, 2))), batches)
    attention, ffn = (family.columns(0, kind, 0)[0] for kind in ("heads", "neurons"))
    student = copy.deepcopy(model)
    set_columns(student, found, attention, [])
    _, target = inputs_and_target(model, student, family, batches, 0, "neurons")
    emptied = [path for kind in ("heads", "neurons") for path in input_paths(family, 0, kind)]
    assert not {f"{path}.weight" for path in emptied} & set(found), "nothing reads for a branch without units"
    np.testing.assert_allclose(found[f"{ffn}.bias"].numpy(), np.concatenate(target).mean(0), rtol=1e-6, atol=1e-9)


def test_padding_and_batching_do_not_enter() -> None:
    model = bert()
    layout, plan = resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS)
    batches = texts(0)
    base = compensate(model, layout, plan, batches)
    singles = [rows(batch, [i]) for batch in batches for i in range(len(batch["input_ids"]))]
    for other in ([padded(batch, 3) for batch in batches], singles):
        for name, entry in compensate(model, layout, plan, other).items():
            torch.testing.assert_close(entry, base[name], rtol=1e-6, atol=1e-6)
    fewer = compensate(model, layout, plan, batches[:3])
    assert not torch.allclose(fewer[next(iter(base))], base[next(iter(base))], rtol=1e-3), "the data do matter"


def test_rows_and_columns_of_cut_units_and_all_other_parameters_are_untouched(case: Case) -> None:
    model, family, _, data = case
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), data(0))
    expected = set()
    for layer in range(LAYERS):
        for kind, kept in (("heads", HALF_HEADS[layer]), ("neurons", HALF_NEURONS[layer])):
            path = family.columns(layer, kind, 0)[0]
            expected |= {f"{path}.weight", f"{path}.bias"}
            dense, new = model.get_submodule(path).weight, found[f"{path}.weight"]
            columns = columns_of(family, layer, kind, kept)
            gone = sorted(set(range(dense.shape[1])) - set(columns))
            assert gone
            assert torch.equal(new[:, gone], dense[:, gone])
            assert not torch.allclose(new[:, columns], dense[:, columns], rtol=1e-3)
            for read in input_paths(family, layer, kind) if (layer, kind) != (0, "heads") else []:
                expected |= {f"{read}.weight", f"{read}.bias"}
                for name in ("weight", "bias"):
                    before, after = model.get_parameter(f"{read}.{name}"), found[f"{read}.{name}"]
                    cut_rows = sorted(set(range(len(before))) - set(columns))
                    assert torch.equal(after[cut_rows], before[cut_rows])
                    assert not torch.allclose(after[columns], before[columns], rtol=1e-3)
    assert set(found) == expected


def test_the_model_is_untouched(case: Case) -> None:
    model, _, _, data = case
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), data(0)[:1])
    assert state_of(model) == before
    assert not any(entry.requires_grad for entry in found.values())
    changed = apply_weights(model, found)
    assert state_of(model) == before
    assert all(torch.equal(changed.state_dict()[name], entry) for name, entry in found.items())


@pytest.mark.parametrize("where", ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self"])
def test_an_error_in_a_forward_leaves_the_model_as_it_was(where: str) -> None:
    model = bert()
    calls = 0

    def fail(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    model.train()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), texts(0))
    assert state_of(model) == before
    hook.remove()


def test_a_projection_without_bias_is_solved_without_centring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    path = "bert.encoder.layer.0.attention.output.dense"
    weight = model.get_submodule(path).weight.detach()
    projection = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.float64)
    projection.weight = nn.Parameter(weight.clone())
    model.set_submodule(path, projection)
    monkeypatch.setattr(module, "RIDGES", (0.03,))
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), texts(0))
    assert f"{path}.bias" not in found
    columns = columns_of(BERT, 0, "heads", HALF_HEADS[0])
    full = np.concatenate(projection_inputs(model, path, texts(0)))
    a, start = full[:, columns], weight.numpy()[:, columns]
    covariance = a.T @ a / len(a)
    covariance += 0.03 * covariance.diagonal().mean() * np.eye(len(columns))
    change = np.linalg.solve(covariance, a.T @ (full @ weight.numpy().T - a @ start.T) / len(a))
    np.testing.assert_allclose(found[f"{path}.weight"].numpy()[:, columns], start + change.T, rtol=1e-6, atol=1e-9)


def test_input_projections_of_which_one_has_no_bias_are_solved_without_centring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An offset that one of them cannot take would be missing there."""
    model = bert()
    paths = input_paths(BERT, 1, "heads")
    weights = [model.get_parameter(f"{path}.weight").detach() for path in paths]
    key = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.float64)
    key.weight = nn.Parameter(weights[1].clone())
    model.set_submodule(paths[1], key)
    monkeypatch.setattr(module, "RIDGES", (0.03,))
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), texts(0))
    assert f"{paths[1]}.bias" not in found
    for path in (paths[0], paths[2]):
        assert torch.equal(found[f"{path}.bias"], model.get_parameter(f"{path}.bias"))
    student = copy.deepcopy(model)
    for kind, kept in (("heads", HALF_HEADS[0]), ("neurons", HALF_NEURONS[0])):
        columns = columns_of(BERT, 0, kind, kept)
        for path in input_paths(BERT, 0, kind) if kind == "neurons" else []:
            set_rows(student, found, path, columns)
        set_columns(student, found, BERT.columns(0, kind, 0)[0], columns)
    z, seen = (np.concatenate(projection_inputs(m, paths[0], texts(0))) for m in (model, student))
    covariance = seen.T @ seen / len(seen)
    covariance += 0.03 * covariance.diagonal().mean() * np.eye(HIDDEN)
    mapped = np.linalg.solve(covariance, seen.T @ (z - seen) / len(seen)).T
    rows_kept = columns_of(BERT, 1, "heads", HALF_HEADS[1])
    for path, weight in zip(paths, weights, strict=True):
        start = weight.numpy()[rows_kept]
        new = found[f"{path}.weight"].numpy()[rows_kept]
        np.testing.assert_allclose(new, start + start @ mapped, rtol=1e-6, atol=1e-9)


def test_an_emptied_projection_without_bias_gets_none() -> None:
    model = bert()
    path = "bert.encoder.layer.0.attention.output.dense"
    projection = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.float64)
    model.set_submodule(path, projection)
    found = compensate(model, resolve(model), plan_of(model, ((), (0,)), ((0,), (1,))), texts(0))
    assert f"{path}.bias" not in found
    assert torch.equal(found[f"{path}.weight"], projection.weight)


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_few_samples_are_enough_to_get_finite_weights(samples: int) -> None:
    """Below five samples nothing is held out, and the middle ridge is taken."""
    model = bert()
    batch = rows(text_batch((2, 1, 3, 2, 4)), list(range(samples)))
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), [batch])
    assert all(bool(torch.isfinite(entry).all()) for entry in found.values())


def test_a_single_token_is_enough() -> None:
    model = bert()
    found = compensate(model, resolve(model), plan_of(model, HALF_HEADS, HALF_NEURONS), [text_batch((1,))])
    assert all(bool(torch.isfinite(entry).all()) for entry in found.values())


def test_inputs_that_never_vary_leave_the_columns_as_they_were() -> None:
    model = bert()
    plan = plan_of(model, HALF_HEADS, HALF_NEURONS)
    found = compensate(model, resolve(model), plan, [text_batch((1,))] * 6)
    for name, entry in found.items():
        if name.endswith("weight"):
            torch.testing.assert_close(entry, model.state_dict()[name], rtol=0, atol=1e-3)


def test_progress_counts_layers() -> None:
    model = bert()
    seen: list[tuple[int, int]] = []
    plan = plan_of(model, HALF_HEADS, HALF_NEURONS)
    compensate(model, resolve(model), plan, texts(0)[:1], progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(PlanMismatch):
        compensate(bert(), resolve(bert()), plan_of(vit(), HALF_HEADS, HALF_NEURONS), texts(0))


def test_float32_models_get_float32_weights_that_agree_with_float64() -> None:
    model = bert()
    plan = plan_of(model, HALF_HEADS, HALF_NEURONS)
    wanted = compensate(model, resolve(model), plan, texts(0))
    found = compensate(model.float(), resolve(model), plan, texts(0))
    assert all(entry.dtype == torch.float32 for entry in found.values())
    for name, entry in found.items():
        torch.testing.assert_close(entry.double(), wanted[name], rtol=1e-3, atol=1e-4)
