"""Plans of networks: what is stored, whom they fit, scores by norms, and widths that never exceed a budget."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optin_deploy.cutting.graph import cut
from optin_deploy.errors import BadInput, InfeasibleBudget, PlanMismatch
from optin_deploy.network.axes import Axis, kept, product, total, units_along
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import hash_of, network_hash
from optin_deploy.network.probe import probes_of
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import costs_of, limits_within
from optin_deploy.planning.ladder import best
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.plan import NetworkPlan, Origin, plan_of
from optin_deploy.planning.widths import Choice, Keep, choose
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs, weight_entries
from optin_deploy.structure.shares import shares
from support.tiny_networks import HEAD, HEADS, NEURONS, Image, Text, made, read

COST = {
    **{"macs_dense": 1, "macs_pruned": 1, "weights_dense": 1, "weights_pruned": 1, "bytes_dense": 4, "bytes_pruned": 4},
    "inputs": {},
}
HEADS_0, NEURONS_0 = "layers.0.attention: heads", "layers.0.mlp: neurons"


@pytest.fixture(scope="module")
def text() -> nn.Module:
    return made(Text)


@pytest.fixture(scope="module")
def layout(text: nn.Module) -> Layout:
    return find(read(text))


@pytest.fixture(scope="module")
def channels() -> Layout:
    return find(read(made(Image)))


# the plan


def test_a_plan_is_read_back_as_it_was_written(layout: Layout, tmp_path: Path) -> None:
    origin = Origin("magnitude", hash_of(magnitudes(layout)))
    plan = plan_of(layout, {HEADS_0: [5, 0, 2], NEURONS_0: range(7)}, {"by": "hand"}, origin)
    plan.write(tmp_path / "plan.json")
    found = NetworkPlan.read(tmp_path / "plan.json")
    assert found == plan
    assert found.hash == plan.hash
    assert found.keep[HEADS_0] == (0, 2, 5)
    found.check(layout)


def test_the_cost_of_a_plan_is_that_of_the_cut_network(layout: Layout) -> None:
    keep = {HEADS_0: [1, 4], NEURONS_0: range(0, NEURONS, 3)}
    cost = plan_of(layout, keep).cost
    assert cost is not None
    network, smaller = layout.structure.network, cut(layout, keep)
    assert cost.macs_pruned == macs(find(smaller, probes_of(network)).structure)
    assert cost.macs_dense == macs(layout.structure)
    assert cost.weights_dense - cost.weights_pruned == reals(network) - reals(smaller)
    assert cost.bytes_dense - cost.bytes_pruned == 4 * (reals(network) - reals(smaller))


def reals(network: Network) -> int:
    """Entries of all weights that are no sizes."""
    return sum(weight.size for weight in network.weights.values() if weight.dtype == ir.DataType.FLOAT)


@pytest.mark.parametrize("version", [{}, {"schema_version": 1}, {"schema_version": 2}])
def test_a_plan_made_by_hand_needs_only_what_stays(layout: Layout, tmp_path: Path, version: dict[str, int]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**version, "keep": {HEADS_0: [0, 1, 2]}}))
    plan = NetworkPlan.read(path)
    plan.check(layout)
    assert plan.keep == {HEADS_0: (0, 1, 2)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema_version": 3, "keep": {}}, "schema_version 3"),
        ({"schema_version": 1, "keep": {}, "network": "0" * 64}, "schema_version 1"),
        ({"keep": {}, "origin": {"scores": "magnitude"}}, "scores_hash"),
        ({"keep": {}, "origin": {"scores": "magnitude", "scores_hash": "0", "by": 1}}, "by"),
        ({"keep": {HEADS_0: "all"}}, "keep"),
        ({"keep": {HEADS_0: [0.5]}}, "keep"),
        ({"keep": {}, "heads": []}, "heads"),
        ({}, "keep"),
        (
            {
                "keep": {},
                "cost": {**COST, "macs_pruned": 2},
            },
            "more",
        ),
        ({"keep": {}, "cost": {**COST, "bytes_pruned": -1}}, "less than nothing"),
        ({"keep": {}, "cost": {**COST, "weights_dense": 0.5}}, "weights_dense"),
    ],
)
def test_what_is_no_plan_of_a_network_is_refused(content: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=said) as refused:
        NetworkPlan.read(path)
    assert "optin plan FILE.onnx" in str(refused.value)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"layers.0.atention: heads": [0]}, "Near are: layers.0.attention: heads"),
        ({HEADS_0: [6]}, "0 to 5"),
        ({HEADS_0: [1, 1]}, "twice"),
    ],
)
def test_groups_and_units_that_are_not_there_are_named(layout: Layout, keep: dict[str, list[int]], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        NetworkPlan({name: tuple(units) for name, units in keep.items()}).check(layout)


def test_a_plan_of_another_network_is_refused(layout: Layout) -> None:
    plan = plan_of(layout, {HEADS_0: [0]})
    with pytest.raises(PlanMismatch, match="was made for the network"):
        plan.check(find(read(made(Text, seed=1))))


# the hash


def test_the_hash_is_that_of_content_not_of_names(text: nn.Module) -> None:
    network = read(text)
    before = network_hash(network)
    assert network_hash(read(text)) == before
    renamed = read(text)
    for value in [value for node in renamed.model.graph for value in node.outputs if not value.is_graph_output()]:
        value.name = f"other_{value.name}"
    assert network_hash(renamed) == before


def test_one_number_of_a_weight_and_one_attribute_change_the_hash(text: nn.Module) -> None:
    hashes = {network_hash(read(text))}
    with torch.no_grad():
        changed = made(Text)
        changed.get_parameter("layers.1.mlp.down.bias")[3] += 1e-6
    hashes.add(network_hash(read(changed)))
    other = read(text)
    norm = next(node for node in other.model.graph if node.op_type == "LayerNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    hashes.add(network_hash(other))
    assert len(hashes) == 3


# scores


def test_a_score_is_the_norm_of_all_that_a_unit_lies_on(text: nn.Module, layout: Layout) -> None:
    weights = {name: tensor.detach().double().numpy() for name, tensor in text.named_parameters()}
    up, down = weights["layers.0.mlp.up.weight"], weights["layers.0.mlp.down.weight"]
    shares = [np.square(up).sum(1), np.square(down).sum(0)]
    expected = np.sqrt(sum(share / share.mean() for share in shares) / 2)
    found = magnitudes(layout)
    np.testing.assert_allclose(found[NEURONS_0], expected, rtol=1e-5)
    of_heads = [
        np.square(weights[f"layers.0.attention.{name}.weight"]).reshape(HEADS, HEAD, -1).sum((1, 2))
        for name in ("query", "key", "value")
    ]
    of_heads.append(np.square(weights["layers.0.attention.out.weight"]).reshape(-1, HEADS, HEAD).sum((0, 2)))
    expected = np.sqrt(sum(share / share.mean() for share in of_heads) / 4)
    np.testing.assert_allclose(found[HEADS_0], expected, rtol=1e-5)


def test_layers_of_another_scale_have_the_same_scores(text: nn.Module) -> None:
    scaled = made(Text)
    with torch.no_grad():
        scaled.get_parameter("layers.0.mlp.up.weight").mul_(100)
    found, before = (magnitudes(find(read(module)))[NEURONS_0] for module in (scaled, text))
    np.testing.assert_allclose(found, before, rtol=1e-4)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), st.data())
def test_units_along_an_axis_are_those_that_a_cut_keeps(sizes: list[int], data: st.DataObject) -> None:
    leaves = [Axis(size) for size in sizes]
    axis = total([product(leaves), Axis(3), product(leaves)])
    leaf = data.draw(st.sampled_from(leaves))
    units = units_along(axis, leaf)
    for unit in range(leaf.size):
        stay = np.delete(np.arange(leaf.size), unit)
        assert set(np.flatnonzero(units != unit)) == set(kept(axis, {leaf: stay}))


def test_scores_have_a_hash_of_what_they_are(layout: Layout) -> None:
    scores = magnitudes(layout)
    before = hash_of(scores)
    assert hash_of(dict(reversed(scores.items()))) == before
    changed = {**scores, HEADS_0: scores[HEADS_0] + np.eye(6)[2] * 1e-9}
    assert len({before, hash_of(changed), hash_of({**scores, "x": scores[HEADS_0]})}) == 3


# widths


def by_magnitude(layout: Layout, flops: float, **options: Any) -> Keep:
    limits = limits_within(costs_of(layout), Limits(flops))
    return choose(layout, magnitudes(layout), limits, Choice(**options, one_measure=False))


@pytest.mark.parametrize("allocation", ["uniform", "paper"])
@settings(max_examples=25, deadline=None)
@given(flops=st.integers(1, 100).map(lambda percent: percent / 100), align=st.sampled_from([1, 4, 8]))
def test_a_budget_is_never_exceeded_and_what_is_impossible_says_what_is_not(
    layout: Layout, channels: Layout, allocation: str, flops: float, align: int
) -> None:
    for each in (layout, channels):
        dense, scores = macs(each.structure), magnitudes(each)
        try:
            keep = by_magnitude(each, flops, align=align, allocation=allocation)
        except InfeasibleBudget as refused:
            least = float(str(refused).split("Use --flops ")[1].split()[0])
            assert flops < least
            keep = by_magnitude(each, least, align=align, allocation=allocation)
            flops_asked = least
        else:
            flops_asked = flops
        cost = plan_of(each, keep).cost
        assert cost is not None
        assert cost.macs_pruned <= Fraction(str(flops_asked)) * dense
        for name, units in keep.items():
            group = each.by_name[name]
            assert 1 <= len(units) < group.units
            assert group.kind == "heads" or len(units) % align == 0
            assert units == best(scores[name], len(units))


def test_uniform_widths_are_the_widest_that_brute_force_finds(layout: Layout) -> None:
    keep = by_magnitude(layout, 0.7, kinds=("heads", "neurons"), align=8)
    dense = macs(layout.structure)
    found = []
    for percent in range(1, 1001):
        share = Fraction(percent, 1000)
        sizes = {}
        for group in layout.groups:
            step = {"heads": 1, "neurons": 8}.get(group.kind)
            if step is not None:
                steps = int(share * group.units / step + Fraction(1, 2))
                sizes[group.leaf] = min(group.units, max(1, steps) * step)
        cost = macs(layout.structure, sizes)
        if cost <= Fraction("0.7") * dense:
            found.append(cost)
    cost = plan_of(layout, keep).cost
    assert cost is not None
    assert cost.macs_pruned == max(found)


def test_ranked_units_are_the_weakest_of_all_layers(layout: Layout) -> None:
    scores = dict(magnitudes(layout))
    scores[NEURONS_0] = scores[NEURONS_0] + 100  # a layer that must stay
    limits = limits_within(costs_of(layout), Limits(0.9))
    keep = choose(layout, scores, limits, Choice(kinds=("neurons",), align=8, allocation="paper"))
    assert NEURONS_0 not in keep
    assert len(keep["layers.1.mlp: neurons"]) < NEURONS


def test_with_the_whole_budget_everything_stays(layout: Layout) -> None:
    for allocation in ("uniform", "paper"):
        assert by_magnitude(layout, 1.0, allocation=allocation) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ("head",)}, "possible are heads, groups"),
        ({"align": 0}, "--align"),
        ({"allocation": "best"}, "possible are curves, uniform, paper"),
    ],
)
def test_choices_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Choice(**options)  # type: ignore[arg-type]


def test_nothing_to_cut_is_said_with_what_there_is(layout: Layout) -> None:
    with pytest.raises(BadInput, match="This network has groups of: heads, neurons, qk-width, v-width"):
        by_magnitude(layout, 0.5, kinds=("channels",))
    with pytest.raises(BadInput, match="more units than --align 64"):
        by_magnitude(layout, 0.5, kinds=("neurons",), align=64)


# shares


def test_the_share_of_a_group_is_what_goes_with_all_of_its_units(layout: Layout, channels: Layout) -> None:
    for each in (layout, channels):
        found, dense = shares(each), macs(each.structure)
        entries = weight_entries(each.structure)
        for group in each.groups:
            assert found[group.name].macs == pytest.approx(1 - macs(each.structure, {group.leaf: 0}) / dense)
            gone = entries - weight_entries(each.structure, {group.leaf: 0})
            assert found[group.name].weights == pytest.approx(gone / entries)
    some = {name: tuple(range(layout.by_name[name].units)) for name in (HEADS_0, NEURONS_0)}
    for name, other in itertools.permutations(some):
        cost = plan_of(layout, {name: (), other: some[other]}).cost
        assert cost is not None
        assert shares(layout)[name].macs == pytest.approx(1 - cost.macs_pruned / cost.macs_dense)
