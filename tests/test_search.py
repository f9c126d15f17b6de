"""The search finds what enumerating every subset finds, and never exceeds the budget."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_scoring import toy_layout

from optin_deploy.budget import Budget
from optin_deploy.cost.macs import MacCost
from optin_deploy.curves import Curve, Curves
from optin_deploy.errors import BadInput, InfeasibleBudget, PlanMismatch
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks
from optin_deploy.scoring import Scores
from optin_deploy.search import make_plan, search, search_within

Values = list[list[float]]
Problem = tuple[Scores, ModelLayout, MacCost]


def problem(
    heads: Values, neurons: Values, *, head: list[int] | int = 7, neuron: list[int] | int = 2, fixed: int = 5
) -> Problem:
    """Scores and costs of a toy model; a single cost holds for all layers."""
    layout = toy_layout(tuple(map(len, heads)), tuple(map(len, neurons)))
    scores = Scores(
        tuple(torch.tensor(x, dtype=torch.float64) for x in heads),
        tuple(torch.tensor(x, dtype=torch.float64) for x in neurons),
        layout.hash,
        {},
    )
    head_costs = (head,) * len(heads) if isinstance(head, int) else tuple(head)
    neuron_costs = (neuron,) * len(neurons) if isinstance(neuron, int) else tuple(neuron)
    prunable = sum(c * len(x) for c, x in zip((*head_costs, *neuron_costs), (*heads, *neurons), strict=True))
    return scores, layout, MacCost(fixed, head_costs, neuron_costs, fixed + prunable, 4)


def random_problem(seed: int, heads: tuple[int, ...], neurons: tuple[int, ...]) -> Problem:
    """Heads are worth more than neurons, as in real models; every score differs."""
    rng = np.random.default_rng(seed)
    return problem([(3 * rng.random(n)).tolist() for n in heads], [rng.random(n).tolist() for n in neurons])


def counts(masks: Masks) -> tuple[list[int], list[int]]:
    return [sum(keep) for keep in masks.heads], [sum(keep) for keep in masks.neurons]


def total(masks: Masks, scores: Scores) -> float:
    kept = zip((*masks.heads, *masks.neurons), (*scores.heads, *scores.neurons), strict=True)
    return sum(float(values[torch.tensor(keep)].sum()) for keep, values in kept)


def subsets(values: tuple[torch.Tensor, ...]) -> list[tuple[float, list[int]]]:
    """Score and units per layer of every subset of all units."""
    found = []
    for bits in itertools.product((0, 1), repeat=sum(map(len, values))):
        at, score, sizes = 0, 0.0, []
        for layer in values:
            chosen = np.array(bits[at : at + len(layer)])
            score += float((layer.numpy() * chosen).sum())
            sizes.append(int(chosen.sum()))
            at += len(layer)
        found.append((score, sizes))
    return found


def brute_force(scores: Scores, cost: MacCost, limit: int, align: int, allocation: str) -> float:
    """Largest total score of any admissible subset of heads and of neurons within `limit` MACs."""

    def admissible(sizes: list[int], widths: list[int], step: int) -> bool:
        whole = all(n % step == 0 or n == w for n, w in zip(sizes, widths, strict=True))
        return whole and (allocation == "paper" or len(set(sizes)) == 1)

    parts = []
    for values, costs, step in ((scores.heads, cost.head, 1), (scores.neurons, cost.neuron, align)):
        widths = list(map(len, values))
        chosen = [(score, sizes) for score, sizes in subsets(values) if admissible(sizes, widths, step)]
        spent = np.array([sum(c * n for c, n in zip(costs, sizes, strict=True)) for _, sizes in chosen])
        parts.append((np.array([score for score, _ in chosen]), spent))
    (head_score, head_cost), (neuron_score, neuron_cost) = parts
    pairs = head_score[:, None] + neuron_score[None]
    pairs[head_cost[:, None] + neuron_cost[None] + cost.fixed > limit] = -np.inf
    return float(pairs.max())


@pytest.mark.parametrize("allocation", ["paper", "uniform"])
@pytest.mark.parametrize(
    ("neurons", "align"), [((4, 4), 1), ((4, 4), 2), ((3, 3), 1)], ids=["4 by 1", "4 by 2", "3 by 1"]
)
def test_search_equals_brute_force_over_all_subsets(neurons: tuple[int, ...], align: int, allocation: str) -> None:
    for seed in range(4):
        scores, layout, cost = random_problem(seed, (3, 3), neurons)
        for limit in range(cost.fixed, cost.dense + 1, 3):
            masks = search(scores, layout, cost, Budget(limit, relative=False), align=align, allocation=allocation)
            best = brute_force(scores, cost, limit, align, allocation)
            assert total(masks, scores) == pytest.approx(best, rel=1e-12), f"seed {seed}, {limit} MACs"
            assert cost.of(*counts(masks)) <= limit


def test_uniform_with_a_last_group_smaller_than_align_equals_brute_force() -> None:
    for seed in range(4):
        scores, layout, cost = random_problem(seed, (3, 3), (3, 3))
        for limit in range(cost.fixed, cost.dense + 1):
            masks = search(scores, layout, cost, Budget(limit, relative=False), align=2, allocation="uniform")
            assert total(masks, scores) == pytest.approx(brute_force(scores, cost, limit, 2, "uniform"), rel=1e-12)


def test_paper_with_unequal_layers_equals_brute_force() -> None:
    for seed in range(4):
        scores, layout, cost = random_problem(seed, (3, 1), (2, 5))
        for limit in range(cost.fixed, cost.dense + 1, 3):
            masks = search(scores, layout, cost, Budget(limit, relative=False), align=1, allocation="paper")
            assert total(masks, scores) == pytest.approx(brute_force(scores, cost, limit, 1, "paper"), rel=1e-12)


def test_paper_ranks_by_score_per_mac_when_layers_cost_differently() -> None:
    """Independent: for every number of heads, the densest heads, then the densest neurons while they fit."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        heads, neurons = (rng.random((2, n)) for n in (3, 4))
        scores, layout, cost = problem(heads.tolist(), neurons.tolist(), head=[11, 5], neuron=[1, 3])

        def ranked(values: np.ndarray, costs: tuple[int, ...]) -> list[tuple[float, int]]:
            units = [(float(v), c) for row, c in zip(values, costs, strict=True) for v in row]
            return sorted(units, key=lambda unit: unit[0] / unit[1], reverse=True)

        for limit in range(cost.fixed, cost.dense + 1, 2):
            best = -1.0
            for number in range(7):
                taken = ranked(heads, cost.head)[:number]
                left = limit - cost.fixed - sum(c for _, c in taken)
                if left < 0:
                    continue
                value = sum(v for v, _ in taken)
                for v, c in ranked(neurons, cost.neuron):
                    if c > left:
                        break
                    value, left = value + v, left - c
                best = max(best, value)
            masks = search(scores, layout, cost, Budget(limit, relative=False), align=1, allocation="paper")
            assert total(masks, scores) == pytest.approx(best, rel=1e-12)
            assert cost.of(*counts(masks)) <= limit


