"""Widths are the best that enumerating all of them finds, and never over a limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.planning import trading
from optin_deploy.planning.allocate import Options
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import Cost, CostLimit, fits, limits_within
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.ladder import Ladder, best
from optin_deploy.planning.polynomial import Polynomial, Terms
from optin_deploy.planning.pools import by_score, by_share, filled, largest_total, together, widths_of
from optin_deploy.planning.promising import bound
from optin_deploy.planning.trading import least_summed_error
from optin_deploy.planning.widths import ALLOCATIONS, Choice, choose
from optin_deploy.structure.branches import bypassed
from support.tiny_plans import costs_in, falling, layout_of

FAMILIES = ("bert", "llama", "resnet", "mobilenet-v2", "swin")


def toy(terms: Terms, units: Mapping[str, int], option: str = "--flops") -> Cost:
    return Cost(option, Polynomial(terms), (), dict(units))


def ladders(units: Mapping[str, int], step: int = 1, least: int = 1) -> list[Ladder]:
    return [Ladder(name, name[0], (*range(0 if not least else step, many, step), many)) for name, many in units.items()]


def every(some: Sequence[Ladder]) -> Iterator[dict[str, int]]:
    """All widths."""
    for counts in itertools.product(*(each.counts for each in some)):
        yield {each.name: count for each, count in zip(some, counts, strict=True)}


def worth(scores: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> float:
    return sum(float(np.sort(scores[name])[::-1][:count].sum()) for name, count in widths.items())


# uniform and paper


MEETING: Terms = {(): 3, ("h0",): 5, ("n0",): 2, ("h0", "n0"): 3}
"""Two groups whose costs multiply."""


@pytest.mark.parametrize("allocation", ["uniform", "paper"])
def test_two_groups_have_the_pair_of_largest_total_score(allocation: str) -> None:
    units = {"h0": 4, "n0": 7}
    cost, some = toy(MEETING, units), ladders(units)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = {name: rng.random(many) * (3 if name == "h0" else 1) for name, many in units.items()}
        for most in range(cost.total({"h0": 1, "n0": 1}), cost.dense + 1, 2):
            limits = [CostLimit(cost, most, "")]
            pools = [
                by_share([each], scores) if allocation == "uniform" else by_score([each], scores, limits, units)
                for each in some
            ]
            widths = filled(pools, largest_total(pools, limits, units), limits, units)
            expected = max(worth(scores, each) for each in every(some) if cost.total(each) <= most)
            assert cost.total(widths) <= most
            assert worth(scores, widths) == pytest.approx(expected, rel=1e-12)


def test_three_kinds_have_the_largest_total_score_that_two_at_a_time_find() -> None:
    units = {"a0": 4, "b0": 6, "c0": 9}
    cost = toy({(): 1, ("a0",): 9, ("b0",): 4, ("c0",): 1, ("a0", "c0"): 1}, units)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = {name: rng.random(many) * (units["c0"] / many) for name, many in units.items()}
        for most in range(cost.total(dict.fromkeys(units, 1)), cost.dense + 1, 5):
            limits = [CostLimit(cost, most, "")]
            pools = [by_share([each], scores) for each in ladders(units)]
            widths = widths_of(pools, largest_total(pools, limits, units), units)
            even = widths_of(pools, together(pools, limits, units), units)
            assert fits(limits, widths)
            assert worth(scores, widths) >= worth(scores, even)
            for one, other in itertools.combinations(units, 2):  # no two kinds alone can do better
                for widths_, total in ((w, worth(scores, w)) for w in every(ladders(units))):
                    if all(widths_[name] == widths[name] for name in units if name not in (one, other)):
                        assert total <= worth(scores, widths) + 1e-12 or cost.total(widths_) > most


def test_one_share_for_all_groups_of_a_kind() -> None:
    units = {"n0": 8, "n1": 16, "n2": 3}
    cost = toy({("n0",): 1, ("n1",): 1, ("n2",): 1}, units)
    scores = {name: np.arange(many, dtype=float) for name, many in units.items()}
    found = []
    for most in range(3, 28):
        pools = [by_share(ladders(units), scores)]
        limits = [CostLimit(cost, most, "")]
        found.append(widths_of(pools, together(pools, limits, units), units))
    assert {"n0": 4, "n1": 8, "n2": 2} in found
    for widths in found:
        share = widths["n1"] / 16
        assert all(abs(widths[name] - share * many) <= 1 for name, many in units.items())


# one ranking of all units of a kind


@pytest.mark.parametrize("prices", [[7, 7, 2, 2], [9, 4, 1, 3]], ids=["alike", "unlike"])
def test_units_of_a_kind_are_ranked_by_score_per_cost(prices: list[int]) -> None:
    """Each kind keeps the first units of its ranking; what still fits of later ones comes on top."""
    units, more = {"h0": 3, "h1": 4, "n0": 5, "n1": 8}, 0
    price = dict(zip(units, prices, strict=True))
    cost = toy({(): 5, **{(name,): each for name, each in price.items()}}, units)
    some = ladders(units, least=0)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = {name: rng.random(many) * (3 if name[0] == "h" else 1) for name, many in units.items()}
        firsts = [firsts_of(kind, scores, price) for kind in (("h0", "h1"), ("n0", "n1"))]
        for most in range(5, cost.dense + 1):
            limits = [CostLimit(cost, most, "")]
            pools = [by_score(part, scores, limits, units) for part in (some[:2], some[2:])]
            sizes = largest_total(pools, limits, units)
            pairs = [{**one, **other} for one, other in itertools.product(*firsts)]
            expected = max((each for each in pairs if cost.total(each) <= most), key=lambda each: worth(scores, each))
            assert widths_of(pools, sizes, units) == expected
            full = filled(pools, sizes, limits, units)
            assert cost.total(full) <= most
            gained = worth(scores, full) - worth(scores, expected)
            assert gained >= 0
            more += gained > 0
    assert (more > 5) == (prices[0] != prices[1])


def firsts_of(names: Sequence[str], scores: Mapping[str, np.ndarray], price: Mapping[str, int]) -> list[dict[str, int]]:
    """Widths that the first units by score per cost make, for each number of them."""
    ranked = sorted(((score / price[name], name) for name in names for score in scores[name]), reverse=True)
    return [
        {name: sum(other == name for _, other in ranked[:many]) for name in names} for many in range(len(ranked) + 1)
    ]


# error curves


@pytest.mark.parametrize(("least", "many"), [(0, 200), (1, 200), (1, 0)])
def test_curves_of_two_groups_that_meet_have_the_least_error_of_all_widths(
    least: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are too many options for an exact solution of each step."""
    monkeypatch.setattr(trading, "MANY", many)
    units = {"c0": 9, "c1": 7}
    cost = toy({(): 5, ("c0",): 2, ("c1",): 3, ("c0", "c1"): 4}, units)
    some = ladders(units, least=least)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        curves = {name: falling(many, rng) for name, many in units.items()}
        start = {each.name: each.counts[0] for each in some}
        known = [(cost.total(each), summed(curves, each)) for each in every(some)]
        for most in range(cost.total(start), cost.dense + 1, 7):
            widths = least_summed_error(some, curves, [CostLimit(cost, most, "")], start)
            assert cost.total(widths) <= most
            expected = min(error for spent, error in known if spent <= most)
            assert summed(curves, widths) == pytest.approx(expected, abs=1e-9), (seed, most)


