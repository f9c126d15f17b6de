"""Jobs that merge tokens: exact costs, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

import optin_deploy
from optin_deploy.cutting.tokens import merged
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.profiling import measure_table
from optin_deploy.jobs.stages import curve_stage
from optin_deploy.jobs.time_budget import Planning
from optin_deploy.jobs.time_rounds import AIM
from optin_deploy.jobs.width_timer import WidthTimer, form_at, inputs_of
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.points import Point
from optin_deploy.measuring.timing import LatencySamples, PairTiming
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import Limits, TimeTarget
from optin_deploy.planning.costs import CostLimit, limits_within
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.planning.widths import Choice, Keep
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.pruning import pick
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.source import Source
from optin_deploy.pruning.tokens import merge_error, merging, schedules
from optin_deploy.pruning.trial import unseen_error
from optin_deploy.quality.held_out import joined, judged_samples
from optin_deploy.runtimes.openvino import OpenVinoRuntime
from optin_deploy.structure.find import find
from optin_deploy.structure.macs import macs
from support.tiny_checkpoint import Shell, copy_of, photos, vit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job on an image classifier: four of five tokens stay in the mean, and 70% of the MACs."""
    folder = tmp_path_factory.mktemp("tokens") / "job"
    source = Source(model=str(vit()), calibration=str(photos()))
    export_model(Job(source, Limits(flops=0.7), tokens=0.8, points=(Point(),), threads=1), folder)
    return folder


def counted(path: Path) -> int:
    """Multiply-accumulates of one sample, as the algebra of the file itself tells them."""
    found = find_in(path)
    (name,) = found.probes[0]
    return macs(found.layout.structure) // len(found.probes[0][name])