def test_a_global_ranking_starves_a_weak_layer_and_uniform_does_not() -> None:
    scores, layout, cost = problem([[9.0, 8.0], [2.0, 1.0]], [[0.9, 0.8, 0.7, 0.6], [0.4, 0.3, 0.2, 0.1]])
    budget = Budget(cost.fixed + 2 * 7 + 4 * 2, relative=False)
    assert counts(search(scores, layout, cost, budget, align=1, allocation="paper")) == ([2, 0], [4, 0])
    assert counts(search(scores, layout, cost, budget, align=1, allocation="uniform")) == ([1, 1], [2, 2])


def test_scores_alone_are_searched_uniformly_and_sixteen_is_the_default_alignment() -> None:
    scores, layout, cost = problem([[1.0]] * 2, [list(np.linspace(1, 2, 40)), list(np.linspace(3, 4, 40))])
    masks = search(scores, layout, cost, Budget(0.7))
    assert masks == search(scores, layout, cost, Budget(0.7), align=16, allocation="uniform")
    assert counts(masks)[1] == [16, 16]


def test_uniform_layers_of_different_size_advance_in_proportion() -> None:
    scores, layout, cost = random_problem(0, (4, 2), (8, 4))
    seen = set()
    for limit in range(cost.fixed, cost.dense + 1):
        heads, neurons = counts(search(scores, layout, cost, Budget(limit, relative=False), align=1))
        assert heads[1] == heads[0] // 2
        assert neurons[1] == neurons[0] // 2
        seen.add((*heads, *neurons))
    assert len(seen) > 8
    assert (4, 2, 8, 4) in seen


