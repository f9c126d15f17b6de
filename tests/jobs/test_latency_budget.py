"""Latency tables and budgets in time, on an engine whose clock is a formula: what is found is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.latency import equal_time
from optin_deploy.errors import BadInput, InfeasibleBudget, MissedTime, OptinError, TooUnstable
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.profiling import measure_table, read_table, table_at, with_held_out
from optin_deploy.jobs.stages import curve_stage, score_stage
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.time_rounds import AIM, LEAST, MOST, Round, TimeVerdict, verdict_on
from optin_deploy.jobs.width_timer import WidthTimer, inputs_of, width_timer
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point
from optin_deploy.measuring.timing import LatencySamples, PairTiming
from optin_deploy.planning.budget import Limits, TimeTarget, parse_latency
from optin_deploy.planning.costs import CostLimit, fits, limits_within
from optin_deploy.planning.latency import HeldOut, LatencyTable, TimeCost, held_out_line, table_rows
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice, Keep
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.source import Source
from optin_deploy.structure.groups import Layout
from support.tiny_checkpoint import FFN, HEADS, HIDDEN, LAYERS, Shell, bert, classifier, lines, text_options
from support.tiny_networks import VOCABULARY, Text, export, made

pytestmark = pytest.mark.usefixtures("one_thread")

ALIGN = 8
NEURONS = LAYERS * FFN
"""Of the layers; a classifier's pooler has HIDDEN more."""


def kept(layout: Layout, keep: Keep, kind: str) -> list[int]:
    """Units that stay in each group of a kind."""
    return [len(keep.get(group.name, range(group.units))) for group in layout.groups if group.kind == kind]


