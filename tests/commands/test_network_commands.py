"""`optin plan FILE.onnx --magnitude`, `optin rewrite FILE.onnx`, `optin_deploy.cut`: planned, cut, proven, written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import optin_deploy
from optin_deploy.cutting.masks import masks
from optin_deploy.errors import BadInput, MissingDependency, PlanMismatch
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.pruning import networks, rewriting
from optin_deploy.structure.groups import Layout
from support.tiny_checkpoint import Shell
from support.tiny_networks import HIDDEN, NEURONS, Image, Text, export, inputs, made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(made(Text), tmp_path_factory.mktemp("text") / "text.onnx")


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    path = tmp_path / "hand.json"
    keep = {"layers.0.attention: heads": [1, 4], "layers.1.mlp: neurons": list(range(0, NEURONS, 2))}
    path.write_text(json.dumps({"schema_version": 1, "keep": keep}))
    return path


def run(path: Path, feeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return found


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


# plan


@pytest.mark.parametrize("allocation", ["uniform", "paper"])
def test_a_plan_by_magnitude_keeps_within_the_budget(shell: Shell, text: Path, tmp_path: Path, allocation: str) -> None:
    out = tmp_path / "plan.json"
    ran = shell("optin", "plan", text, "--magnitude", "--flops", 0.7, "--allocation", allocation, "--out", out)
    assert ran.code == 0, ran.err
    assert f"Next: optin rewrite {text} --plan {out}" in ran.out
    plan = NetworkPlan.read(out)
    assert plan.cost is not None
    assert 0.5 < plan.cost.macs_pruned / plan.cost.macs_dense <= 0.7
    assert plan.settings["allocation"] == allocation
    assert {name.split(": ")[1] for name in plan.keep} <= {"heads", "neurons"}


def test_a_plan_by_magnitude_keeps_within_parameters_and_bytes(shell: Shell, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    ran = shell("optin", "plan", text, "--magnitude", "--params", 0.7, "--size", "40KiB", "--out", out)
    assert ran.code == 0, ran.err
    plan = NetworkPlan.read(out)
    assert plan.cost is not None
    assert plan.cost.weights_pruned <= 0.7 * plan.cost.weights_dense
    assert 30 * 2**10 < plan.cost.bytes_pruned <= 40 * 2**10
    assert plan.settings["limits"] == {"params": 0.7, "size": 40 * 2**10}
    assert plan.origin is not None
    assert plan.origin.scores == "magnitude"


def test_only_the_kinds_that_are_named_are_cut(shell: Shell, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--magnitude", "--flops", 0.9, "--units", "v-width,qk-width", "--align", 2, "--out", out)
    assert shell("optin", "plan", text, *options).code == 0
    kept = NetworkPlan.read(out).keep
    assert {name.split(": ")[1] for name in kept} == {"v-width", "qk-width"}
    assert all(len(units) % 2 == 0 for units in kept.values())


def test_a_plan_is_written_over_earlier_plans_alone(shell: Shell, text: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "plan.json", ("optin", "plan", text, "--magnitude", "--out", tmp_path / "plan.json")
    assert shell(*command, "--dry-run").code == 0
    assert not out.exists()
    assert shell(*command).code == 0
    assert shell(*command, "--flops", 0.8).code == 0
    out.write_text('{"mine": 1}')
    assert shell(*command).code == 2
    assert out.read_text() == '{"mine": 1}'
    assert shell(*command, "--force").code == 0
    assert (tmp_path / "plan.json.kept1").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "Add --magnitude"),
        (("--magnitude",), "--out PLAN.json is missing"),
        (("--magnitude", "--out", "p.json", "--flops", "0.01"), "Use --flops 0."),
        (("--magnitude", "--out", "p.json", "--units", "toes"), "possible are heads"),
        (("--magnitude", "--out", "p.json", "--allocation", "curves"), "Use uniform or paper"),
        (("--magnitude", "--out", "p.json", "--params", "0.01"), "Use --params 0."),
        (("--magnitude", "--out", "p.json", "--flops", "0.01", "--size", "1KiB"), "--size "),
        (("--magnitude", "--out", "p.json", "--params", "2"), "--params 2.0: give the share to keep"),
        (("--magnitude", "--out", "p.json", "--max-drop", "1"), "--max-drop would do nothing"),
        (("--magnitude", "--out", "p.json", "--no-compensation"), "--no-compensation would do nothing"),
    ],
)
def test_a_plan_that_cannot_be_made_says_what_to_do(
    shell: Shell, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = shell("optin", "plan", text, *options)
    assert ran.code == 2
    assert said in ran.err
    assert files(tmp_path) == set()


@pytest.mark.parametrize("option", [("--units", "heads"), ("--out", "p.json"), ("--shape", "a=3")])
def test_options_of_networks_are_refused_for_folders(shell: Shell, tmp_path: Path, option: tuple[str, str]) -> None:
    ran = shell("optin", "plan", tmp_path, *option)
    assert ran.code == 2
    assert f"{option[0]} would do nothing" in ran.err


# rewrite


def test_a_file_is_cut_and_computes_what_the_masked_one_does(
    shell: Shell, text: Path, by_hand: Path, tmp_path: Path
) -> None:
    out = tmp_path / "smaller.onnx"
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", out)
    assert ran.code == 0, ran.err
    assert f"Next: optin gate {text} {out}" in ran.out
    layout, plan = optin_deploy.inspect(text), NetworkPlan.read(by_hand)
    feeds = inputs(made(Text))
    masked = Program(layout.structure.network)(feeds, masks=masks(layout, plan.keep)).outputs["logits"]
    np.testing.assert_allclose(run(out, feeds)[0], masked.detach().numpy(), atol=1e-5)
    assert np.abs(run(text, feeds)[0] - masked.detach().numpy()).max() > 1e-3
    assert out.stat().st_size < text.stat().st_size
    onnx.checker.check_model(str(out), full_check=True)
    shapes = [tuple(each.dims) for each in onnx.load(out).graph.initializer]
    assert (HIDDEN, NEURONS // 2) in shapes
    assert files(tmp_path) == {"hand.json", "smaller.onnx"}


def test_a_plan_by_magnitude_is_rewritten_and_inspected_again(shell: Shell, text: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "smaller.onnx"
    assert shell("optin", "plan", text, "--magnitude", "--flops", 0.6, "--out", plan).code == 0
    assert shell("optin", "rewrite", text, "--plan", plan, "--out", out).code == 0
    found = {group.name: group.units for group in optin_deploy.inspect(out).groups}
    for name, units in NetworkPlan.read(plan).keep.items():
        assert found[name] == len(units)


def test_a_dry_run_proves_and_writes_nothing(shell: Shell, text: Path, by_hand: Path, tmp_path: Path) -> None:
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", tmp_path / "smaller.onnx", "--dry-run")
    assert ran.code == 0
    assert "proven" in ran.out
    assert "would write" in ran.out
    assert files(tmp_path) == {"hand.json"}


def test_earlier_results_are_replaced_and_files_of_others_are_not(
    shell: Shell, text: Path, by_hand: Path, tmp_path: Path
) -> None:
    out = tmp_path / "smaller.onnx"
    for _ in range(2):
        assert shell("optin", "rewrite", text, "--plan", by_hand, "--out", out).code == 0
    export(made(Text, seed=3), out)
    before = out.read_bytes()
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", out)
    assert ran.code == 2
    assert out.read_bytes() == before
    assert shell("optin", "rewrite", text, "--plan", by_hand, "--out", out, "--force").code == 0
    assert (tmp_path / "smaller.onnx.kept1").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --plan PLAN.json"),
        (("--plan", "hand.json"), "--out SMALLER.onnx"),
        (("--plan", "hand.json", "--out", "smaller.pt"), "ends in .onnx"),
        (("--plan", "absent.json", "--out", "s.onnx"), "absent.json does not exist"),
        (("--plan", "hand.json", "--out", "s.onnx", "--no-compensation"), "--no-compensation would do nothing"),
        (("--plan", "hand.json", "--out", "s.onnx", "--shape", "wide=3"), "no free size"),
    ],
)
def test_a_file_that_cannot_be_cut_says_what_to_do(
    shell: Shell,
    text: Path,
    by_hand: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(by_hand.parent)
    ran = shell("optin", "rewrite", text, *options)
    assert ran.code == 2
    assert said in ran.err
    assert files(by_hand.parent) == {"hand.json"}


def test_what_is_read_is_never_written_over(shell: Shell, by_hand: Path, tmp_path: Path) -> None:
    source = export(made(Text), tmp_path / "text.onnx")
    before = source.read_bytes()
    for force in ((), ("--force",)):
        ran = shell("optin", "rewrite", source, "--plan", by_hand, "--out", source, *force)
        assert ran.code == 2
        assert "would replace" in ran.err
    (tmp_path / "link.onnx").symlink_to(source)
    assert shell("optin", "rewrite", source, "--plan", by_hand, "--out", tmp_path / "link.onnx", "--force").code == 2
    assert shell("optin", "plan", source, "--magnitude", "--out", source, "--force").code == 2
    assert source.read_bytes() == before


def test_the_plan_of_another_network_is_refused(shell: Shell, text: Path, tmp_path: Path) -> None:
    other, plan = export(made(Text, seed=1), tmp_path / "other.onnx"), tmp_path / "plan.json"
    assert shell("optin", "plan", other, "--magnitude", "--out", plan).code == 0
    ran = shell("optin", "rewrite", text, "--plan", plan, "--out", tmp_path / "s.onnx")
    assert ran.code == 2
    assert "was made for the network" in ran.err
    assert not (tmp_path / "s.onnx").exists()


def test_a_cut_that_is_wrong_is_never_written(
    shell: Shell, text: Path, by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = networks.cut_graph

    def other_units(layout: Layout, keep: Mapping[str, Sequence[int]]) -> Network:
        return right(layout, {name: [unit ^ 1 for unit in units] for name, units in keep.items()})

    monkeypatch.setattr(networks, "cut_graph", other_units)
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", tmp_path / "s.onnx")
    assert ran.code != 0
    assert "differs from the masked one" in ran.err
    assert files(tmp_path) == {"hand.json"}


def test_without_onnx_runtime_the_proof_alone_counts(
    shell: Shell, text: Path, by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingDependency("onnxruntime is not installed.")

    monkeypatch.setattr(rewriting, "OrtRuntime", missing)
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", tmp_path / "s.onnx")
    assert ran.code == 0
    assert "ONNX Runtime differs" not in ran.out
    assert (tmp_path / "s.onnx").is_file()


def test_a_file_that_the_engine_computes_otherwise_is_not_written(
    shell: Shell, text: Path, by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(rewriting.OrtRuntime):
        def run(self, feeds: object) -> dict[str, np.ndarray]:
            found = super().run(feeds)  # type: ignore[arg-type]
            return {name: value * (1 if self._path == text else 1.01) for name, value in found.items()}

    monkeypatch.setattr(rewriting, "OrtRuntime", Wrong)
    ran = shell("optin", "rewrite", text, "--plan", by_hand, "--out", tmp_path / "s.onnx")
    assert ran.code == 1
    assert "the dense file does not" in ran.err
    assert files(tmp_path) == {"hand.json"}


# in Python


def test_the_library_cuts_what_it_is_given(text: Path, by_hand: Path) -> None:
    plan = NetworkPlan.read(by_hand)
    feeds = inputs(made(Text))
    smaller = optin_deploy.cut(text, by_hand)
    outputs = Program(smaller)(feeds).outputs["logits"]
    module = made(Text)
    cut_module = optin_deploy.cut(module, plan, inputs(module))
    assert isinstance(cut_module, Text)
    found = cut_module(*feeds.values())
    torch.testing.assert_close(found, outputs, atol=1e-5, rtol=1e-5)
    assert module.get_parameter("layers.1.mlp.up.weight").shape == (NEURONS, HIDDEN)
    torch.testing.assert_close(Program(optin_deploy.cut(onnx.load(text), plan.keep))(feeds).outputs["logits"], outputs)


def test_the_library_refuses_plans_that_do_not_fit(text: Path) -> None:
    with pytest.raises(BadInput, match="give a NetworkPlan"):
        optin_deploy.cut(text, 0.5)
    with pytest.raises(BadInput, match="Near are"):
        optin_deploy.cut(text, {"layers.0: heads": [0]})
    other = export(made(Text, seed=1), text.with_name("other.onnx"))
    layout = optin_deploy.inspect(other)
    with pytest.raises(PlanMismatch):
        optin_deploy.cut(text, plan_of(layout, {}))


def test_convolutions_are_planned_and_cut(shell: Shell, tmp_path: Path) -> None:
    source, plan, out = export(made(Image), tmp_path / "image.onnx"), tmp_path / "plan.json", tmp_path / "small.onnx"
    options = ("--magnitude", "--flops", 0.5, "--align", 2, "--out", plan)
    assert shell("optin", "plan", source, *options).code == 0
    assert any(name.endswith("channels") for name in NetworkPlan.read(plan).keep)
    ran = shell("optin", "rewrite", source, "--plan", plan, "--out", out)
    assert ran.code == 0, ran.err
    feeds = inputs(made(Image))
    assert run(out, feeds)[0].shape == run(source, feeds)[0].shape
