"""Latency tables by group, on a machine whose time is a formula: what is told of plans is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node as node

from optin_deploy.cutting.graph import cut
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.planning.costs import CostLimit, Costs, costs_of
from optin_deploy.planning.latency import HeldOut, LatencyTable, Steps, TimeCost
from optin_deploy.planning.points import cells, keep_at, table_of
from optin_deploy.planning.polynomial import Widths
from optin_deploy.planning.widths import Choice, choose
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs
from support.one_cut import graph, tensors
from support.tiny_plans import costs_in, falling, layout_of

SETTING: dict[str, str | int] = {"engine": "a formula", "threads": 1}
CHOICE = Choice(align=2)
Clock = Callable[[Widths], int]
"""Nanoseconds of a network with these widths."""


def by_products(costs: Costs, step: int = 1) -> Clock:
    """A machine that takes 5 ns for a multiply-accumulate and a millisecond for the rest; widths come in steps."""

    def clock(widths: Widths) -> int:
        rounded = {name: min(costs.macs.whole[name], -(-count // step) * step) for name, count in widths.items()}
        return 10**6 + 5 * costs.macs.total(rounded)

    return clock


def measured(layout: Layout, costs: Costs, clock: Clock, emptying: frozenset[str] = frozenset()) -> LatencyTable:
    times = {cell: clock(costs.widths(keep_at(layout, cell))) for cell in cells(layout, CHOICE, emptying)}
    return table_of(layout, clock(costs.macs.whole), times, SETTING)


# points


def test_groups_of_one_shape_share_their_points() -> None:
    layout = layout_of("bert")
    found = cells(layout, CHOICE)
    of_heads = [cell for cell in found if layout.by_name[cell.groups[0]].kind == "heads"]
    assert {len(cell.groups) for cell in of_heads} == {2}
    assert [cell.count for cell in of_heads] == sorted({cell.count for cell in of_heads})
    assert of_heads[0].count == 1
    pairs = [(name, cell.count) for cell in found for name in cell.groups]
    assert len(pairs) == len(set(pairs))
    kinds = {group.name for group in layout.groups if group.kind in CHOICE.kinds}
    assert {name for name, _ in pairs} == kinds
    emptied = cells(layout, CHOICE, bypassed(layout))
    assert {cell.count for cell in emptied if set(cell.groups) <= bypassed(layout)} >= {0}


def test_groups_of_other_shapes_do_not() -> None:
    layout, costs = layout_of("resnet"), costs_in("resnet")
    for cell in cells(layout, CHOICE):
        alone = {costs.macs.changes(name, [cell.count], costs.macs.whole)[0] for name in cell.groups}
        assert len(alone) == 1


def test_a_point_is_cut_from_the_layout() -> None:
    layout, costs = layout_of("resnet"), costs_in("resnet")
    for cell in cells(layout, CHOICE)[:4]:
        keep = keep_at(layout, cell)
        again = find(cut(layout, keep), probes_of(layout.structure.network))
        assert macs(again.structure) == costs.macs.total(costs.widths(keep))


# what a table tells


def test_groups_of_one_shape_that_meet_share_what_they_save_together() -> None:
    rng = np.random.default_rng(0)
    sizes = (6, 8, 8, 8, 8, 6)
    names = [f"w{n}" for n in range(len(sizes) - 1)]
    weights = {name: rng.random((sizes[n], sizes[n + 1])).astype(np.float32) for n, name in enumerate(names)}
    nodes = [
        node("MatMul", [f"v{n}" if n else "in", name], ["out" if n == 4 else f"v{n + 1}"])
        for n, name in enumerate(names)
    ]
    probes = [{"in": rng.random((length, 6)).astype(np.float32)} for length in (3, 5)]
    layout = find(Network(ir.from_proto(graph(nodes, weights, probes[0])), "a test"), [tensors(one) for one in probes])
    costs = costs_of(layout)
    assert 2 in {len(cell.groups) for cell in cells(layout, CHOICE)}
    clock = by_products(costs)
    table = measured(layout, costs, clock)
    for name, steps in table.groups.items():
        alone = [clock(costs.macs.whole) - clock({**costs.macs.whole, name: count}) for count in steps.counts]
        assert list(steps.ns) == alone


@pytest.mark.parametrize("family", ["bert", "llama", "resnet", "mobilenet-v2", "swin"])
def test_times_of_other_plans_are_those_of_the_machine(family: str) -> None:
    """Also where channels meet: what they save together is not the sum of what each saves alone."""
    layout, costs = layout_of(family), costs_in(family)
    clock, rng = by_products(costs), np.random.default_rng(0)
    time = TimeCost(measured(layout, costs, clock), costs.macs)
    assert time.dense == time.total(costs.macs.whole) == clock(costs.macs.whole)
    for _ in range(20):
        widths = dict(costs.macs.whole)
        for group in layout.groups:
            if group.name in time.table.groups:
                widths[group.name] = int(rng.integers(time.table.groups[group.name].counts[0], group.units + 1))
        assert time.total(widths) == pytest.approx(clock(widths), rel=2e-3)


@pytest.mark.parametrize("family", ["bert", "resnet", "mobilenet-v2"])
def test_what_a_width_changes_is_the_difference_of_two_times(family: str) -> None:
    layout, costs = layout_of(family), costs_in(family)
    time, rng = TimeCost(measured(layout, costs, by_products(costs, step=4)), costs.macs), np.random.default_rng(1)
    widths = {group.name: int(rng.integers(1, group.units + 1)) for group in layout.groups}
    for group in layout.groups:
        counts = range(group.units + 1)
        expected = [time.total({**widths, group.name: count}) - time.total(widths) for count in counts]
        assert time.changes(group.name, counts, widths).tolist() == expected


def test_below_the_least_measured_width_no_more_is_known_to_be_saved() -> None:
    steps = Steps((2, 4, 6, 8), (60, 20, 30, 0))
    assert steps.saved([0, 1, 2, 3, 4, 5, 6, 7, 8]).tolist() == [60, 60, 60, 45, 30, 30, 30, 15, 0]
    assert Steps((0, 8), (-5, 0)).saved([0, 3, 8]).tolist() == [0, 0, 0]


def test_a_table_of_one_layer_of_heads_and_neurons_is_a_sum() -> None:
    layout, costs = layout_of("bert"), costs_in("bert")
    heads, neurons = (next(g.name for g in layout.groups if g.kind == kind) for kind in ("heads", "neurons"))
    groups = {
        heads: Steps((1, layout.by_name[heads].units), (300, 0)),
        neurons: Steps((8, layout.by_name[neurons].units), (1000, 0)),
    }
    time = TimeCost(LatencyTable(5000, groups, "", SETTING), costs.macs)
    assert time.total({**costs.macs.whole, heads: 1}) == 4700
    assert time.total({**costs.macs.whole, heads: 1, neurons: 8}) == 3700


# plans in time


@pytest.mark.parametrize("family", ["bert", "resnet"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_time_is_ever_exceeded(family: str, data: st.DataObject) -> None:
    layout, costs = layout_of(family), costs_in(family)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    emptying = data.draw(st.sampled_from([frozenset[str](), bypassed(layout)]))
    time = TimeCost(
        measured(layout, costs, by_products(costs, data.draw(st.sampled_from([1, 4]))), emptying), costs.macs
    )
    most = int(data.draw(st.floats(0.4, 1)) * time.dense)
    limits = [
        CostLimit(time, most, "--latency"),
        CostLimit(costs.params, int(0.9 * costs.params.dense), "--params 0.9", True),
    ]
    scores = {group.name: rng.random(group.units) for group in layout.groups}
    curves = {group.name: falling(group.units, rng) for group in layout.groups}
    choice = Choice(align=2, allocation=data.draw(st.sampled_from(["uniform", "paper", "curves"])))
    try:
        keep = choose(layout, scores, limits, choice, curves=curves, emptying=emptying)
    except InfeasibleBudget:
        return
    widths = costs.widths(keep)
    assert time.total(widths) <= most
    assert costs.params.total(widths) <= 0.9 * costs.params.dense


def test_an_impossible_time_names_the_least() -> None:
    layout, costs = layout_of("bert"), costs_in("bert")
    time = TimeCost(measured(layout, costs, by_products(costs)), costs.macs)
    scores = {group.name: np.ones(group.units) for group in layout.groups}
    with pytest.raises(InfeasibleBudget, match=r"Use --latency [\d.]+ms or more") as refused:
        choose(layout, scores, [CostLimit(time, 10**6, "--latency 1ms")], CHOICE)
    least = float(str(refused.value).split("Use --latency ")[1].split("ms")[0])
    assert choose(layout, scores, [CostLimit(time, round(least * 10**6), "--latency")], CHOICE)


# what is stored


def test_a_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    layout, costs = layout_of("resnet"), costs_in("resnet")
    table = measured(layout, costs, by_products(costs))
    table = LatencyTable(table.dense_ns, table.groups, table.network, SETTING, (HeldOut({"0": 3}, 5, 6),))
    table.write(tmp_path / "latency.json")
    found = LatencyTable.read(tmp_path / "latency.json")
    assert (found, found.hash) == (table, table.hash)
    found.check(layout, SETTING)
    assert found.held_out[0].error == pytest.approx(-1 / 6)
    with pytest.raises(BadInput, match="threads is 1, not 2"):
        found.check(layout, {**SETTING, "threads": 2})
    with pytest.raises(BadInput, match="has no group"):
        found.check(layout_of("bert"))
    other = LatencyTable(found.dense_ns, found.groups, "0" * 64, SETTING)
    with pytest.raises(BadInput, match="of another network"):
        other.check(layout)


@pytest.mark.parametrize(
    "change",
    [
        {"dense_ns": 0},
        {"dense_ns": 10**30},
        {"dense_ns": 1.5},
        {"schema_version": 1},
        {"groups": {"g": {"counts": [1, 2], "ns": [1]}}},
        {"groups": {"g": {"counts": [2, 1], "ns": [1, 0]}}},
        {"groups": {"g": {"counts": [1, 2], "ns": [1, 1]}}},
        {"groups": {"g": {"counts": [-1, 2], "ns": [1, 0]}}},
        {"groups": {"g": {"counts": [], "ns": []}}},
        {"groups": {"g": {"counts": [1, 2], "ns": [10**30, 0]}}},
        {"groups": []},
        {"held_out": [{"widths": {}, "predicted_ns": 1, "measured_ns": 0}]},
        {"more": 1},
        {"setting": None},
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(change: Mapping[str, Any], tmp_path: Path) -> None:
    good: dict[str, Any] = {"dense_ns": 9, "groups": {}, "network": "0", "setting": {}}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(good))
    LatencyTable.read(path)
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(BadInput, match="optin profile"):
        LatencyTable.read(path)