def test_what_a_bound_leaves_out_is_in_no_better_choice() -> None:
    rng, fewer = np.random.default_rng(0), 0
    for _ in range(60):
        sizes = rng.integers(2, 5, 4)
        options = [
            Options(np.arange(n), np.sort(rng.random(n))[::-1], np.sort(rng.integers(0, 30, (2, n)), axis=1))
            for n in sizes
        ]
        limits = [int(rng.integers(20, 90)), int(rng.integers(20, 90))]
        found = [
            (sum(float(each.errors[n]) for each, n in zip(options, places, strict=True)), places)
            for places in itertools.product(*map(range, sizes))
            if (sum(each.costs[:, n] for each, n in zip(options, places, strict=True)) <= limits).all()
        ]
        bounded = bound(options, limits)
        if not found or bounded is None:
            assert not found
            continue
        assert bounded.least <= min(found)[0] + 1e-9
        error, known = sorted(found)[len(found) // 4]
        left = bounded.promising(options, error, known)
        fewer += sum(map(int, sizes)) - sum(len(each.counts) for each in left)
        for better in (places for total, places in found if total < error - 1e-7):
            assert all(n in each.counts for n, each in zip(better, left, strict=True))
    assert fewer > 60


def test_curves_within_two_limits_have_the_least_error_of_all_widths() -> None:
    units = {"c0": 6, "c1": 5, "c2": 7}
    cost = toy({("c0", "c1"): 4, ("c1", "c2"): 3, ("c2",): 1}, units)
    other = toy({("c0",): 9, ("c1",): 2, ("c2", "c2"): 1}, units, "--params")
    some, worst = ladders(units), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        curves = {name: falling(many, rng) for name, many in units.items()}
        for share in (0.2, 0.35, 0.5, 0.7, 0.9):
            limits = [CostLimit(cost, int(share * cost.dense), ""), CostLimit(other, int(0.8 * other.dense), "")]
            widths = least_summed_error(some, curves, limits, dict.fromkeys(units, 1))
            assert fits(limits, widths)
            expected = min(summed(curves, each) for each in every(some) if fits(limits, each))
            worst.append(summed(curves, widths) / max(expected, 1e-9))
    assert np.median(worst) == pytest.approx(1, abs=1e-9)
    assert max(worst) < 1.2


def summed(curves: Mapping[str, Curve], widths: Mapping[str, int]) -> float:
    return sum(float(curves[name].error([count])[0]) for name, count in widths.items())


# whole networks


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_limit_is_ever_exceeded(family: str, data: st.DataObject) -> None:
    layout, costs = layout_of(family), costs_in(family)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shares = {
        name: data.draw(st.none() | st.floats(0.25, 1).map(lambda x: round(x, 2))) for name in ("flops", "params")
    }
    size = data.draw(st.none() | st.floats(0.4, 1).map(lambda share: int(share * costs.size.dense)))
    limits = limits_within(costs, Limits(**shares, size=size))
    scores = {
        group.name: rng.gamma(data.draw(st.sampled_from([0.2, 2.0])), size=group.units) for group in layout.groups
    }
    curves = {group.name: falling(group.units, rng) for group in layout.groups}
    kinds = data.draw(
        st.sampled_from([Choice().kinds, ("heads", "groups", "channels"), ("neurons", "channels", "v-width")])
    )
    align, one = data.draw(st.sampled_from([1, 4, 8])), data.draw(st.booleans())
    choice = Choice(kinds, align, data.draw(st.sampled_from(ALLOCATIONS)), one_measure=one)
    emptying = data.draw(st.sampled_from([frozenset[str](), bypassed(layout)]))
    try:
        keep = choose(layout, scores, limits, choice, curves=curves, emptying=emptying)
    except InfeasibleBudget:
        return
    widths = costs.widths(keep)
    for limit in limits:
        assert limit.resource.total(widths) <= limit.most
    for name, units in keep.items():
        group = layout.by_name[name]
        assert group.kind in kinds
        by_curve = choice.allocation == "curves"
        best_units = tuple(sorted(curves[name].order[: len(units)])) if by_curve else best(scores[name], len(units))
        assert units == best_units
        assert len(units) > 0 or name in emptying
        assert group.kind in ("heads", "groups", "queries") or len(units) % align == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", ["paper", "curves"])
def test_what_is_allowed_is_spent(family: str, allocation: str) -> None:
    layout, costs = layout_of(family), costs_in(family)
    rng = np.random.default_rng(1)
    scores = {group.name: rng.random(group.units) for group in layout.groups}
    curves = {group.name: falling(group.units, rng) for group in layout.groups}
    for flops in (0.5, 0.8):
        limits = limits_within(costs, Limits(flops))
        keep = choose(layout, scores, limits, Choice(align=1, allocation=allocation), curves=curves)
        widths = costs.widths(keep)
        left = limits[0].most - costs.macs.total(widths)
        for group in layout.groups:  # no group could keep one unit more
            if group.name in keep:
                assert costs.macs.changes(group.name, [widths[group.name] + 1], widths)[0] > left


def test_an_impossible_limit_names_the_least_that_is_possible() -> None:
    layout, costs = layout_of("resnet"), costs_in("resnet")
    scores = {group.name: np.ones(group.units) for group in layout.groups}
    limits = limits_within(costs, Limits(0.001, 0.9, 100))
    with pytest.raises(InfeasibleBudget, match=r"--flops 0.001 and --size 100 bytes") as refused:
        choose(layout, scores, limits, Choice(align=1))
    words = str(refused.value).split("Use ")[1].split()
    flops, size = float(words[1]), int(words[3].removesuffix("KiB")) * 2**10
    assert choose(layout, scores, limits_within(costs, Limits(flops, 0.9, size)), Choice(align=1))
    with pytest.raises(InfeasibleBudget):
        choose(layout, scores, limits_within(costs, Limits(round(flops - 0.0001, 6), 0.9, size)), Choice(align=1))


def test_scores_and_curves_of_something_else_are_refused() -> None:
    layout, costs = layout_of("bert"), costs_in("bert")
    limits = limits_within(costs, Limits(0.8))
    scores = {group.name: np.ones(group.units) for group in layout.groups}
    name = next(group.name for group in layout.groups if group.kind == "heads")
    for wrong in ({}, {**scores, name: np.ones(2)}, {**scores, name: scores[name] * np.nan}):
        with pytest.raises(BadInput, match=r"scores of .* is needed"):
            choose(layout, wrong, limits, Choice())
    curves = {group.name: falling(group.units, np.random.default_rng(0)) for group in layout.groups}
    with pytest.raises(BadInput, match="needs error curves"):
        choose(layout, scores, limits, Choice(allocation="curves"))
    with pytest.raises(BadInput, match="there is no error curve of"):
        choose(layout, scores, limits, Choice(allocation="curves"), curves={})
    with pytest.raises(BadInput, match="is of 2 units"):
        choose(
            layout,
            scores,
            limits,
            Choice(allocation="curves"),
            curves={**curves, name: Curve((0, 2), (1.0, 0.0), (0, 1))},
        )


def test_groups_may_be_emptied_where_a_residual_stream_goes_around_them() -> None:
    for family in ("bert", "resnet", "mobilenet-v2"):
        layout = layout_of(family)
        names = bypassed(layout)
        assert names
        stages = [group for group in layout.groups if group.kind == "channels" and len(group.sites) > 3]
        assert names.isdisjoint(group.name for group in stages)
