"""Budgets of parameters and bytes, and several at once: counted on the model that is really cut."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, SEQ_LEN, random_plan, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import counts, random_curves, random_problem, total
from torch import nn

import optin_deploy
from optin_deploy.arch.resolve import resolve
from optin_deploy.budget import DEFAULT_FLOPS, Limits
from optin_deploy.cost.params import count_params, param_cost
from optin_deploy.cost.units import UnitCost
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring import ScoreSettings
from optin_deploy.search import search_within

MACS = UnitCost(10, (5, 5), (2, 2), 70)
PARAMS = UnitCost(40, (3, 3), (2, 2), 90)


@pytest.mark.parametrize(
    "lost", [{}, {"no_heads": (1,)}, {"no_neurons": (0, 2)}, {"no_heads": (0,), "no_neurons": (0,)}]
)
@pytest.mark.parametrize("name", ALL)
def test_counted_parameters_are_those_of_the_smaller_model(name: str, lost: dict[str, tuple[int, ...]]) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    cost = param_cost(model, layout)
    assert cost.dense == sum(p.numel() for p in model.parameters())
    plan = random_plan(model, layout, seed=6, **lost)
    smaller = rewrite_torch(model, layout, plan)
    predicted = cost.of([len(kept) for kept in plan.heads], [len(kept) for kept in plan.neurons])
    assert predicted == sum(p.numel() for p in smaller.parameters())


def test_an_emptied_branch_without_a_bias_has_no_parameter() -> None:
    model = tiny_model("bert")
    layout = resolve(model)
    layer = layout.layers[1]
    for path in (layer.attention.output, layer.ffn.output):
        model.get_submodule(path).bias = None
    plan = random_plan(model, layout, seed=6, no_heads=(1,), no_neurons=(1,))
    smaller = rewrite_torch(model, layout, plan)
    predicted = param_cost(model, layout).of([len(kept) for kept in plan.heads], [len(kept) for kept in plan.neurons])
    assert predicted == sum(p.numel() for p in smaller.parameters())


@pytest.mark.usefixtures("one_thread")
def test_a_pruned_model_stays_within_its_shares_and_its_bytes(tmp_path: Path) -> None:
    model = tiny_model("bert")
    few = ScoreSettings(probes=2, head_samples=2)
    dense = sum(p.numel() for p in model.parameters())
    # The embeddings, which nobody can cut, are 10,000 of 100,000.
    for params, size in ((0.5, None), (None, 2 * dense), (0.7, 2 * dense)):
        smaller = optin_deploy.prune(
            model, tiny_batches(model), params=params, size=size, seq_len=SEQ_LEN, align=8, settings=few
        )
        kept = smaller.report["params"]["pruned"]
        least = min(params or 1, (size or 4 * dense) / 4 / dense)
        assert 0.9 * least * dense < kept <= least * dense
        if size is not None:
            smaller.save(tmp_path / f"{params}")
            (weights,) = (tmp_path / f"{params}").glob("*.safetensors")
            assert 0 <= weights.stat().st_size - 4 * kept < 20_000  # the header, and position ids


def limited(heads: tuple[int, ...], neurons: tuple[int, ...], seed: int) -> tuple[UnitCost, int]:
    """A cost that is the same in all layers, and a limit that some plans keep."""
    rng = np.random.default_rng(seed)
    fixed, head, neuron = (int(n) for n in rng.integers(1, 9, 3))
    dense = fixed + head * sum(heads) + neuron * sum(neurons)
    cost = UnitCost(fixed, (head,) * len(heads), (neuron,) * len(neurons), dense)
    return cost, int(rng.integers(fixed, dense + 1))


@pytest.mark.parametrize("seed", range(30))
def test_under_two_limits_the_search_finds_the_best_pair_of_both(seed: int) -> None:
    sizes = ((3, 3), (4, 4))
    scores, layout, _ = random_problem(seed, *sizes)
    limits = [limited(*sizes, seed), limited(*sizes, 1000 + seed)]
    best = -1.0
    for heads, neurons in itertools.product(range(4), range(5)):  # the same in both layers
        if all(cost.of([heads] * 2, [neurons] * 2) <= limit for cost, limit in limits):
            values = [t.sort(descending=True).values[:heads] for t in scores.heads]
            values += [t.sort(descending=True).values[:neurons] for t in scores.neurons]
            best = max(best, sum(float(v.sum()) for v in values))
    masks = search_within(scores, layout, limits, align=1, allocation="uniform")
    assert total(masks, scores) == pytest.approx(best)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    budgets=st.integers(1, 3),
    align=st.integers(1, 4),
    allocation=st.sampled_from(["uniform", "paper", "curves"]),
)
def test_no_plan_exceeds_any_of_its_limits(seed: int, budgets: int, align: int, allocation: str) -> None:
    sizes = ((3, 2, 4), (7, 4, 6))
    scores, layout, _ = random_problem(seed, *sizes)
    limits = [limited(*sizes, seed + i) for i in range(budgets)]
    curves = random_curves(layout, seed)
    masks = search_within(scores, layout, limits, align=align, allocation=allocation, curves=curves)
    heads, neurons = counts(masks)
    assert all(cost.of(heads, neurons) <= limit for cost, limit in limits)
    # Nothing that fits is left out: where all limits are the dense cost, all is kept.
    whole = [(cost, cost.dense) for cost, _ in limits]
    masks = search_within(scores, layout, whole, align=align, allocation=allocation, curves=curves)
    assert counts(masks) == (list(sizes[0]), list(sizes[1]))


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    scores, layout, cost = random_problem(3, (3, 3), (6, 6))
    curves = random_curves(layout, 3)
    free = UnitCost(1, (1, 1), (1, 1), 19)
    for allocation in ("uniform", "curves"):
        alone = search_within(scores, layout, [(cost, 40)], align=1, allocation=allocation, curves=curves)
        both = search_within(scores, layout, [(cost, 40), (free, 19)], align=1, allocation=allocation, curves=curves)
        assert alone == both


def test_the_default_is_a_share_of_macs_and_only_without_another_limit() -> None:
    assert Limits() == Limits(flops=DEFAULT_FLOPS)
    assert Limits().within(MACS, PARAMS) == [(MACS, 42)]
    assert Limits(params=0.5).within(MACS, PARAMS) == [(PARAMS, 45)]
    found = Limits(flops=0.5, params=0.75, size=300).within(MACS, PARAMS)
    assert found == [(MACS, 35), (PARAMS, 67), (UnitCost(160, (12, 12), (8, 8), 360), 300)]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(), "0.6"),
        (Limits(flops=0.25), "0.25"),
        (Limits(params=0.5), "params0.5"),
        (Limits(flops=0.5, params=0.4, size=3000), "0.5-params0.4-3000B"),
    ],
)
def test_limits_name_a_folder(limits: Limits, name: str) -> None:
    assert str(limits) == name


def test_impossible_limits_say_which_and_what_is_possible() -> None:
    for wrong in ({"params": 0.0}, {"params": 1.5}, {"flops": 0.5, "params": -1.0}):
        with pytest.raises(BadInput, match=rf"--params {wrong['params']}: give the share to keep, in \(0, 1\]"):
            Limits(**wrong)
    with pytest.raises(BadInput, match="--size -3: give a positive amount"):
        Limits(size=-3)
    with pytest.raises(InfeasibleBudget, match=r"--params 0\.3 is 0\.300 .*alone are 0\.444\. Use --params 0\.45"):
        Limits(params=0.3).within(MACS, PARAMS)
    with pytest.raises(InfeasibleBudget, match=r"--size 2\.00MiB is .*Use --size 3907KiB or more"):
        Limits(flops=1.0, size=2 * 2**20).within(MACS, UnitCost(10**6, (3,), (2,), 10**6 + 5))


def test_tied_weights_count_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])
    model[1].weight = model[0].weight

    assert count_params(model) == 24 + 6 + 6


def test_a_share_may_be_any_kind_of_real_number() -> None:
    shares = (Fraction(3, 5), Decimal("0.6"), np.float32(0.6), torch.tensor(0.6, dtype=torch.float64))
    assert [Limits(flops=share).flops for share in shares] == [0.6] * 4  # type: ignore[arg-type]
