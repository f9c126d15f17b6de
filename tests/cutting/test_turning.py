"""Widths of heads are turned: the network computes the same, and what its last entries hold is the least possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import optin_deploy
from optin_deploy.checkpoint.loading import load_model
from optin_deploy.cutting.turning import balanced, turned
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Batch
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from optin_deploy.structure.turning import KINDS, turnables
from support.tiny_checkpoint import Shell, bert, classifier, lines, text_options
from support.tiny_models import tiny_batches, tiny_model

pytestmark = pytest.mark.usefixtures("by_torchscript")


class Turned(NamedTuple):
    network: Network
    groups: tuple[str, ...]
    skipped: dict[str, str]


def turn(model: nn.Module, batches: Sequence[Batch], **how: Any) -> tuple[Subject, Turned]:
    network = read(model, **how)
    probes = probes_of(network)
    subject = Subject.make(find(network, probes))
    widths, skipped = turnables(subject.structure, (group for group in subject.layout.groups if group.kind in KINDS))
    network = turned(subject, batches, widths, probes)
    return subject, Turned(network, tuple(each.group.name for each in widths), skipped)


@pytest.mark.parametrize(
    ("name", "turns"),
    [("bert", KINDS), ("vit", KINDS), ("dinov2", KINDS), ("distilbert", KINDS), ("gpt2", ("v-width",))],
)
def test_a_network_whose_heads_are_turned_computes_the_same(name: str, turns: Sequence[str]) -> None:
    model = tiny_model(name)
    batches = tiny_batches(model)
    subject, found = turn(model, batches)
    before = subject.structure.network
    assert found.groups == tuple(group.name for group in subject.layout.groups if group.kind in turns)
    moved = {name for name, weight in found.network.weights.items() if weight is not before.weights.get(name)}
    assert len(moved) >= 2 * len(found.groups)
    for batch in batches:
        feeds = subject.fed(batch)
        one, other = (Program(network, dtype=torch.float64)(feeds).outputs for network in (before, found.network))
        for output, value in one.items():
            torch.testing.assert_close(other[output], value, rtol=1e-4, atol=1e-4)
    assert [group.name for group in find(found.network).groups] == [group.name for group in subject.layout.groups]


class Attention(nn.Module):
    """Two heads of eight entries, without scaling."""

    def __init__(self, *, rotary: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("angles", torch.linspace(0.1, 1, 8).cos() if rotary else torch.ones(1))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 8).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(part(x)) for part in (self.query, self.key, self.value))
        weights = ((query * self.angles) @ (key * self.angles).transpose(-1, -2)).softmax(-1)
        return x + self.out((weights @ value).transpose(1, 2).flatten(2))


def attention(seed: int = 0, **how: bool) -> tuple[Attention, list[Batch]]:
    torch.manual_seed(seed)
    spread = torch.linspace(0.2, 2, 16)
    return Attention(**how).eval(), [{"x": torch.randn(6, 5, 16) * spread} for _ in range(2)]


def test_no_choice_of_so_few_entries_loses_less_of_the_products() -> None:
    """The singular values of a table tell what the best table of that rank loses."""
    torch.manual_seed(0)
    one, other = (torch.randn(3, 50, 8, dtype=torch.float64) * torch.linspace(0.1, 2, 8) for _ in range(2))
    other = other @ torch.randn(8, 8, dtype=torch.float64)
    forward, back = balanced(one.mT @ one, other.mT @ other)
    turned_one, turned_other = one @ forward.mT, other @ back
    torch.testing.assert_close(turned_one @ turned_other.mT, one @ other.mT)
    least = torch.linalg.svdvals(one @ other.mT)
    for width in range(1, 8):
        lost = one @ other.mT - turned_one[..., :width] @ turned_other[..., :width].mT
        torch.testing.assert_close(torch.linalg.matrix_norm(lost), least[:, width:].norm(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_entries_in_front_move_the_output_less_than_the_best_choice_of_others(kind: str) -> None:
    """Beside every choice of as many entries of the network as it was."""
    model, batches = attention()
    before, found = turn(model, batches, inputs=batches[0])
    after = Subject.make(find(found.network, probes_of(found.network)))

    def moved(subject: Subject, kept: Sequence[int]) -> float:
        (group,) = (group for group in subject.layout.groups if group.kind == kind)
        marks = torch.zeros(1, group.units)
        marks[0, list(kept)] = 1
        run = [(subject.run(batch, masks=subject.masks(group, marks)), subject.run(batch)) for batch in batches]
        return sum(float((one.outputs["output"] - other.outputs["output"]).square().sum()) for one, other in run)

    choices = [moved(before, kept) for kept in combinations(range(8), 4)]
    assert moved(after, range(4)) < 0.8 * min(choices)


def test_a_head_that_is_dead_stays_a_number() -> None:
    forward, back = balanced(torch.zeros(1, 4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None])
    torch.testing.assert_close(forward.mT @ forward, torch.eye(4, dtype=torch.float64)[None])
    torch.testing.assert_close(back @ forward, torch.eye(4, dtype=torch.float64)[None])


def test_padding_turns_nothing() -> None:
    model = tiny_model("bert")
    batch = tiny_batches(model)[0]
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(7))}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    one, two = (turn(model, [each])[1].network.weights for each in (batch, other))
    for name in ("encoder.layer.0.attention.self.value.weight", "encoder.layer.2.attention.self.key.weight"):
        torch.testing.assert_close(torch_tensor(one[name]), torch_tensor(two[name]), rtol=1e-3, atol=1e-4)


def test_entries_that_something_tells_apart_stay_as_they_are() -> None:
    model, batches = attention(rotary=True)
    subject, found = turn(model, batches, inputs=batches[0])
    kinds = {group.name: group.kind for group in subject.layout.groups}
    assert [kinds[name] for name in found.groups] == ["v-width"]
    assert list(found.skipped.values()) == ["Mul stands between"]


def test_weights_of_16_bits_stay_as_they_are() -> None:
    model, batches = attention()
    half = [{"x": batch["x"].half()} for batch in batches]
    subject, found = turn(model.half(), half, inputs=half[0])
    assert found.network is subject.structure.network
    assert set(found.skipped.values()) == {"a weight is stored in 16 bits, which would round anew"}


class Watched(Attention):
    """Gives its values too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.heads(self.value(x)).tanh()