units = st.integers(0, 9).map(float)  # whole numbers: many ties
layers = st.integers(1, 3).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(units, min_size=1, max_size=4), min_size=n, max_size=n),
        st.lists(st.lists(units, min_size=1, max_size=9), min_size=n, max_size=n),
        st.lists(st.integers(1, 30), min_size=n, max_size=n),
        st.lists(st.integers(1, 9), min_size=n, max_size=n),
    )
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    layers=layers,
    align=st.integers(1, 5),
    share=st.floats(0, 1),
    fixed=st.integers(0, 40),
    allocation=st.sampled_from(["uniform", "paper", "curves"]),
)
def test_any_plan_is_within_the_budget_aligned_and_keeps_the_best_units_of_each_layer(
    layers: tuple[Values, Values, list[int], list[int]], align: int, share: float, fixed: int, allocation: str
) -> None:
    heads, neurons, head_costs, neuron_costs = layers
    scores, layout, cost = problem(heads, neurons, head=head_costs, neuron=neuron_costs, fixed=fixed)
    limit = max(1, cost.fixed + math.floor(share * (cost.dense - cost.fixed)))
    curves = random_curves(layout, fixed)
    budget = Budget(limit, relative=False)
    masks = search(scores, layout, cost, budget, align=align, allocation=allocation, curves=curves)
    spent = fixed
    for keeps, all_values, costs, step in (
        (masks.heads, heads, head_costs, 1),
        (masks.neurons, neurons, neuron_costs, align),
    ):
        for keep, values, unit in zip(keeps, all_values, costs, strict=True):
            assert len(keep) == len(values)
            assert sum(keep) % step == 0 or sum(keep) == len(values)
            kept, cut = ([v for v, k in zip(values, keep, strict=True) if k is side] for side in (True, False))
            assert min(kept, default=math.inf) >= max(cut, default=-math.inf)
            spent += unit * len(kept)
    assert spent <= limit
    assert make_plan(masks, layout, cost).macs_pruned == spent
    assert masks.layout_hash == layout.hash


def random_curves(layout: ModelLayout, seed: int) -> Curves:
    """Curves of a layout, measured at every other width."""
    rng = np.random.default_rng(seed)

    def curve(units: int) -> Curve:
        counts = sorted({*range(0, units, 2), units})
        errors = sorted(rng.random(len(counts) - 1).tolist(), reverse=True)
        return Curve(tuple(counts), (*errors, 0.0))

    heads, neurons = (tuple(curve(getattr(layer, kind)) for layer in layout.layers) for kind in ("heads", "neurons"))
    return Curves(heads, neurons, layout.hash)


@pytest.mark.parametrize("align", [1, 2, 3])
def test_curves_give_the_widths_of_least_summed_error(align: int) -> None:
    for seed in range(4):
        scores, layout, cost = random_problem(seed, (3, 2), (5, 4))
        curves = random_curves(layout, seed)
        every = (*curves.heads, *curves.neurons)
        widths = [range(4), range(3), *({*range(0, n + 1, align), n} for n in (5, 4))]
        for limit in range(cost.fixed, cost.dense + 1, 3):
            budget = Budget(limit, relative=False)
            masks = search(scores, layout, cost, budget, align=align, allocation="curves", curves=curves)
            errors = {
                chosen: sum(float(curve.at([n])[0]) for curve, n in zip(every, chosen, strict=True))
                for chosen in itertools.product(*widths)
                if cost.of(chosen[:2], chosen[2:]) <= limit
            }
            heads, neurons = counts(masks)
            assert errors[(*heads, *neurons)] == pytest.approx(min(errors.values()), abs=1e-5)


def test_where_no_branch_may_be_emptied_the_widths_are_the_best_of_all_others() -> None:
    emptied = 0
    for seed in range(4):
        scores, layout, cost = random_problem(seed, (3, 2), (5, 4))
        curves = random_curves(layout, seed)
        every = (*curves.heads, *curves.neurons)
        widths = [range(1, 4), range(1, 3), (2, 4, 5), (2, 4)]
        for limit in range(cost.fixed, cost.dense + 1, 3):
            find = partial(search_within, scores, layout, [(cost, limit)], align=2, allocation="curves", curves=curves)
            emptied += 0 in {n for some in counts(find()) for n in some}
            errors = {
                chosen: sum(float(curve.at([n])[0]) for curve, n in zip(every, chosen, strict=True))
                for chosen in itertools.product(*widths)
                if cost.of(chosen[:2], chosen[2:]) <= limit
            }
            if not errors:
                with pytest.raises(InfeasibleBudget, match="no room for a unit in every branch"):
                    find(emptying=False)
                continue
            heads, neurons = counts(find(emptying=False))
            assert errors[(*heads, *neurons)] == pytest.approx(min(errors.values()), abs=1e-5)
    assert emptied > 10, "it makes a difference"


