"""Budgets in milliseconds for any network: a table on the cut graph, plans by it, measured, corrected, never over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import Shell
from tiny_networks import VOCABULARY, Text, export, made

from exporters import exporter
from exporters.bench import network_time
from exporters.bench.network_time import NS, Yardstick, measure_table, table_at, within_time
from optin_deploy.budget import TimeTarget
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.jobs.networks import find_in
from optin_deploy.planning.costs import Limit, costs_of
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.widths import Choice, Keep, choose
from optin_deploy.structure.groups import Layout

CHOICE = Choice(align=4)
FIXED_MS, MS = 1.0, 4.0
"""Of the machine below: what a network takes without any multiply-accumulate, and the dense one besides."""


class Formula(Yardstick):
    """A machine whose time is a fixed part and a part that follows the multiply-accumulates, 10% above the table's."""

    slower = 1.0

    def ms(self, keep: Keep) -> float:
        macs = costs_of(self.layout).macs
        return FIXED_MS + MS * macs.of(costs_of(self.layout).widths(keep)) / macs.dense

    def together(self, plans: Sequence[Keep]) -> Any:
        ways = {"dense": {}, **{str(i): keep for i, keep in enumerate(plans)}}
        return SimpleNamespace(ms={name: [np.full(3, self.ms(keep))] * 4 for name, keep in ways.items()})

    def against_dense(self, keep: Keep, progress: Any = None) -> Any:
        ms = self.ms(keep) * self.slower
        return SimpleNamespace(speedup=self.ms({}) / ms, pruned=lambda _: ms)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return find_in(export(made(Text), tmp_path_factory.mktemp("text") / "text.onnx")).layout


def machine(layout: Layout, slower: float = 1.0) -> Formula:
    feeds = {"ids": np.zeros((1, 7), np.int64)}
    yard = Formula(layout, exporter("onnx"), feeds, 1, 1, Path("dense.onnx"))
    object.__setattr__(yard, "slower", slower)
    return yard


def picker(layout: Layout) -> Any:
    return lambda more: choose(layout, magnitudes(layout), list[Limit](more), CHOICE)


@pytest.mark.parametrize("slower", [1.0, 1.1])
@pytest.mark.parametrize("speedup", [1.2, 1.5])
def test_the_measured_time_is_within_the_target_and_near_it(layout: Layout, slower: float, speedup: float) -> None:
    yard = machine(layout, slower)
    table = measure_table(yard, CHOICE)
    assert table.dense_ns == round(NS * (FIXED_MS + MS))
    keep, rounds = within_time(TimeTarget("--speedup", speedup), table, yard, picker(layout))
    assert 0.85 * (FIXED_MS + MS) / speedup < yard.ms(keep) * slower <= (FIXED_MS + MS) / speedup
    assert len(rounds) >= (1 if slower == 1 else 2)  # a table that is wrong is corrected by what was measured


def test_what_no_plan_reaches_is_refused_with_what_can_be_had(layout: Layout) -> None:
    yard = machine(layout)
    with pytest.raises(InfeasibleBudget, match=r"--latency 0\.5ms"):
        within_time(TimeTarget("--latency", 0.5), measure_table(yard, CHOICE), yard, picker(layout))
    with pytest.raises(InfeasibleBudget, match="nothing has to be cut"):
        within_time(TimeTarget("--latency", 50), measure_table(yard, CHOICE), yard, picker(layout))


def test_a_table_is_measured_once_for_each_setting(layout: Layout, tmp_path: Path) -> None:
    yard, path = machine(layout), tmp_path / "latency.json"
    first = table_at(path, yard, CHOICE)
    object.__setattr__(yard, "together", None)  # measures no more
    assert table_at(path, yard, CHOICE) == first
    other = Formula(layout, yard.target, {"ids": np.zeros((2, 7), np.int64)}, 2, 1, yard.dense)
    assert table_at(path, other, CHOICE).setting != first.setting


def test_one_command_plans_in_time_and_tells_what_was_measured(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real sessions at the end; the plans are timed by the formula, as tiny networks take what the machine likes."""
    monkeypatch.setattr(network_time.Yardstick, "together", Formula.together)
    monkeypatch.setattr(network_time.Yardstick, "against_dense", Formula.against_dense)
    monkeypatch.setattr(network_time.Yardstick, "ms", Formula.ms, raising=False)
    monkeypatch.setattr(network_time.Yardstick, "slower", 1.0, raising=False)
    network, data, out = export(made(Text), tmp_path / "text.onnx"), tmp_path / "ids.npz", tmp_path / "out"
    np.savez(data, ids=torch.randint(0, VOCABULARY, (40, 7)).numpy())
    ran = shell(
        *("optin-export", network, "--calibration", data, "--speedup", 1.3, "--align", 4, "--allocation", "uniform"),
        *("--out", out),
    )
    assert ran.code in (0, 1, 4), ran.err  # what the real sessions say of it
    report = json.loads((out / "report.json").read_text())
    assert report["macs"]["kept"] < 0.8
    assert "Planned for `--speedup 1.3` by a latency table" in " ".join(report["notes"])
    assert (out / "latency.json").is_file()