def test_what_something_else_reads_is_not_turned() -> None:
    torch.manual_seed(0)
    model, batches = Watched().eval(), attention()[1]
    subject, found = turn(model, batches, inputs=batches[0])
    kinds = {group.name: group.kind for group in subject.layout.groups}
    assert "v-width" not in {kinds[name] for name in found.groups}


def test_a_module_is_pruned_to_narrower_heads_and_comes_back_as_a_graph(tmp_path: Path) -> None:
    model = tiny_model("vit+head")
    batches = tiny_batches(model)
    pruned = optin_deploy.prune(model, batches, flops=0.6, align=2, units=["heads", "neurons", "qk-width", "v-width"])
    assert {name.split(": ")[1] for name in pruned.plan.keep} >= {"qk-width", "v-width"}
    macs = pruned.report["macs"]
    assert macs["pruned"] <= 0.6 * macs["dense"]
    pruned.save(tmp_path / "smaller")
    loaded = optin_deploy.load(tmp_path / "smaller")
    pixels = batches[0]["pixel_values"]
    torch.testing.assert_close(loaded(pixel_values=pixels)["logits"], pruned.model(pixel_values=pixels)["logits"])


@pytest.mark.parametrize("units", ["heads", [], ["tokens"], ["sheep"], 3])
def test_units_are_a_list_of_known_kinds(units: Any) -> None:
    model = tiny_model("vit+head")
    with pytest.raises(BadInput, match="units"):
        optin_deploy.prune(model, tiny_batches(model), units=units)


@pytest.mark.slow
def test_a_job_turns_the_widths_that_it_may_cut_and_keeps_them(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "job"
    options = [bert(), *text_options(lines(), out), "--units", "heads,neurons,qk-width,v-width"]
    options += ["--align", 2, "--threads", 1]
    ran = shell("optin-export", *options)
    assert ran.code == 0, ran.err
    plan, dense = NetworkPlan.read(out / "plan.json"), read_file(out / "dense.onnx")
    assert {name.split(": ")[1] for name in plan.keep} >= {"qk-width", "v-width"}
    plan.check(find(dense))
    before = read(load_model(str(bert()))[0])
    ids, mask = torch.tensor([[2, 5, 7, 3], [2, 8, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    one, other = (Program(network)(feeds).outputs["last_hidden_state"] for network in (before, dense))
    assert 0 < float((one - other).abs().max()) < 1e-4
    again = shell("optin-export", *options, "--flops", 0.7)
    assert again.code == 0, again.err
    smaller = NetworkPlan.read(out / "plan.json")
    smaller.check(find(dense))
    assert smaller.keep != plan.keep


def test_turned_queries_stay_from_the_front() -> None:
    model = tiny_model("vit+head")
    pruned = optin_deploy.prune(model, tiny_batches(model), flops=0.6, align=2, units=["qk-width", "neurons"])
    kept = [units for name, units in pruned.plan.keep.items() if name.endswith("qk-width")]
    assert kept
    assert all(units == tuple(range(len(units))) for units in kept)


@pytest.mark.slow
def test_a_model_of_narrower_heads_is_tuned_with_other_rows(shell: Shell, tmp_path: Path) -> None:
    options = [*text_options(lines(), tmp_path / "job"), "--units", "heads,neurons,qk-width,v-width", "--align", 2]
    ran = shell("optin-export", classifier(), *options, "--threads", 1)
    assert ran.code == 0, ran.err
    (tmp_path / "other.txt").write_text("\n".join(f"again {line}" for line in lines().read_text().splitlines()[:24]))
    learning = ("--data", tmp_path / "other.txt", "--epochs", 1, "--out", tmp_path / "tuned")
    ran = shell("optin", "finetune", tmp_path / "job", *learning)
    assert ran.code == 0, ran.err
    assert (tmp_path / "tuned" / "model.onnx").is_file()