def test_curves_must_be_given_and_of_this_layout() -> None:
    scores, layout, cost = random_problem(0, (3, 3), (4, 4))
    with pytest.raises(BadInput, match="needs error curves"):
        search(scores, layout, cost, Budget(0.5), allocation="curves")
    other = random_curves(toy_layout((3, 3), (4, 4), "other"), 0)
    with pytest.raises(BadInput, match="another model"):
        search(scores, layout, cost, Budget(0.5), allocation="curves", curves=other)


@pytest.mark.parametrize(("score", "width", "align"), [(0.1, 7, 6), (0.1, 8, 7), (1 / 3, 20, 16)])
def test_equal_scores_that_are_no_whole_numbers_do_not_break_the_budget(score: float, width: int, align: int) -> None:
    scores, layout, cost = problem([[1.0]], [[score] * width], head=1, neuron=1, fixed=0)
    for limit in range(1, cost.dense + 1):
        masks = search(scores, layout, cost, Budget(limit, relative=False), align=align, allocation="paper")
        assert cost.of(*counts(masks)) <= limit


@pytest.mark.parametrize("allocation", ["paper", "uniform"])
@pytest.mark.parametrize("align", [1, 4, 64])
def test_the_whole_budget_keeps_everything(allocation: str, align: int) -> None:
    scores, layout, cost = random_problem(1, (3, 2), (9, 6))
    masks = search(scores, layout, cost, Budget(1.0), align=align, allocation=allocation)
    assert masks == Masks.all_kept(layout)
    assert make_plan(masks, layout, cost).kept == 1