def test_a_plan_costs_what_the_written_file_costs(finished: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["merges"][0] == 0
    assert sum(plan["merges"]) > 0
    assert counted(finished / "model.onnx") == plan["cost"]["macs_pruned"] <= 0.7 * plan["cost"]["macs_dense"]
    assert "tokens are merged, behind the attention" in (finished / "report.md").read_text()
    assert counted(finished / "dense.onnx") == plan["cost"]["macs_dense"]


def test_files_give_the_same_on_engines_and_when_loaded(finished: Path) -> None:
    assert not (finished / "model").exists()
    pixels = torch.rand(3, 3, 32, 32)
    loaded = optin_deploy.load(finished)
    with torch.no_grad():
        wanted = loaded(pixel_values=pixels)["logits"]
    with OpenVinoRuntime(finished / "model.onnx", threads=1) as engine:
        found = engine.run({"pixel_values": pixels.numpy()})["logits"]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    samples = load_file(finished / "samples.safetensors")
    given = Program(read_file(finished / "model.onnx"))({"pixel_values": samples["input.pixel_values"]}).outputs
    torch.testing.assert_close(given["logits"], samples["pruned.logits"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_other_budgets_sweeps_and_rewrites_of_a_job_merge_too(finished: Path, shell: Shell, tmp_path: Path) -> None:
    finished = copy_of(finished, tmp_path / "copy")
    swept = shell("optin", "sweep", finished, "--tokens", 0.9, "--flops", "0.8,0.6")
    assert swept.code == 0, swept.err
    planned = shell("optin", "plan", finished, "--tokens", 0.9, "--flops", 0.6)
    assert planned.code == 0, planned.err
    assert "tokens are merged, behind the attention of the blocks: 0, " in planned.out
    rewritten = shell(
        "optin", "rewrite", finished / "dense.onnx", "--plan", finished / "plan.json", "--out", tmp_path / "x.onnx"
    )
    assert rewritten.code == 0, rewritten.err
    plan = json.loads((finished / "plan.json").read_text())
    assert counted(tmp_path / "x.onnx") == plan["cost"]["macs_pruned"]


def test_tokens_are_dropped_where_that_is_asked_for(finished: Path, shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path / "copy")
    alone = shell("optin", "plan", folder, "--drop-tokens", "--flops", 0.6)
    assert alone.code == 2
    assert "--drop-tokens says how tokens go" in alone.err
    planned = shell("optin", "plan", folder, "--tokens", 0.8, "--drop-tokens", "--flops", 0.6)
    assert "tokens are dropped, behind the attention of the blocks: 0, " in planned.out
    rewritten = shell("optin", "rewrite", folder, "--force")
    assert rewritten.code == 0, rewritten.err
    plan = json.loads((folder / "plan.json").read_text())
    assert min(plan["merges"]) < 0 == max(plan["merges"])
    assert counted(folder / "model.onnx") == plan["cost"]["macs_pruned"]
    assert "Log" not in {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


@pytest.mark.usefixtures("by_torchscript")
def test_a_module_is_given_as_a_graph_that_merges(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit()).eval()
    batches: list[dict[str, Tensor]] = [{"pixel_values": torch.rand(8, 3, 32, 32)} for _ in range(3)]
    smaller = optin_deploy.prune(model, batches, flops=0.7, tokens=0.8)
    assert "tokens are merged" in smaller.report["why_graph"]
    smaller.save(tmp_path / "x")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (
            each(pixel_values=pixels)["logits"] for each in (smaller.model, optin_deploy.load(tmp_path / "x"))
        )
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tokens", "flops", "says"),
    [
        ("0", "0.6", "give a share in"),
        ("1.5", "0.6", "give a share in"),
        ("0.3", "0.6", "of the tokens stay in the mean"),
    ],
)
def test_shares_that_cannot_be_are_refused(tokens: str, flops: str, says: str, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "x"
    ran = shell("optin-export", vit(), "--calibration", photos(), "--out", out, "--tokens", tokens, "--flops", flops)
    assert ran.code == 2
    assert says in ran.err
    assert not out.exists()


def tried(ready: Ready, expected: Mapping[tuple[int, ...], float], kept: Mapping[tuple[int, ...], Keep]) -> Any:
    """The merges of least error of the three that promise most, made and measured on what did not teach."""
    found = {}
    for merges in sorted(expected, key=lambda each: expected[each])[:3]:
        found[merges] = unseen_error(ready, plan_of(ready.layout, kept[merges], merges=merges))
    return min(found, key=lambda merges: found[merges])


FIXED, MERGE = 0.2, 0.03
"""Parts of the dense time that do not depend on widths: of the network, and of each block that merges."""


@dataclass(frozen=True, eq=False)
class CountingYard(WidthTimer):
    """An engine whose time follows from the multiply-accumulates of the very graph that it would be given."""

    def ms(self, keep: Keep | None, merges: tuple[int, ...]) -> float:
        with TemporaryDirectory() as folder:
            network = form_at(self.prepared, self.spec, keep, Path(folder), merges).network
        there = macs(find(network, self.prepared.ready.found.probes).structure)
        return (there + self.fixed(merges)) / 10**6

    def fixed(self, merges: tuple[int, ...]) -> float:
        return (FIXED + MERGE * sum(map(bool, merges))) * self.dense_macs

    @cached_property
    def dense_ms(self) -> float:
        return self.ms(None, ())

    @cached_property
    def dense_macs(self) -> int:
        return macs(self.layout.structure)

    def together(self, plans: Sequence[Keep], *, blocks: int) -> LatencySamples:
        times = {"dense": self.dense_ms, **{str(i): self.ms(keep, self.merges) for i, keep in enumerate(plans)}}
        return LatencySamples({name: ((ms,),) * blocks for name, ms in times.items()}, {})

    def against_dense(self, keep: Keep, progress: Any = None) -> PairTiming:
        dense, pruned = (((ms,),) * 2 for ms in (self.dense_ms, self.ms(keep, self.merges)))
        return PairTiming(dense, pruned, dense, seed=0, load_ms={"dense": 1.0, "pruned": 1.0})


@pytest.fixture(scope="module")
def curved(finished: Path) -> tuple[Workspace, Prepared]:
    """The finished job, with the error curves of its widths."""
    workspace = Workspace(finished)
    prepared = prepare(workspace.source(), finished)
    curve_stage(workspace, prepared)
    return workspace, prepared


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True])
def test_a_time_is_met_with_merged_tokens(curved: tuple[Workspace, Prepared], free: bool) -> None:
    (workspace, prepared), share = curved, 0.75
    ready, target = prepared.ready, exporter("onnx")
    choice = Choice((*ready.kinds, "tokens"), 1, "curves") if free else merging(ready, Choice(align=1), 0.8)
    choice = replace(choice, allocation="curves")
    yard = CountingYard(
        *(prepared, target, ExportSpec(), Point(), 1, inputs_of(prepared).feeds(Point()), Path("none"), Path("none")),
        merges=choice.merges,
    )
    table = measure_table(yard if free else replace(yard, merges=()), choice)
    dense_ms = yard.dense_ms
    limits = Limits(time=TimeTarget("--latency", share * dense_ms))
    plan, rounds = Planning(Planner(workspace, prepared, choice), yard, limits).within(table)
    taken = yard.ms(plan.keep, plan.merges)
    assert 0.9 * share * dense_ms <= taken <= share * dense_ms
    assert rounds[-1].predicted_ms == pytest.approx(rounds[-1].measured_ms, rel=0.01)
    assert rounds[-1].measured_ms == pytest.approx(taken)
    if not free:
        assert plan.merges == choice.merges
        return
    scores, curves = workspace.scores_of(ready.layout), workspace.read_curves()[0]
    errors, kept = {}, {}
    for merges in schedules(ready):
        room = AIM * share * dense_ms * 10**6 - yard.fixed(merges)
        limit = CostLimit(
            ready.costs_with(merges).macs, int(room * ready.costs.macs.dense / yard.dense_macs), "by hand"
        )
        with suppress(InfeasibleBudget):
            keep = pick(ready, scores, [limit], choice, curves, emptying=not any(merges))
            widths = sum(float(curves[name].error([len(units)])[0]) for name, units in keep.items())
            errors[merges] = widths + merge_error(ready, merges)
            kept[merges] = keep
    assert plan.merges == tried(ready, errors, kept)


@pytest.mark.slow
def test_widths_and_tokens_share_a_budget(finished: Path, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "x"
    options = ("--calibration", photos(), "--out", out, "--units", "heads,neurons,tokens", "--flops", 0.6)
    ran = shell("optin-export", vit(), *options, "--no-dense")
    assert ran.code == 0, ran.err
    plan = NetworkPlan.read(out / "plan.json")
    workspace = Workspace(out)
    prepared = prepare(workspace.source(), out)
    ready, limits = prepared.ready, Limits(flops=0.6)
    scores, curves = workspace.scores_of(ready.layout), workspace.read_curves()[0]
    choice = Choice(align=plan.settings["align"], allocation="curves")
    errors, kept, moved = {}, {}, []
    judging = joined(ready.rows.calibration.batches, judged_samples(ready.rows.calibration.batches))
    for merges in schedules(ready):
        keep = pick(ready, scores, limits_within(ready.costs_with(merges), limits), choice, curves)
        widths = sum(float(curves[name].error([len(units)])[0]) for name, units in keep.items())
        errors[merges], kept[merges] = widths + merge_error(ready, merges), keep
        smaller = merged(ready.layout, merges, ready.found.probes)
        programs = [Program(network) for network in (ready.network, smaller)]
        one, other = ([program(batch).outputs["logits"] for batch in judging] for program in programs)
        moved.append(float((torch.cat(one) - torch.cat(other)).square().mean()))
    assert len(errors) > 1
    assert moved == sorted(moved)
    assert plan.merges == tried(ready, errors, kept)
    assert plan.cost is not None
    assert counted(out / "model.onnx") == plan.cost.macs_pruned <= 0.6 * plan.cost.macs_dense


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--units", "tokens"), "needs widths beside it"),
        (("--units", "heads,neurons,tokens", "--allocation", "paper"), "needs error curves"),
        (("--units", "heads,wheels"), "possible are heads"),
    ],
)
def test_units_that_cannot_be_are_refused(options: tuple[str, ...], says: str, shell: Shell, tmp_path: Path) -> None:
    ran = shell("optin-export", vit(), "--calibration", photos(), "--out", tmp_path / "x", *options)
    assert ran.code == 2
    assert says in ran.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_an_attention_that_nobody_hears_keeps_a_head_where_tokens_are_merged_by_its_keys() -> None:
    model = AutoModelForImageClassification.from_pretrained(vit()).eval()
    silent = model.vit.layers[0].attention.o_proj
    torch.nn.init.zeros_(silent.weight)
    torch.nn.init.zeros_(silent.bias)
    batches = [{"pixel_values": torch.rand(8, 3, 32, 32)} for _ in range(3)]
    without = optin_deploy.prune(model, batches, flops=0.75, align=1)
    assert any(not units for units in without.plan.keep.values())
    smaller = optin_deploy.prune(model, batches, flops=0.75, tokens=0.9, align=1)
    assert all(smaller.plan.keep.values())
    assert smaller.plan.cost is not None
    found = find_in(smaller.network)
    (name,) = found.probes[0]
    assert macs(found.layout.structure) // len(found.probes[0][name]) == smaller.plan.cost.macs_pruned


def test_plans_without_merges_are_stored_as_before_there_were_any() -> None:
    assert "merges" not in NetworkPlan({"a": (0, 1)}).to_json()
    assert NetworkPlan.from_json(NetworkPlan({"a": (0,)}, merges=(0, 3)).to_json()).merges == (0, 3)
