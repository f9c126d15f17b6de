"""Latency tables and budgets in time, on an engine whose clock is a formula: what is found is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN, tiny_model
from tiny_checkpoint import HEADS, LAYERS, Shell, bert, classifier, lines, text_options

from benchmarks.latency import equal_time
from exporters import exporter
from exporters.base import ExportSpec
from exporters.bench.measuring import Point
from exporters.bench.profiling import grid, measure_table, table_at, with_held_out
from exporters.bench.time_budget import AIM, LEAST, LastWord, Round, judged, plan_within_time
from exporters.bench.yardstick import Yardstick, yardstick
from exporters.ready import ready
from optin_deploy.arch.resolve import resolve
from optin_deploy.bench.report import Measurement
from optin_deploy.bench.timing import PairTiming, Samples
from optin_deploy.budget import Limits, TimeTarget, parse_latency
from optin_deploy.cost.latency import HeldOut, LatencyTable, Steps, held_out_line, read_table, table_rows
from optin_deploy.cost.macs import mac_cost
from optin_deploy.errors import BadInput, InfeasibleBudget, MissedTime, OptinError, TooUnstable
from optin_deploy.plan import PruningPlan
from optin_deploy.scoring.scores import Scores
from optin_deploy.search import search_within
from optin_deploy.stages import curve_stage, plan_stage, prepare, score_stage
from optin_deploy.workspace import Source, Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

ALIGN = 8


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

    def __call__(self, plan: PruningPlan) -> float:
        heads = sum(map(len, plan.heads))
        neurons = sum(-(-len(kept) // self.step) * self.step for kept in plan.neurons)
        cut = (1 - heads / (HEADS * LAYERS)) * (1 - neurons / (96 * LAYERS))
        return (self.fixed + self.head * heads + self.neuron * neurons) * (1 + self.coupling * cut)


@dataclass(frozen=True, eq=False)
class FormulaYard(Yardstick):
    """Asks the formula instead of the engine."""

    ms: Callable[[PruningPlan], float] = Formula()

    def together(self, plans: Sequence[PruningPlan], *, blocks: int) -> Samples:
        dense = self.ms(self.dense_plan)
        times = {"dense": dense, **{str(i): self.ms(plan) for i, plan in enumerate(plans)}}
        return Samples({name: ((ms,),) * blocks for name, ms in times.items()}, {})

    def against_dense(self, plan: PruningPlan, progress: Any = None) -> PairTiming:
        dense, pruned = (((self.ms(each),),) * 2 for each in (self.dense_plan, plan))
        return PairTiming(dense, pruned, dense, seed=0, load_ms={"dense": 1.0, "pruned": 1.0})

    @property
    def dense_plan(self) -> PruningPlan:
        layers = self.prepared.layout.layers
        return self.plan([x.heads for x in layers], [x.neurons for x in layers])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workspace with scores and curves of the tiny classifier, and what it was prepared from."""
    source = Source(str(classifier()), calibration=str(lines()), seq_len=16)
    prepared = prepare(source)
    workspace = Workspace.claim(tmp_path_factory.mktemp("scored") / "work", source)
    score_stage(workspace, prepared)
    curve_stage(workspace, prepared)
    return workspace, prepared


def yard_of(scored: Any, ms: Callable[[PruningPlan], float], *, batch: int = 1) -> FormulaYard:
    _, prepared = scored
    point = Point(batch)
    nowhere = Path("never-opened")
    return FormulaYard(prepared, exporter("onnx"), ExportSpec(), point, 1, ALIGN, {}, nowhere, nowhere, ms)


# --- the table