@pytest.mark.parametrize("allocation", ["paper", "uniform"])
def test_the_whole_budget_keeps_units_of_score_zero_too(allocation: str) -> None:
    scores, layout, cost = problem([[2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    assert search(scores, layout, cost, Budget(1.0), align=1, allocation=allocation) == Masks.all_kept(layout)


@pytest.mark.parametrize("allocation", ["paper", "uniform"])
def test_a_budget_of_the_fixed_cost_alone_keeps_nothing(allocation: str) -> None:
    scores, layout, cost = random_problem(1, (3, 3), (4, 4))
    masks = search(scores, layout, cost, Budget(cost.fixed, relative=False), align=1, allocation=allocation)
    assert counts(masks) == ([0, 0], [0, 0])


@pytest.mark.parametrize("allocation", ["paper", "uniform"])
def test_of_equal_units_the_first_ones_stay(allocation: str) -> None:
    values = [float(u % 3) for u in range(400)]
    scores, layout, cost = problem([[1.0] * 3] * 2, [values] * 2)
    cut_between_equals = False
    for share in (0.2, 0.5, 0.8):
        for keep in search(scores, layout, cost, Budget(share), align=1, allocation=allocation).neurons:
            for value in set(values):
                equals = [k for k, v in zip(keep, values, strict=True) if v == value]
                assert equals == sorted(equals, reverse=True)
                cut_between_equals |= 0 < sum(equals) < len(equals)
    assert cut_between_equals


def test_the_search_leaves_the_scores_alone() -> None:
    scores, layout, cost = random_problem(0, (3, 3), (4, 4))
    before = [values.clone() for values in (*scores.heads, *scores.neurons)]
    search(scores, layout, cost, Budget(0.5), align=1, allocation="paper")
    assert all(torch.equal(a, b) for a, b in zip(before, (*scores.heads, *scores.neurons), strict=True))


# --- budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf, 0.0, -0.5, 1.0001, 60.0])
def test_a_share_outside_zero_to_one_is_refused_with_the_value(share: float) -> None:
    with pytest.raises(BadInput, match=re.escape(f"--flops {share}: give the share to keep, in (0, 1]")):
        Budget(share)


@pytest.mark.parametrize("limit", [math.nan, math.inf, 0.0, -3.0])
def test_an_absolute_limit_must_be_finite_and_positive(limit: float) -> None:
    with pytest.raises(BadInput):
        Budget(limit, relative=False)
    assert Budget(5000, relative=False).limit == 5000


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.6, 0.999, 1.0])
def test_a_share_becomes_macs_rounded_down(share: float) -> None:
    cost = MacCost(10, (1,), (1,), 997, 4)
    assert Budget(share).within(cost) == int(share * 997)


def infeasible_then_least(cost: MacCost, share: float) -> int:
    """Ask for too little; take the value that the message offers."""
    with pytest.raises(InfeasibleBudget, match="unprunable layers alone") as caught:
        Budget(share).within(cost)
    found = re.search(r"Use --flops (\d\.\d+) or more", str(caught.value))
    assert found, str(caught.value)
    assert float(found[1]) <= cost.fixed / cost.dense + 0.01 + 1e-9, "the least, to the second digit"
    return Budget(float(found[1])).within(cost)


@pytest.mark.parametrize(
    ("fixed", "dense"), [(270, 1001), (1, 997), (123_456_789, 987_654_321), (99, 100), (50, 100), (996, 997)]
)
def test_a_budget_below_the_fixed_cost_names_the_least_possible_and_that_one_works(fixed: int, dense: int) -> None:
    cost = MacCost(fixed, (1,), (1,), dense, 4)
    assert fixed <= infeasible_then_least(cost, fixed / dense * 0.9) <= dense


@pytest.mark.parametrize(
    "dense",
    [
        100,
        10**9,
        10**11,
    ],
)
def test_the_least_possible_share_works_when_it_is_a_whole_percent(dense: int) -> None:
    """In floating point 0.29 * 100 is less than 29."""
    for percent in (29, 57, 58):
        fixed = percent * dense // 100
        assert infeasible_then_least(MacCost(fixed, (1,), (1,), dense, 4), 0.2) == fixed


def test_the_search_refuses_an_infeasible_budget() -> None:
    scores, layout, cost = problem([[1.0]], [[1.0]], fixed=50)
    with pytest.raises(InfeasibleBudget, match=r"0\.492 of the dense model, but.*Use --flops 0\.85"):
        search(scores, layout, cost, Budget(0.5))


# --- bad input ------------------------------------------------------------------------------------------------


def test_an_unknown_allocation_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(BadInput, match="'global'; possible: curves, uniform, paper"):
        search(*random_problem(0, (3, 3), (4, 4)), Budget(0.5), allocation="global")


@pytest.mark.parametrize("align", [0, -16])
def test_an_alignment_below_one_is_refused(align: int) -> None:
    with pytest.raises(BadInput, match=f"--align {align}: give a positive number"):
        search(*random_problem(0, (3, 3), (4, 4)), Budget(0.5), align=align)


@pytest.mark.parametrize("other", [toy_layout((3, 3), (4, 4), "other"), toy_layout((3, 3), (4, 5))])
def test_scores_of_another_layout_are_refused(other: ModelLayout) -> None:
    scores, _, cost = random_problem(0, (3, 3), (4, 4))
    with pytest.raises(PlanMismatch, match=other.hash[:12]):
        search(scores, other, cost, Budget(0.5))


def test_scores_with_the_right_hash_but_wrong_counts_are_refused() -> None:
    scores, layout, cost = random_problem(0, (3, 3), (4, 4))
    short = Scores(scores.heads, (scores.neurons[0], scores.neurons[1][:3]), layout.hash, {})
    with pytest.raises(PlanMismatch):
        search(short, layout, cost, Budget(0.5))


# --- plans ----------------------------------------------------------------------------------------------------


def test_a_plan_holds_the_indices_of_the_masks_and_the_exact_cost() -> None:
    _, layout, cost = random_problem(0, (3, 2), (4, 2))
    masks = Masks(((True, False, True), (False, False)), ((False, True, True, True), (True, False)), layout.hash)
    plan = make_plan(masks, layout, cost)
    assert plan.heads == ((0, 2), ())
    assert plan.neurons == ((1, 2, 3), (0,))
    assert all(type(unit) is int for kept in (*plan.heads, *plan.neurons) for unit in kept), "JSON has no numpy"
    assert plan.macs_pruned == 5 + 2 * 7 + 4 * 2
    assert (plan.macs_dense, plan.macs_fixed, plan.tokens) == (5 + 5 * 7 + 6 * 2, 5, 4)
    assert plan.kept == 27 / 52
    assert plan.prunable_kept == 22 / 47
    assert plan.masks(layout) == masks