@dataclass(frozen=True)
class Formula:
    """Milliseconds of a plan: fixed + a head's + a neuron's, steps of a width, and what the table cannot know."""

    fixed: float = 2.0
    head: float = 0.3
    neuron: float = 0.02
    step: int = 1
    """Neurons are rounded up to multiples of this, as hardware does."""
    coupling: float = 0.0
    """Share of the time that is added where heads and neurons are both cut: breaks the table's sum."""

    def __call__(self, layout: Layout, keep: Keep) -> float:
        heads = sum(kept(layout, keep, "heads"))
        neurons = sum(-(-count // self.step) * self.step for count in kept(layout, keep, "neurons"))
        cut = (1 - heads / (HEADS * LAYERS)) * (1 - neurons / sum(kept(layout, {}, "neurons")))
        return (self.fixed + self.head * heads + self.neuron * neurons) * (1 + self.coupling * cut)


Clock = Callable[[Layout, Keep], float]


@dataclass(frozen=True, eq=False)
class FormulaYard(WidthTimer):
    """Asks the formula instead of the engine."""

    clock: Clock = Formula()

    def ms(self, keep: Keep) -> float:
        return self.clock(self.layout, keep)

    def together(self, plans: Sequence[Keep], *, blocks: int) -> LatencySamples:
        times = {"dense": self.ms({}), **{str(i): self.ms(keep) for i, keep in enumerate(plans)}}
        return LatencySamples({name: ((ms,),) * blocks for name, ms in times.items()}, {})

    def against_dense(self, keep: Keep, progress: Any = None) -> PairTiming:
        dense, pruned = (((self.ms(each),),) * 2 for each in ({}, keep))
        return PairTiming(dense, pruned, dense, seed=0, load_ms={"dense": 1.0, "pruned": 1.0})


@dataclass(frozen=True, eq=False)
class Scored:
    """A workspace with scores and curves of the tiny classifier, and what it was prepared from."""

    workspace: Workspace
    prepared: Prepared

    @property
    def layout(self) -> Layout:
        return self.prepared.ready.layout

    def planner(self, allocation: str) -> Planner:
        return Planner(self.workspace, self.prepared, Choice(align=ALIGN, allocation=allocation))

    def yard(self, clock: Clock, *, batch: int = 1) -> FormulaYard:
        feeds, nowhere = inputs_of(self.prepared).feeds(Point(batch)), Path("never-opened")
        return FormulaYard(
            self.prepared, exporter("onnx"), ExportSpec(), Point(batch), 1, feeds, nowhere, nowhere, clock=clock
        )

    def cost(self, table: LatencyTable) -> TimeCost:
        return TimeCost(table, self.prepared.ready.costs.macs)

    def within(
        self, limits: Limits, table: LatencyTable, yard: WidthTimer, allocation: str
    ) -> tuple[NetworkPlan, list[Round]]:
        return Planning(self.planner(allocation), yard, limits).within(table)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    source = Source(str(classifier()), calibration=str(lines()), seq_len=16)
    prepared = prepare(source)
    workspace = Workspace.claim(tmp_path_factory.mktemp("scored") / "work", source)
    score_stage(workspace, prepared)
    curve_stage(workspace, prepared)
    return Scored(workspace, prepared)


UNIFORM = Choice(align=ALIGN)


# --- the table


def test_a_table_of_an_additive_engine_predicts_every_plan(scored: Scored) -> None:
    yard = scored.yard(Formula())
    table = measure_table(yard, UNIFORM)
    assert table.dense_ns / 1e6 == pytest.approx(Formula()(scored.layout, {}))
    costs, rng = scored.prepared.ready.costs, np.random.default_rng(0)
    for number in range(20):
        keep = {  # no residual stream goes around the pooler, which must keep what is measured at the least
            group.name: tuple(range(ALIGN if group.units == HIDDEN else 0))
            if number == 0
            else tuple(range(rng.integers(ALIGN if group.units == HIDDEN else 0, group.units + 1)))
            for group in scored.layout.groups
            if group.name in table.groups
        }
        found = scored.cost(table).total(costs.widths(keep)) / 1e6
        assert found == pytest.approx(Formula()(scored.layout, keep), rel=1e-6)


def test_held_out_plans_tell_how_wrong_a_table_is(scored: Scored) -> None:
    for formula, worst in ((Formula(), 1e-6), (Formula(coupling=0.2), 0.2)):
        yard = scored.yard(formula)
        table = with_held_out(measure_table(yard, UNIFORM), yard, UNIFORM, 10)
        assert len(table.held_out) == 10
        assert len({tuple(each.widths.values()) for each in table.held_out}) > 3
        keeps: list[Keep] = [
            {name: tuple(range(count)) for name, count in each.widths.items()} for each in table.held_out
        ]
        errors = [
            each.predicted_ns / 1e6 / formula(scored.layout, keep) - 1
            for each, keep in zip(table.held_out, keeps, strict=True)
        ]
        np.testing.assert_allclose([each.error for each in table.held_out], errors, atol=1e-6)
        assert np.abs(errors).max() < worst
    assert np.abs(errors).max() > 1e-3  # the coupling shows


def test_a_stored_table_is_used_where_it_fits_and_measured_again_where_not(scored: Scored, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    first = table_at(path, scored.yard(Formula()), UNIFORM)
    assert LatencyTable.from_json(json.loads(path.read_text())) == first
    assert table_at(path, scored.yard(Formula(fixed=50.0)), UNIFORM) == first  # nothing was measured
    other = table_at(path, scored.yard(Formula(fixed=50.0), batch=2), UNIFORM)
    assert other.dense_ns == pytest.approx(first.dense_ns + 48e6)
    with pytest.raises(BadInput, match=r"latency table: measured elsewhere or otherwise: inputs is .*\(2, 16\)"):
        read_table(path, scored.yard(Formula()), UNIFORM)
    table_at(path, scored.yard(Formula()), Choice(("heads",), ALIGN))
    with pytest.raises(BadInput, match=r"was measured without .* neurons: give the same --units"):
        read_table(path, scored.yard(Formula()), UNIFORM)
    assert table_at(path, scored.yard(Formula()), UNIFORM) == first


def test_a_table_tells_its_widths_and_its_errors(scored: Scored) -> None:
    table = measure_table(scored.yard(Formula()), UNIFORM)
    heads = next(group for group in scored.layout.groups if group.kind == "heads")
    rows = table_rows(table)
    assert (f"{heads.name} and 1 others", "2", "1.200") in rows
    assert len(rows) == sum(len(steps.counts) for steps in set(table.groups.values()))
    off = replace(table, held_out=(HeldOut({}, 3_000_000, 4_000_000), HeldOut({}, 4_400_000, 4_000_000)))
    assert held_out_line(off) == "2 random plans: predicted times are off by 17.5% in the median, 25.0% at worst."


# --- the search


@pytest.mark.parametrize("allocation", ["uniform", "paper", "curves"])
def test_time_and_macs_hold_together(scored: Scored, allocation: str) -> None:
    table = measure_table(scored.yard(Formula(step=32)), UNIFORM)
    costs = scored.prepared.ready.costs
    limits = [
        *limits_within(costs, Limits(flops=0.7)),
        CostLimit(scored.cost(table), int(0.6 * table.dense_ns), "time"),
    ]
    keep = scored.planner(allocation).kept_units(limits)
    assert fits(limits, costs.widths(keep))
    # The formula takes a step up where the table draws a line from one measured width to the next.
    assert Formula(step=32)(scored.layout, keep) * 1e6 <= 0.6 * table.dense_ns + 5e6 * 0.02 * 32


# --- the loop


@pytest.mark.parametrize("allocation", ["uniform", "curves"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("coupling", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("option", ["--latency", "--speedup", "--throughput"])
def test_the_measured_time_is_within_the_budget_and_near_it(
    scored: Scored, option: str, coupling: float, share: float, allocation: str
) -> None:
    formula = Formula(coupling=coupling)
    yard = scored.yard(formula, batch=4)
    table = measure_table(yard, UNIFORM)
    goal = share * table.dense_ns / 1e6
    value = {"--latency": goal, "--speedup": 1 / share, "--throughput": 4000 / goal}[option]
    limits = Limits(time=TimeTarget(option, value))
    plan, rounds = scored.within(limits, table, yard, allocation)
    assert formula(scored.layout, plan.keep) <= goal
    assert formula(scored.layout, plan.keep) >= NEAR[allocation] * goal
    assert min(abs(each.measured_ms - formula(scored.layout, plan.keep)) for each in rounds) < 1e-9
    assert plan.settings["measured"]["measured_ms"] == pytest.approx(formula(scored.layout, plan.keep))
    assert plan.settings["time"] == {"option": option, "value": value}


NEAR = {"uniform": 0.85, "curves": 0.93}
"""Two tiny layers: cut alike they have steps of 7% of the time, cut by curves of 3% (a head)."""


@pytest.mark.parametrize("allocation", ["uniform", "curves"])
@pytest.mark.parametrize("drift", [0.9, 1.02, 1.04, 1.06, 1.08, 1.1, 1.3])
@pytest.mark.parametrize(
    "share", [0.4, 0.6, 0.9, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.5, 0.75))]
)
def test_a_table_that_is_off_is_corrected_by_measuring(
    scored: Scored, share: float, drift: float, allocation: str
) -> None:
    table = measure_table(scored.yard(Formula()), UNIFORM)
    slower = Formula(fixed=2.0 * drift, head=0.3 * drift, neuron=0.02 * drift)  # the machine changed since
    goal = share * table.dense_ns / 1e6
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = scored.within(limits, table, scored.yard(slower), allocation)
    assert rounds[0].allowed_ns == pytest.approx(1e6 * AIM * goal, rel=1e-6)
    taken = slower(scored.layout, plan.keep)
    assert NEAR[allocation] * goal <= taken <= goal
    assert taken <= MOST * goal or len(rounds) > 1, "so near to the budget, another plan is tried"


def test_a_lucky_measurement_is_not_believed(scored: Scored) -> None:
    calls: dict[str, int] = {}

    def moody(layout: Layout, keep: Keep) -> float:
        """3% too fast when first seen, 3% too slow when seen again."""
        if not keep:
            return Formula()(layout, keep)
        calls[str(keep)] = calls.get(str(keep), 0) + 1
        return Formula()(layout, keep) * (0.97 if calls[str(keep)] % 2 else 1.03)

    table = measure_table(scored.yard(Formula()), UNIFORM)
    goal = 0.6 * table.dense_ns / 1e6
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = scored.within(limits, table, scored.yard(moody), "curves")
    assert 0.93 * goal <= Formula()(scored.layout, plan.keep) <= goal
    assert max(calls.values()) == 2
    assert any(each.measured_ms == pytest.approx(each.predicted_ms, rel=1e-3) for each in rounds), "both count"


@dataclass(frozen=True)
class Branches(Formula):
    """A branch that is there at all takes long, as on engines that wait for each launch."""

    branch: float = 2.0

    def __call__(self, layout: Layout, keep: Keep) -> float:
        there = sum(count > 0 for kind in ("heads", "neurons") for count in kept(layout, keep, kind))
        return super().__call__(layout, keep) + self.branch * there


@pytest.mark.parametrize("emptied_is_nearer", [True, False])
def test_branches_are_emptied_only_where_that_keeps_the_outputs_nearer(
    scored: Scored, emptied_is_nearer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[NetworkPlan] = []

    def error(of: Ready, plan: NetworkPlan, **how: Any) -> float:
        tried.append(plan)
        assert of is scored.prepared.ready
        assert how["compensation"]
        return float(all(plan.keep.values()) is emptied_is_nearer)

    monkeypatch.setattr("optin_deploy.jobs.time_budget.unseen_error", error)
    formula = Branches()
    table = measure_table(scored.yard(formula), UNIFORM)
    slower = replace(formula, fixed=3.0)  # so that there are several rounds
    yard, goal = scored.yard(slower), 0.8 * table.dense_ns / 1e6
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = scored.within(limits, table, yard, "curves")
    assert [all(one.keep.values()) for one in tried] == [False, True]
    assert len(rounds) > 1, "tried once, in the first"
    assert all(plan.keep.values()) is not emptied_is_nearer
    assert slower(scored.layout, plan.keep) <= goal
    assert bool(plan.settings["measured"]["emptied"]) is emptied_is_nearer


def test_branches_are_emptied_where_nothing_else_is_in_time(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "optin_deploy.jobs.time_budget.unseen_error", lambda *_, **__: pytest.fail("there is no choice")
    )
    yard = scored.yard(Branches())
    table = measure_table(yard, UNIFORM)
    limits = Limits(time=TimeTarget("--latency", 9.0))
    plan, _ = scored.within(limits, table, yard, "curves")
    assert not all(plan.keep.values())
    with pytest.raises(InfeasibleBudget, match="Use --latency"):  # equal widths empty nothing
        scored.within(limits, table, yard, "uniform")


def share_of(plan: NetworkPlan) -> float:
    """Of the multiply-accumulates."""
    assert plan.cost is not None
    return plan.cost.macs_pruned / plan.cost.macs_dense


def test_other_budgets_hold_beside_the_time(scored: Scored) -> None:
    yard = scored.yard(Formula())
    table = measure_table(yard, UNIFORM)
    limits = Limits(flops=0.4, time=TimeTarget("--speedup", 1.05))
    plan, rounds = scored.within(limits, table, yard, "uniform")
    assert share_of(plan) <= 0.4
    assert rounds[-1].measured_ms < LEAST * table.dense_ns / 1e6 / 1.05  # the MACs bind: no nearer plan exists
    loose = Limits(flops=0.4, time=TimeTarget("--latency", 2 * table.dense_ns / 1e6))
    assert share_of(scored.within(loose, table, yard, "uniform")[0]) <= 0.4


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            TimeTarget("--latency", 1.0),
            r"--latency 1ms is 1 ms a batch, but by the latency table 3.08 ms .* Use --latency 3.159ms or more",
        ),
        (TimeTarget("--speedup", 50.0), r"--speedup 50 .* Use --speedup \d.\d\d or less"),
        (TimeTarget("--throughput", 10_000.0), r"Use --throughput \d+\.\d or less"),
        (TimeTarget("--latency", 1000.0), r"the dense model takes 10.4 ms already"),
    ],
)
def test_a_time_that_cannot_be_met_says_what_can(scored: Scored, target: TimeTarget, said: str) -> None:
    yard = scored.yard(Formula())
    table = measure_table(yard, UNIFORM)
    with pytest.raises(InfeasibleBudget, match=said):
        scored.within(Limits(time=target), table, yard, "uniform")


@pytest.mark.parametrize("allocation", ["uniform", "curves"])
@pytest.mark.parametrize("option", ["--latency", "--speedup", "--throughput"])
def test_what_is_said_to_be_possible_is(scored: Scored, option: str, allocation: str) -> None:
    yard = scored.yard(Formula())
    table = measure_table(yard, UNIFORM)
    impossible = {"--latency": 0.5, "--speedup": 50.0, "--throughput": 10_000.0}[option]
    with pytest.raises(InfeasibleBudget) as raised:
        scored.within(Limits(time=TimeTarget(option, impossible)), table, yard, allocation)
    value = float(str(raised.value).split(f"Use {option} ")[1].split()[0].removesuffix("ms"))
    target = TimeTarget(option, value)
    plan, _ = scored.within(Limits(time=target), table, yard, allocation)
    assert yard.ms(plan.keep) <= target.limit_ms(yard.ms({}), 1)


def test_a_machine_that_never_gets_there_says_the_fastest(scored: Scored) -> None:
    table = measure_table(scored.yard(Formula()), UNIFORM)
    stuck = scored.yard(lambda layout, keep: 9.0)  # launch bound: nothing helps
    with pytest.raises(
        InfeasibleBudget, match=r"the fastest of \d plans took 9 ms on onnx. Use --latency 9.000ms or more"
    ):
        scored.within(Limits(time=TimeTarget("--latency", 5.0)), table, stuck, "uniform")


# --- budgets in MACs at the same time, for the benchmark


@pytest.mark.parametrize("drift", [0.9, 1.0, 1.1])
def test_the_plan_by_macs_that_is_compared_takes_as_long(scored: Scored, drift: float) -> None:
    formula = Formula(head=0.1, neuron=0.02)  # heads are cheap, neurons dear: MACs say otherwise
    table = measure_table(scored.yard(formula), UNIFORM)
    uneven = Formula(head=0.1 * drift, neuron=0.02)  # what the table does not know
    yard, planner = scored.yard(uneven), scored.planner("curves")
    setting = equal_time.Setting(None, planner, yard, table)  # type: ignore[arg-type]  # no task
    allowed = 0.6 * table.dense_ns / 1e6
    found = setting.by_macs(allowed)
    assert setting.predicted(found) <= allowed
    more = share_of(found) + 2 * equal_time.STEP
    while (next_larger := planner.plan(Limits(flops=more))).keep == found.keep:
        more += equal_time.STEP
    assert setting.predicted(next_larger) > allowed
    by_time, _ = scored.within(Limits(time=TimeTarget("--speedup", 1.6)), table, yard, "curves")
    rival, beside = equal_time.as_slow(setting, by_time)
    assert beside["ratio"] == pytest.approx(yard.ms(rival.keep) / yard.ms(by_time.keep))
    assert 0.9 <= beside["ratio"] <= 1.1  # tiny: few plans lie between
    assert beside["speedup"]["time"] == pytest.approx(yard.ms({}) / yard.ms(by_time.keep))
    assert sum(kept(scored.layout, rival.keep, "heads")) < sum(kept(scored.layout, by_time.keep, "heads"))


def test_a_page_of_equal_times_tells_the_mean_gain() -> None:
    def cell(task: str, right: int) -> dict[str, Any]:
        rows = {"time": [1] * right + [0] * (10 - right), "MACs": [1] * 5 + [0] * 5}
        plans = {name: {"kept": 0.5, "value": sum(x) / 10, "rows": x} for name, x in rows.items()}
        speedup = {"time": 2.0, "MACs": 1.99}
        beside = {"speedup": speedup, "ratio": 1.005, "ratio_ci95": (0.99, 1.02)}
        return {"task": task, "seed": 0, "asked": 2.0, **beside, "plans": plans}

    text = equal_time.page([cell("a", 6), cell("b", 5)], "onnx", 1)
    assert "+5.00 points (a +10.00, b +0.00); at least 0 is asked: holds" in text
    assert "1.005 [0.990, 1.020]" in text
    assert "does not hold" in equal_time.page([cell("a", 4)], "onnx", 1)


# --- the last word


def measurement(dense: float, pruned: float, *, noise: float = 0.0, again: float = 1.0) -> Measurement:
    """Twelve blocks whose times go up and down by a share; the second dense session is `again` times as slow."""
    shaken = [1 + noise * (-1) ** block for block in range(12)]
    blocks = (tuple((ms * each,) for each in shaken) for ms in (dense, pruned, dense * again))
    steady = tuple((dense,) for _ in shaken)
    _, pruned_ms, again_ms = blocks
    timing = PairTiming(steady, pruned_ms, again_ms if again != 1 else steady, seed=0, load_ms={})
    return Measurement("onnx", 2, 16, 1, 2.0, timing)


TARGETS = [TimeTarget("--latency", 5.0), TimeTarget("--speedup", 2.0), TimeTarget("--throughput", 400)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_shipped_model_has_the_last_word(target: TimeTarget) -> None:
    assert verdict_on(target, measurement(10.0, 4.99)).outcome == "holds"
    missed = verdict_on(target, measurement(10.0, 5.02))
    with pytest.raises(MissedTime, match=r"is 5 ms a batch; measured at the end: 5\.02 ms.*too slow") as raised:
        missed.check()
    assert raised.value.exit_code == 1
    # Noise alone misses nothing: the target lies within the interval.
    assert verdict_on(target, measurement(10.0, 5.02, noise=0.05)).outcome == "undecided"
    assert "came nearer" in verdict_on(target, measurement(10.0, 4.0)).sentence
    shaky = verdict_on(target, measurement(10.0, 4.0, again=1.2))
    assert shaky.outcome == "unstable"
    with pytest.raises(TooUnstable):
        shaky.check()


def test_only_a_target_that_is_missed_or_not_to_be_judged_is_an_error() -> None:
    for outcome in ("holds", "undecided"):
        TimeVerdict(outcome, "fine").check()  # type: ignore[arg-type]
    for outcome in ("missed", "unstable"):
        with pytest.raises(OptinError, match="not fine"):
            TimeVerdict(outcome, "not fine").check()  # type: ignore[arg-type]


# --- what a user types


@pytest.mark.parametrize(("text", "ms"), [("4.0ms", 4.0), ("4 ms", 4.0), ("900us", 0.9), ("0.5s", 500.0)])
def test_latencies_are_read_with_their_unit(text: str, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["4", "fast", "4m", "4..0ms", "-4ms", ""])
def test_a_latency_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"--latency .*4\.0ms"):
        parse_latency(text)


@pytest.mark.parametrize(
    ("option", "value"), [("--speedup", 1.0), ("--speedup", 0.5), ("--latency", 0.0), ("--throughput", -1)]
)
def test_a_time_that_asks_for_nothing_is_refused(option: str, value: float) -> None:
    with pytest.raises(BadInput, match=option):
        TimeTarget(option, value)


def test_the_name_of_the_folder_says_the_time() -> None:
    assert str(Limits(time=TimeTarget("--latency", 4.0))) == "latency4ms"
    assert str(Limits(flops=0.5, time=TimeTarget("--speedup", 2.0))) == "0.5-speedup2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--speedup", "2", "--latency", "3ms"], "--latency 3ms and --speedup 2: give one"),
        (["--speedup", "2", "--no-dense"], "--no-dense"),
        (["--speedup", "2", "--max-drop", "1"], "--max-drop finds the budget itself"),
        (["--latency", "3"], "give a time such as 4.0ms"),
        (["--latency-table", "t.json"], "--latency-table t.json is for --latency"),
        (["--speedup", "2", "--latency-table", "absent.json"], "absent.json"),
        (["--speedup", "2", "--precision", "int8"], "cannot be foretold"),
        (["--speedup", "2", "--precision", "bf16"], "bf16 does not run on this machine"),
        (["--speedup", "2", "--engine", "trt"], "trt in fp16 does not run on this machine"),
    ],
)
def test_impossible_wishes_are_refused(shell: Shell, tmp_path: Path, options: list[str], said: str) -> None:
    ran = shell("optin-export", bert(), *text_options(lines(), tmp_path / "out"), *options)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yardsticks ask the formula: tiny models take as long as their overhead."""
    monkeypatch.setattr(WidthTimer, "clock", Formula(), raising=False)
    for name in ("ms", "together", "against_dense"):
        monkeypatch.setattr(WidthTimer, name, vars(FormulaYard)[name], raising=False)


@pytest.mark.usefixtures("by_formula")
def test_a_time_that_the_dense_model_keeps_is_refused_before_work(shell: Shell, tmp_path: Path) -> None:
    formula, out = Formula(), tmp_path / "out"
    dense = formula.fixed + LAYERS * HEADS * formula.head + (NEURONS + HIDDEN) * formula.neuron
    options: list[object] = [classifier(), *text_options(lines(), out), "--engine", "torch"]
    for target in (("--latency", f"{1.3 * dense}ms"), ("--throughput", 500 / dense)):
        for more in ([], ["--dry-run"]):
            ran = shell("optin-export", *options, *target, *more)
            assert ran.code == 2
            assert f"the dense model takes {dense:.3g} ms already" in ran.err
            assert not out.exists()
    # Within the noise of a few seconds' measurement, or beside another budget, it is not for this check to say.
    for target in (("--latency", f"{1.1 * dense}ms"), ("--latency", f"{2 * dense}ms", "--flops", 0.5)):
        assert shell("optin-export", *options, *target, "--dry-run").code == 0


@pytest.mark.usefixtures("by_formula")
def test_a_dry_run_says_how_the_time_is_met(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", bert(), *text_options(lines(), out), "--latency", "2ms", "--dry-run")
    assert ran.code == 0, ran.err
    assert "--latency 2ms: planned by a latency table, then measured and corrected" in ran.out
    assert not out.exists()


# --- with an engine


def test_a_yardstick_times_what_is_shipped() -> None:
    source = Source(str(bert()), calibration=str(lines()), seq_len=16)
    asked = checked_job(Job(source, Limits(flops=0.6), engine="onnx"))
    with width_timer(asked.prepared, asked.target, asked.spec, Point(2), threads=1) as yard:
        heads, neurons = (
            [group.name for group in yard.layout.groups if group.kind == kind][:LAYERS] for kind in ("heads", "neurons")
        )
        some: Keep = {heads[0]: (0, 1), heads[1]: (), neurons[0]: tuple(range(8))}
        found = yard.together([some, {}], blocks=2)
        assert set(found.ms) == {"dense", "0", "1"}
        assert yard.against_dense({heads[0]: (1,), neurons[1]: ()}).speedup > 0
        assert [path.name for path in yard.scratch.iterdir() if path.is_dir()] == []  # candidates are gone
        assert yard.setting["engine"] == "onnx"
        assert "input_ids int64 (2, 16)" in str(yard.setting["inputs"])
    assert not yard.scratch.exists()


@pytest.mark.usefixtures("by_formula")
@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_job_within_a_time_leaves_table_plan_and_rounds(
    shell: Shell, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements: list[tuple[TimeTarget, int]] = []

    def said(target: TimeTarget, measured: Measurement) -> TimeVerdict:
        judgements.append((target, measured.batch))
        return TimeVerdict("holds", "It holds.")

    monkeypatch.setattr("optin_deploy.jobs.export.verdict_on", said)
    out = tmp_path / "out"
    ran = shell(
        *("optin-export", classifier(), *text_options(lines(), out)),
        *("--speedup", "1.5", "--engine", engine, "--at", "batch=2", "--at", "batch=1"),
    )
    assert ran.code == 0, ran.err
    assert judgements == [(TimeTarget("--speedup", 1.5), 2)]  # the first point is the budget's
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["time"] == {"option": "--speedup", "value": 1.5}
    formula = Formula()
    dense = formula.fixed + LAYERS * HEADS * formula.head + (NEURONS + HIDDEN) * formula.neuron
    took = formula.fixed + sum(report["heads"]) * formula.head + sum(report["neurons"]) * formula.neuron
    assert 0.94 * dense / 1.5 <= took <= dense / 1.5
    assert report["notes"][-1] == "It holds."
    assert Round(**report["settings"]["rounds"][-1]).measured_ms <= dense / 1.5
    assert NetworkPlan.read(out / "plan.json").settings["measured"]["measured_ms"] == pytest.approx(took)
    assert json.loads((out / "latency.json").read_text())["setting"]["engine"] == engine
    assert "Planned for `--speedup 1.5` by a latency table" in (out / "report.md").read_text()


@pytest.mark.usefixtures("by_formula")
def test_a_file_is_planned_in_time_with_a_table_of_its_own(shell: Shell, tmp_path: Path) -> None:
    network, data, table = export(made(Text), tmp_path / "text.onnx"), tmp_path / "ids.npz", tmp_path / "latency.json"
    np.savez(data, ids=np.random.default_rng(0).integers(0, VOCABULARY, (40, 7)))
    ran = shell("optin", "profile", network, "--calibration", data, "--align", 4, "--check", 4, "--out", table)
    assert ran.code == 0, ran.err
    assert "4 random plans: predicted times are off by 0.0% in the median" in ran.out
    out = tmp_path / "out"
    options = ("--calibration", data, "--align", 4, "--allocation", "uniform", "--out", out)
    ran = shell("optin-export", network, *options, "--speedup", 1.3, "--latency-table", table)
    assert ran.code in (0, 1, 4), ran.err  # what the real sessions say of it
    report = json.loads((out / "report.json").read_text())
    assert report["macs"]["kept"] < 0.9
    assert "Planned for `--speedup 1.3` by a latency table" in " ".join(report["notes"])
    assert not (out / "latency.json").exists()


@pytest.mark.usefixtures("by_formula")
def test_profile_writes_a_table_and_its_errors(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    ran = shell("optin", "profile", bert(), "--seq-len", 16, "--align", 8, "--check", 4, "--out", out)
    assert ran.code == 0, ran.err
    assert "4 random plans: predicted times are off by 0.0% in the median" in ran.out
    table = LatencyTable.read(out)
    assert len(table.held_out) == 4
    assert "(1, 16)" in str(table.setting["inputs"])


def test_a_time_cannot_be_planned_without_measuring(scored: Scored) -> None:
    with pytest.raises(BadInput, match="--latency 5ms is measured while planning"):
        scored.planner("uniform").plan(Limits(time=TimeTarget("--latency", 5.0)))