def test_a_table_of_an_additive_engine_predicts_every_plan(scored: Any) -> None:
    yard = yard_of(scored, Formula())
    table = measure_table(yard)
    dense = Formula()(yard.dense_plan)
    assert table.dense_ms == pytest.approx(dense)
    assert table.fixed == pytest.approx(2.0e6, rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        heads, neurons = rng.integers(0, HEADS + 1, LAYERS), rng.integers(0, 97, LAYERS)
        expected = Formula()(yard.plan(heads.tolist(), neurons.tolist()))
        assert table.predict_ms(heads.tolist(), neurons.tolist()) == pytest.approx(expected)


def test_the_cost_of_a_table_is_the_sum_of_its_parts(scored: Any) -> None:
    table = measure_table(yard_of(scored, Formula(step=32)))
    heads, neurons = (4, 1), (64, 8)
    total = table.fixed + sum(int(table.of_heads(i, HEADS)[n]) for i, n in enumerate(heads))
    total += sum(int(table.of_neurons(i, 96)[n]) for i, n in enumerate(neurons))
    assert total == pytest.approx(1e6 * table.predict_ms(heads, neurons), abs=10)


def test_the_grid_measures_all_layers_of_a_shape_at_once_and_aligned_widths() -> None:
    layers = resolve(tiny_model("bert")).layers
    cells = list(grid(layers, 16))
    assert {cell.layers for cell in cells} == {(0, 1, 2)}
    assert [c.count for c in cells if c.kind == "heads"] == [0, 1, 2, 3, 4]
    assert [c.count for c in cells if c.kind == "neurons"] == [0, 16, 32, 48]  # of 80; 10 rounds down to 0


def test_layers_of_other_shapes_have_cells_of_their_own() -> None:
    first, *others = resolve(tiny_model("bert")).layers
    wider = replace(first, ffn=replace(first.ffn, units=160))
    found = {cell.layers for cell in grid((wider, *others), 16)}
    assert found == {(0,), (1, 2)}


def test_a_width_that_takes_longer_than_a_wider_one_counts_as_the_wider_one() -> None:
    steps = Steps((0, 2, 3, 4), (0.0, 3.0, 5.0, 4.0))
    np.testing.assert_allclose(steps.at(4), [0.0, 1.5, 3.0, 4.0, 4.0])


def test_interpolation_is_straight_between_measured_widths() -> None:
    np.testing.assert_allclose(Steps((0, 4), (0.0, 2.0)).at(4), [0.0, 0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("counts", "ms"), [((1, 4), (0.0, 1.0)), ((0, 4), (0.0,)), ((0, 4, 2), (0.0, 1.0, 2.0)), ((0, 4), (0.0, np.nan))]
)
def test_impossible_steps_are_refused(counts: tuple[int, ...], ms: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="optin profile"):
        Steps(counts, ms)


def test_held_out_plans_tell_how_wrong_a_table_is(scored: Any) -> None:
    for formula, worst in ((Formula(), 1e-6), (Formula(coupling=0.2), 0.2)):
        yard = yard_of(scored, formula)
        table = with_held_out(measure_table(yard), yard, 10)
        assert len(table.held_out) == 10
        assert len({each.heads for each in table.held_out}) > 3
        errors = [each.predicted_ms / formula(yard.plan(each.heads, each.neurons)) - 1 for each in table.held_out]
        np.testing.assert_allclose([each.error for each in table.held_out], errors, atol=1e-9)
        assert np.abs(errors).max() < worst
    assert np.abs(errors).max() > 1e-3  # the coupling shows


def test_a_table_tells_its_widths_and_its_errors(scored: Any) -> None:
    table = measure_table(yard_of(scored, Formula()))
    rows = table_rows(table)
    assert ("all 2", "heads", "6", "1.800") in rows
    assert len(rows) == len(table.heads[0].counts) + len(table.neurons[0].counts)
    off = replace(table, held_out=(HeldOut((1, 1), (8, 8), 3.0, 4.0), HeldOut((1, 1), (8, 8), 4.4, 4.0)))
    assert held_out_line(off) == "2 random plans: predicted times are off by 17.5% in the median, 25.0% at worst."


def test_a_stored_table_is_used_where_it_fits_and_measured_again_where_not(scored: Any, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    first = table_at(path, yard_of(scored, Formula()))
    assert LatencyTable.from_json(json.loads(path.read_text())) == first
    assert table_at(path, yard_of(scored, Formula(fixed=50.0))) == first  # nothing was measured
    other = table_at(path, yard_of(scored, Formula(fixed=50.0), batch=2))
    assert other.dense_ms == pytest.approx(first.dense_ms + 48)
    with pytest.raises(BadInput, match=r"latency\.json: .*batch is 2, not 1"):
        read_table(path, scored[1].layout, yard_of(scored, Formula()).setting)
    wide = replace(yard_of(scored, Formula(), batch=2), align=16)
    with pytest.raises(BadInput, match="align is 8, not 16"):
        read_table(path, scored[1].layout, wide.setting)
    with pytest.raises(BadInput, match="of layout"):
        read_table(path, resolve(tiny_model("bert")), {})


@pytest.mark.parametrize("change", [{"dense_ms": 0.0}, {"schema_version": 9}, {"heads": [3]}, {"extra": 1}], ids=str)
def test_a_damaged_table_is_refused(scored: Any, change: dict[str, Any]) -> None:
    table = measure_table(yard_of(scored, Formula()))
    with pytest.raises(BadInput, match="latency table"):
        LatencyTable.from_json({**table.to_json(), **change})


# --- the search


def test_a_search_within_a_table_is_the_best_of_all_choices() -> None:
    model = tiny_model("bert")
    layout = resolve(model)
    rng = np.random.default_rng(3)
    heads = tuple(Steps(tuple(range(7)), (0.0, *np.cumsum(rng.uniform(0.1, 1, 6)))) for _ in layout.layers)
    neurons = tuple(Steps((0, 40, 80), (0.0, *np.cumsum(rng.uniform(1, 3, 2)))) for _ in layout.layers)
    table = LatencyTable(30.0, heads, neurons, layout.hash, {})
    of_heads, of_neurons = (
        tuple(torch.tensor(np.sort(rng.uniform(0, 1, units))[::-1].copy()) for _ in layout.layers) for units in (6, 80)
    )
    scores = Scores(of_heads, of_neurons, layout.hash, {})
    limit = int(0.8 * table.dense)
    masks = search_within(scores, layout, [(table, limit)], align=40, allocation="uniform")
    counts = [sum(keep) for keep in masks.heads], [sum(keep) for keep in masks.neurons]
    spent = table.fixed + sum(int(table.of_heads(i, 6)[n]) for i, n in enumerate(counts[0]))
    spent += sum(int(table.of_neurons(i, 80)[n]) for i, n in enumerate(counts[1]))
    assert spent <= limit
    best = -1.0
    for h in range(7):  # uniform: the same number in all layers
        for n in (0, 40, 80):
            cost = table.fixed + sum(int(table.of_heads(i, 6)[h] + table.of_neurons(i, 80)[n]) for i in range(3))
            worth = sum(float(x[:h].sum()) for x in scores.heads) + sum(float(x[:n].sum()) for x in scores.neurons)
            best = max(best, worth if cost <= limit else -1)
    found = sum(float(x[:c].sum()) for x, c in zip(scores.heads, counts[0], strict=True))
    found += sum(float(x[:c].sum()) for x, c in zip(scores.neurons, counts[1], strict=True))
    assert found == pytest.approx(best)


@pytest.mark.parametrize("allocation", ["uniform", "paper"])
def test_time_and_macs_hold_together(scored: Any, allocation: str) -> None:
    workspace, prepared = scored
    table = measure_table(yard_of(scored, Formula(step=32)))
    scores = workspace.read_scores().scores
    limits = [(prepared.cost, int(0.7 * prepared.cost.dense)), (table, int(0.6 * table.dense))]
    masks = search_within(scores, prepared.layout, limits, allocation=allocation)
    counts = [sum(keep) for keep in masks.heads], [sum(keep) for keep in masks.neurons]
    assert prepared.cost.of(*counts) <= limits[0][1]
    assert table.predict_ms(*counts) <= 0.6 * table.dense_ms + 1e-5


# --- the loop


@pytest.mark.parametrize("allocation", ["uniform", "curves"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("coupling", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("option", ["--latency", "--speedup", "--throughput"])
def test_the_measured_time_is_within_the_budget_and_near_it(
    scored: Any, option: str, coupling: float, share: float, allocation: str
) -> None:
    workspace, _ = scored
    formula = Formula(coupling=coupling)
    yard = yard_of(scored, formula, batch=4)
    table = measure_table(yard)
    goal = share * table.dense_ms
    value = {"--latency": goal, "--speedup": 1 / share, "--throughput": 4000 / goal}[option]
    limits = Limits(time=TimeTarget(option, value))
    plan, rounds = plan_within_time(workspace, limits, table, yard, allocation=allocation)
    assert formula(plan) <= goal
    assert formula(plan) >= NEAR[allocation] * goal
    assert plan == workspace.read_plan()
    assert min(abs(each.measured_ms - formula(plan)) for each in rounds) < 1e-9
    settings = json.loads((workspace.root / "masks.json").read_text())["settings"]
    assert settings["measured"]["measured_ms"] == pytest.approx(formula(plan))
    assert settings["time"] == {"option": option, "value": value}


NEAR = {"uniform": 0.85, "curves": 0.93}
"""Two tiny layers: cut alike they have steps of 7% of the time, cut by curves of 3% (a head)."""


@pytest.mark.parametrize("allocation", ["uniform", "curves"])
@pytest.mark.parametrize("drift", [0.9, 1.02, 1.04, 1.06, 1.08, 1.1, 1.3])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.75, 0.9])
def test_a_table_that_is_off_is_corrected_by_measuring(
    scored: Any, share: float, drift: float, allocation: str
) -> None:
    workspace, _ = scored
    table = measure_table(yard_of(scored, Formula()))
    slower = Formula(fixed=2.0 * drift, head=0.3 * drift, neuron=0.02 * drift)  # the machine changed since
    goal = share * table.dense_ms
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = plan_within_time(workspace, limits, table, yard_of(scored, slower), allocation=allocation)
    assert rounds[0].allowed_ns == pytest.approx(1e6 * AIM * goal, rel=1e-6)
    assert NEAR[allocation] * goal <= slower(plan) <= goal


def test_a_lucky_measurement_is_not_believed(scored: Any) -> None:
    workspace, _ = scored
    calls: dict[str, int] = {}

    def moody(plan: PruningPlan) -> float:
        """3% too fast when first seen, 3% too slow when seen again."""
        if plan.kept == 1:
            return Formula()(plan)
        calls[plan.hash] = calls.get(plan.hash, 0) + 1
        return Formula()(plan) * (0.97 if calls[plan.hash] % 2 else 1.03)

    table = measure_table(yard_of(scored, Formula()))
    goal = 0.6 * table.dense_ms
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = plan_within_time(workspace, limits, table, yard_of(scored, moody), allocation="curves")
    assert 0.93 * goal <= Formula()(plan) <= goal
    assert max(calls.values()) == 2
    assert any(each.measured_ms == pytest.approx(each.predicted_ms, rel=1e-3) for each in rounds), "both count"


@dataclass(frozen=True)
class Branches(Formula):
    """A branch that is there at all takes long, as on engines that wait for each launch."""

    branch: float = 2.0

    def __call__(self, plan: PruningPlan) -> float:
        return super().__call__(plan) + self.branch * sum(map(bool, (*plan.heads, *plan.neurons)))


@pytest.mark.parametrize("emptied_is_nearer", [True, False])
def test_branches_are_emptied_only_where_that_keeps_the_outputs_nearer(
    scored: Any, emptied_is_nearer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, prepared = scored
    tried: list[PruningPlan] = []

    def error(model: Any, layout: Any, plan: PruningPlan, batches: Any, **how: Any) -> float:
        tried.append(plan)
        assert how["token_weights"] == prepared.token_weights()
        return float(all((*plan.heads, *plan.neurons)) is emptied_is_nearer)

    monkeypatch.setattr("exporters.bench.time_budget.unseen_error", error)
    formula = Branches()
    table = measure_table(yard_of(scored, formula))
    slower = replace(formula, fixed=3.0)  # so that there are several rounds
    yard, goal = yard_of(scored, slower), 0.7 * table.dense_ms
    limits = Limits(time=TimeTarget("--latency", goal))
    plan, rounds = plan_within_time(workspace, limits, table, yard, allocation="curves")
    assert [all((*one.heads, *one.neurons)) for one in tried] == [False, True]
    assert len(rounds) > 1, "tried once, in the first"
    assert all((*plan.heads, *plan.neurons)) is not emptied_is_nearer
    assert plan == workspace.read_plan()
    assert slower(plan) <= goal
    settings = json.loads((workspace.root / "masks.json").read_text())["settings"]
    assert settings["measured"]["emptying"] is emptied_is_nearer


@pytest.mark.parametrize("allocation", ["curves", "uniform"])
def test_branches_are_emptied_where_nothing_else_is_in_time(
    scored: Any, allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.bench.time_budget.unseen_error", lambda *_, **__: pytest.fail("there is no choice"))
    yard = yard_of(scored, Branches())
    table = measure_table(yard)
    limits = Limits(time=TimeTarget("--latency", 7.0))
    plan, _ = plan_within_time(scored[0], limits, table, yard, allocation=allocation)
    assert not all((*plan.heads, *plan.neurons))


def test_other_budgets_hold_beside_the_time(scored: Any) -> None:
    workspace, _ = scored
    yard = yard_of(scored, Formula())
    table = measure_table(yard)
    limits = Limits(flops=0.4, time=TimeTarget("--speedup", 1.05))
    plan, rounds = plan_within_time(workspace, limits, table, yard, allocation="uniform")
    assert plan.kept <= 0.4
    assert rounds[-1].measured_ms < LEAST * table.dense_ms / 1.05  # the MACs bind: no nearer plan exists
    loose = Limits(flops=0.4, time=TimeTarget("--latency", 2 * table.dense_ms))
    assert plan_within_time(workspace, loose, table, yard, allocation="uniform")[0].kept <= 0.4


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            TimeTarget("--latency", 1.0),
            r"--latency 1ms is 1 ms a batch, but what cannot be cut takes 2 ms .* Use --latency 2\.1\d\dms or more",
        ),
        (TimeTarget("--speedup", 50.0), r"--speedup 50 .* Use --speedup \d.\d\d or less"),
        (TimeTarget("--throughput", 10_000.0), r"Use --throughput \d+\.\d or less"),
        (TimeTarget("--latency", 1000.0), r"the dense model takes 9.44 ms already"),
    ],
)
def test_a_time_that_cannot_be_met_says_what_can(scored: Any, target: TimeTarget, said: str) -> None:
    yard = yard_of(scored, Formula())
    table = measure_table(yard)
    with pytest.raises(InfeasibleBudget, match=said):
        plan_within_time(scored[0], Limits(time=target), table, yard, allocation="uniform")


def test_a_machine_that_never_gets_there_says_the_fastest(scored: Any) -> None:
    table = measure_table(yard_of(scored, Formula()))
    stuck = yard_of(scored, lambda plan: 9.0)  # launch bound: nothing helps
    with pytest.raises(
        InfeasibleBudget, match=r"the fastest of \d plans took 9 ms on onnx. Use --latency 9.000ms or more"
    ):
        plan_within_time(scored[0], Limits(time=TimeTarget("--latency", 5.0)), table, stuck, allocation="uniform")


# --- budgets in MACs at the same time, for the benchmark


@pytest.mark.parametrize("drift", [0.9, 1.0, 1.1])
def test_the_plan_by_macs_that_is_compared_takes_as_long(scored: Any, drift: float) -> None:
    workspace, prepared = scored
    formula = Formula(head=0.1, neuron=0.02)  # heads are cheap, neurons dear: MACs say otherwise
    table = measure_table(yard_of(scored, formula))
    uneven = Formula(head=0.1 * drift, neuron=0.02)  # what the table does not know
    setting = equal_time.Setting(None, workspace, prepared, yard_of(scored, uneven), table)  # type: ignore[arg-type]
    allowed = 0.6 * table.dense_ms
    found = setting.by_macs(allowed)
    assert setting.predicted(found) <= allowed
    more = (found.macs_pruned / found.macs_dense) + 2 * equal_time.STEP
    while (next_larger := setting.plan(Limits(flops=more))).hash == found.hash:
        more += equal_time.STEP
    assert setting.predicted(next_larger) > allowed
    by_time, _ = plan_within_time(
        workspace, Limits(time=TimeTarget("--speedup", 1.6)), table, setting.yard, allocation="curves"
    )
    rival, beside = equal_time.as_slow(setting, by_time)
    assert beside["ratio"] == pytest.approx(uneven(rival) / uneven(by_time))
    assert 0.9 <= beside["ratio"] <= 1.1  # tiny: few plans lie between
    assert beside["speedup"]["time"] == pytest.approx(uneven(setting.yard.dense_plan) / uneven(by_time))
    assert sum(map(len, rival.heads)) < sum(map(len, by_time.heads))


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
    assert judged(target, measurement(10.0, 4.99)).outcome == "holds"
    missed = judged(target, measurement(10.0, 5.02))
    with pytest.raises(MissedTime, match=r"is 5 ms a batch; measured at the end: 5\.02 ms.*too slow") as raised:
        missed.check()
    assert raised.value.exit_code == 1
    # Noise alone misses nothing: the target lies within the interval.
    assert judged(target, measurement(10.0, 5.02, noise=0.05)).outcome == "undecided"
    assert "came nearer" in judged(target, measurement(10.0, 4.0)).sentence
    shaky = judged(target, measurement(10.0, 4.0, again=1.2))
    assert shaky.outcome == "unstable"
    with pytest.raises(TooUnstable):
        shaky.check()


def test_only_a_target_that_is_missed_or_not_to_be_judged_is_an_error() -> None:
    for outcome in ("holds", "undecided"):
        LastWord(outcome, "fine").check()  # type: ignore[arg-type]
    for outcome in ("missed", "unstable"):
        with pytest.raises(OptinError, match="not fine"):
            LastWord(outcome, "not fine").check()  # type: ignore[arg-type]


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


def by_formula(yard: Yardstick, plans: Sequence[PruningPlan], *, blocks: int) -> Samples:
    """In the place of `Yardstick.together`."""
    return FormulaYard(*vars(yard).values()).together(plans, blocks=blocks)


def test_a_time_that_the_dense_model_keeps_is_refused_before_work(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Yardstick, "together", by_formula)
    formula, out = Formula(), tmp_path / "out"
    dense = formula.fixed + LAYERS * (HEADS * formula.head + 96 * formula.neuron)
    options: list[object] = [bert(), *text_options(lines(), out), "--engine", "torch"]
    for target in (("--latency", f"{1.3 * dense}ms"), ("--throughput", 500 / dense)):
        for more in ([], ["--dry-run"]):
            ran = shell("optin-export", *options, *target, *more)
            assert ran.code == 2
            assert f"the dense model takes {dense:.3g} ms already" in ran.err
            assert not out.exists()
    # Within the noise of a few seconds' measurement, or beside another budget, it is not for this check to say.
    for target in (("--latency", f"{1.1 * dense}ms"), ("--latency", f"{2 * dense}ms", "--flops", 0.5)):
        assert shell("optin-export", *options, *target, "--dry-run").code == 0


def test_a_dry_run_says_how_the_time_is_met(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Yardstick, "together", by_formula)
    out = tmp_path / "out"
    ran = shell("optin-export", bert(), *text_options(lines(), out), "--latency", "2ms", "--dry-run")
    assert ran.code == 0, ran.err
    assert "--latency 2ms: planned by a latency table, then measured and corrected" in ran.out
    assert not out.exists()


# --- with an engine


def test_a_yardstick_times_what_is_shipped(tmp_path: Path) -> None:
    source = Source(str(bert()), calibration=str(lines()), seq_len=16)
    target, spec, prepared = ready(source)
    with yardstick(prepared, target, spec, Point(2), threads=1, home=tmp_path) as yard:
        assert (tmp_path / "dense.onnx").is_file()
        found = yard.together([yard.plan([2, 0], [8, 96]), yard.plan([6, 6], [96, 96])], blocks=2)
        assert set(found.ms) == {"dense", "0", "1"}
        assert yard.against_dense(yard.plan([1, 1], [8, 0])).speedup > 0
        assert not list(yard.scratch.iterdir())  # candidates are gone
        assert (yard.setting["engine"], yard.setting["batch"], yard.setting["seq_len"]) == ("onnx", 2, 16)
    assert not yard.scratch.exists()


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_job_within_a_time_leaves_table_plan_and_rounds(
    shell: Shell, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny models take as long as their overhead: the formula is the clock, also of the last measurement.
    formula = Formula()

    def together(yard: Yardstick, plans: Sequence[PruningPlan], *, blocks: int) -> Samples:
        return FormulaYard(*vars(yard).values()).together(plans, blocks=blocks)

    def against_dense(yard: Yardstick, plan: PruningPlan, progress: Any = None) -> PairTiming:
        return FormulaYard(*vars(yard).values()).against_dense(plan)

    monkeypatch.setattr(Yardstick, "together", together)
    monkeypatch.setattr(Yardstick, "against_dense", against_dense)
    judgements: list[tuple[TimeTarget, int]] = []

    def said(target: TimeTarget, measured: Measurement) -> LastWord:
        judgements.append((target, measured.batch))
        return LastWord("holds", "It holds.")

    monkeypatch.setattr("exporters.job.judged", said)
    out = tmp_path / "out"
    ran = shell(
        *("optin-export", classifier(), *text_options(lines(), out)),
        *("--speedup", "1.5", "--engine", engine, "--at", "batch=2", "--at", "batch=1"),
    )
    assert ran.code == 0, ran.err
    assert judgements == [(TimeTarget("--speedup", 1.5), 2)]  # the first point is the budget's
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["time"] == {"option": "--speedup", "value": 1.5}
    dense = formula.fixed + LAYERS * (HEADS * formula.head + 96 * formula.neuron)
    took = formula.fixed + sum(report["heads"]) * formula.head + sum(report["neurons"]) * formula.neuron
    assert 0.94 * dense / 1.5 <= took <= dense / 1.5
    assert report["notes"][-1] == "It holds."
    assert Round(**report["settings"]["rounds"][-1]).measured_ms <= dense / 1.5
    assert json.loads((out / "latency.json").read_text())["setting"]["engine"] == engine
    assert "Planned for `--speedup 1.5` by a latency table" in (out / "report.md").read_text()


def test_profile_writes_a_table_and_its_errors(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Yardstick,
        "together",
        lambda yard, plans, blocks: FormulaYard(*vars(yard).values()).together(plans, blocks=blocks),
    )
    out = tmp_path / "latency.json"
    ran = shell("optin", "profile", bert(), "--seq-len", 16, "--align", 8, "--check", 4, "--out", out)
    assert ran.code == 0, ran.err
    assert "4 random plans: predicted times are off by 0.0% in the median" in ran.out
    table = LatencyTable.from_json(json.loads(out.read_text()))
    assert len(table.held_out) == 4
    assert table.setting["seq_len"] == 16


def test_a_time_cannot_be_planned_without_measuring(scored: Any) -> None:
    with pytest.raises(BadInput, match="--latency 5ms is measured while planning"):
        plan_stage(scored[0], Limits(time=TimeTarget("--latency", 5.0)), write=False)


@pytest.mark.parametrize("allocation", ["uniform", "paper", "curves"])
def test_a_limit_below_what_cannot_be_cut_is_refused_by_every_search(scored: Any, allocation: str) -> None:
    workspace, prepared = scored
    table = measure_table(yard_of(scored, Formula()))
    scores, curves = workspace.read_scores().scores, workspace.read_curves()[0]
    for limit, possible in ((table.fixed - 1, False), (table.fixed, True)):
        how: dict[str, Any] = {"align": ALIGN, "allocation": allocation, "curves": curves}
        if possible:
            masks = search_within(scores, prepared.layout, [(table, limit)], **how)
            assert not any(map(any, (*masks.heads, *masks.neurons)))
        else:
            with pytest.raises(InfeasibleBudget, match="below what no plan can cut"):
                search_within(scores, prepared.layout, [(table, limit)], **how)


def test_macs_of_a_tiny_model_are_a_cost_too() -> None:
    model = tiny_model("bert")
    layout = resolve(model)
    cost = mac_cost(model, layout, seq_len=SEQ_LEN)
    assert cost.of_heads(0, 6).tolist() == [cost.head[0] * n for n in range(7)]
    assert cost.of_neurons(1, 80)[-1] == 80 * cost.neuron[1]
