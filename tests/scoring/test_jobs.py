"""Scoring jobs of unit groups: rounds, weightings, parts in files, what is stored, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.zoo.export import export
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.pruning.networks import find_in
from optin_deploy.scoring import unit_job, unit_parts
from optin_deploy.scoring.masking_units import masked_terms
from optin_deploy.scoring.parts import FolderStore, PartsLeft, Worker
from optin_deploy.scoring.settings import Features, ScoreSettings
from optin_deploy.scoring.slopes import Projections, slope_terms
from optin_deploy.scoring.stability import rank_correlation
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from support.tiny_graphs import WIDTH, chain

EXACT = ScoreSettings("exact")
ONE_ROUND = ScoreSettings(probes=2, head_samples=3)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny matrices."""


@cache
def subject(family: str = "bert") -> Subject:
    return Subject.make(find_in(export(family, "torchscript").path).layout, dtype=torch.float64)


def batches(family: str = "bert", count: int = 2) -> list[Mapping[str, Tensor]]:
    return [export(family, "torchscript").family.feeds(seed, batch=3 - seed, length=5) for seed in range(count)]


@cache
def scored(**settings: Any) -> UnitScores:
    return score_units(subject(), batches(), replace(ONE_ROUND, **settings))


def flat(scores: UnitScores) -> Tensor:
    return torch.cat(list(scores.scores.values()))


def same(one: UnitScores, other: UnitScores) -> bool:
    return list(one.scores) == list(other.scores) and all(
        torch.equal(one.scores[name], other.scores[name]) and torch.equal(one.errors[name], other.errors[name])
        for name in one.scores
    )


# --- from terms to scores -------------------------------------------------------------------------------------


def test_exact_scores_are_mean_terms_joined_by_one_constant() -> None:
    network, found = subject(), score_units(subject(), batches(), EXACT)
    groups = network.layout.groups
    with torch.no_grad():
        sums = masked_terms(network, batches(), {group: range(group.units) for group in groups}).sums
    d, o = (torch.cat([sums[group][row] for group in groups]) / 5 for row in (TRAJECTORY, OUTPUT))
    weight = 0.1 * float(d.mean() / o.mean())
    torch.testing.assert_close(flat(found), d + weight * o, rtol=1e-9, atol=0)
    assert list(found.scores) == [group.name for group in groups]
    assert found.provenance["kl_weight"] == pytest.approx(weight)
    assert found.provenance["samples"] == found.provenance["masked_samples"] == 5
    assert not any(bool(errors.any()) for errors in found.errors.values())


def test_the_sketch_masks_heads_and_takes_slopes_of_all_others() -> None:
    network, found, keys = subject(), scored(), set()
    terms = slope_terms(network, batches(), Projections(range(2), range(1)))
    weight = found.provenance["kl_weight"]
    few = [group for group in network.layout.groups if group.kind == "heads"]
    with torch.no_grad():
        exact = score_units(network, batches(), replace(EXACT, kl_weight=weight))
        all_masked = score_units(network, batches(), replace(ONE_ROUND, head_samples=5))
    for group in network.layout.groups:
        keys.add(group.kind)
        if group in few:
            torch.testing.assert_close(all_masked.scores[group.name], exact.scores[group.name], rtol=1e-9, atol=0)
            assert bool((found.errors[group.name] > 0).all())
            assert not bool(all_masked.errors[group.name].any())
        else:
            d, o = terms.sums[group][TRAJECTORY] / 2, terms.sums[group][OUTPUT]
            torch.testing.assert_close(found.scores[group.name], (d + weight * o) / 5, rtol=1e-9, atol=0)
    assert found.provenance["masked_samples"] == 3
    assert keys == {"heads", "qk-width", "v-width", "neurons"} == set(found.provenance["rank_stability"])


def test_normalised_divides_by_the_features_behind_and_output_leaves_them_out() -> None:
    network = subject()
    paper, normalised, output = (
        score_units(network, batches(), replace(EXACT, weighting=weighting, kl_weight=None if n else 0.0))
        for n, weighting in ((0, "paper"), (0, "normalised"), (1, "output"))
    )
    behind = {group.name: len(network.behind(group)) for group in network.layout.groups}
    assert set(behind.values()) == {0, 1, 2, 3, 4}  # two layers of two branches; a pooler behind them
    for name, features in behind.items():
        torch.testing.assert_close(paper.scores[name], max(1, features) * normalised.scores[name])
        assert bool(output.scores[name].any())
    assert output.provenance["kl_weight"] == 1.0


def test_rounds_go_on_until_the_rankings_of_all_kinds_are_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_job, "FIRST_PROBES", 1)
    monkeypatch.setattr(unit_job, "MOST_PROBES", 6)
    monkeypatch.setattr(unit_job, "HEAD_SAMPLES", 2)
    network = subject()
    found = score_units(network, batches(), ScoreSettings())
    assert found.provenance["probes"] == 6
    assert found.provenance["masked_samples"] == 5
    at_once = score_units(network, batches(), ScoreSettings(probes=6, head_samples=5))
    torch.testing.assert_close(flat(found), flat(at_once), rtol=1e-9, atol=0)


def test_only_the_kinds_that_are_asked_for_are_scored() -> None:
    found = score_units(subject(), batches(), ONE_ROUND, kinds=("neurons",))
    assert {subject().layout.by_name[name].kind for name in found.scores} == {"neurons"}
    assert found.provenance["masked_samples"] == 0
    for name, scores in found.scores.items():
        ratio = scores / scored(kl_weight=found.provenance["kl_weight"]).scores[name]
        torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_convolutions_are_scored_in_any_batches() -> None:
    network, batch = subject("resnet"), export("resnet", "torchscript").family.feeds(0, batch=4)
    halves = [{"pixel_values": batch["pixel_values"][rows]} for rows in ([3, 0], [2, 1])]
    found, split = (score_units(network, some, ScoreSettings(probes=2)) for some in ([batch], halves))
    torch.testing.assert_close(flat(found), flat(split), rtol=1e-9, atol=1e-15)
    assert float(flat(found).median()) > 0


def test_branches_before_the_residual_are_compared_where_the_paper_is_followed() -> None:
    found = score_units(subject(), batches(), replace(EXACT, features=Features("ffn"), kl_weight=0.0))
    blocks = score_units(subject(), batches(), replace(EXACT, kl_weight=0.0))
    assert found.provenance["values"] == blocks.provenance["values"] == 4
    assert not torch.allclose(flat(found), flat(blocks))


def test_a_network_without_tokens_is_scored_by_its_output_alone() -> None:
    network = Subject.make(find_in(chain()).layout)
    assert network.features == ()
    (group,), x = network.layout.groups, torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    found = score_units(network, [{"x": x}], EXACT)
    w, v = (torch.from_numpy(numpy_helper.to_array(each)) for each in chain().graph.initializer)
    hidden = (x @ w).relu()
    outputs = [(hidden * (torch.arange(WIDTH) != unit)) @ v for unit in (0, WIDTH - 1)]
    dense, *bent = (torch.nn.functional.normalize(y) for y in (hidden @ v, *outputs))
    expected = [float((dense - y).square().sum(1).mean()) for y in bent]
    assert found.scores[group.name][[0, -1]].tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


@pytest.mark.parametrize(("family", "faster"), [("bert", True), ("deberta-v2", False)])
def test_a_faster_type_is_taken_only_where_it_ranks_alike(
    family: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTa writes the least number of float32 where there is padding: in bfloat16 that is minus infinity."""
    monkeypatch.setattr(unit_parts, "pass_dtype", lambda like: torch.bfloat16)
    network = Subject.make(find_in(export(family, "torchscript").path).layout)
    found = score_units(network, batches(), ONE_ROUND)
    assert found.provenance["pass_dtype"] == ("bfloat16" if faster else "float32")
    monkeypatch.setattr(unit_parts, "pass_dtype", lambda like: like.dtype)
    plain = score_units(network, batches(), ONE_ROUND)
    close = rank_correlation(flat(found), flat(plain))
    assert close > 0.999 if faster else close == 1


def test_an_operator_that_does_not_mix_types_keeps_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, dtype: torch.dtype | None, **more: Any) -> Any:
        if dtype is not None:
            raise BadInput("expected scalar type Float but found BFloat16")
        return slope_terms(*args, dtype=dtype, **more)

    monkeypatch.setattr(unit_parts, "pass_dtype", lambda like: torch.bfloat16)
    monkeypatch.setattr(unit_parts, "slope_terms", refuse)
    network = Subject.make(find_in(export("bert", "torchscript").path).layout)
    assert score_units(network, batches(), ONE_ROUND).provenance["pass_dtype"] == "float32"


# --- parts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_parts, "UNITS_A_PART", 50)
    monkeypatch.setattr(unit_parts, "HEAD_CHUNK", 2)


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
@pytest.mark.usefixtures("small_parts")
def test_workers_share_parts_by_files_and_give_the_scores_of_one(scorer: str, tmp_path: Path) -> None:
    network, settings = subject(), replace(ONE_ROUND, scorer=scorer)
    store = FolderStore(tmp_path / "parts", network.layout.groups)
    with pytest.raises(PartsLeft):
        score_units(network, batches(), settings, store=store, worker=Worker(0, 2, helps=False))
    finished = sorted(tmp_path.rglob("*.safetensors"))
    assert len(finished) > 1
    shared = score_units(network, batches(), settings, store=store, worker=Worker(1, 2, helps=False))
    alone = score_units(network, batches(), settings)
    torch.testing.assert_close(flat(shared), flat(alone), rtol=1e-12, atol=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = score_units(network, batches(), settings, store=store)
    assert same(again, shared)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_less_memory_gives_the_same_scores() -> None:
    row = scored().provenance["memory"]["row_bytes"]
    tight = score_units(subject(), batches(), ONE_ROUND, memory_budget=2 * row)
    torch.testing.assert_close(flat(tight), flat(scored()), rtol=1e-9, atol=0)
    with pytest.raises(BadInput, match="scoring one sample takes"):
        score_units(subject(), batches(), ONE_ROUND, memory_budget=row // 2)


# --- what is stored -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path, found = tmp_path / "scores.safetensors", scored()
    found.write(path)
    again = UnitScores.read(path)
    assert same(again, found)
    assert again.network == found.network == subject().hash
    assert again.provenance == json.loads(json.dumps(found.provenance))
    again.check(subject().layout)


def test_scores_of_another_network_are_refused() -> None:
    with pytest.raises(PlanMismatch, match=f"made for the network {scored().network[:12]}"):
        scored().check(subject("resnet").layout)
    renamed = replace(scored(), scores={"x": torch.zeros(3).double()}, errors={"x": torch.zeros(3).double()})
    with pytest.raises(BadInput, match="3 units of the group 'x', which is not there"):
        renamed.check(subject().layout)
    first = subject().layout.groups[0]
    short = replace(scored(), scores={first.name: torch.ones(1).double()}, errors={first.name: torch.ones(1).double()})
    with pytest.raises(BadInput, match=f"has {first.units} units"):
        short.check(subject().layout)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores.a": torch.tensor([1.0, float("nan")]).double()}, "a: scores hold a negative or non-finite"),
        ({"scores.a": torch.tensor([1.0, -1.0]).double()}, "a: scores hold a negative"),
        ({"errors.a": torch.tensor([1.0, -1.0]).double()}, "a: errors hold a negative"),
        ({"scores.a": torch.ones(2)}, "none in float64"),
        ({"scores.a": torch.ones(3).double()}, "one number a unit"),
        ({"scores.a": torch.ones(1, 2).double(), "errors.a": torch.ones(1, 2).double()}, "one number a unit"),
        ({"scores.b": torch.ones(2).double()}, "not those of the groups"),
        ({"scores.a": None}, "not those of the groups"),
    ],
)
def test_damaged_tensors_are_refused(changed: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    path, ones = tmp_path / "scores.safetensors", {"a": torch.ones(2).double()}
    UnitScores(ones, ones, "0" * 64, {}).write(path)
    tensors = {name: value for name, value in {**load_file(path), **changed}.items() if value is not None}
    about = {"schema_version": 3, "network": "0" * 64, "groups": ["a"], "provenance": {}}
    save_file(tensors, path, {"about": json.dumps(about)})
    with pytest.raises(BadInput, match=message) as caught:
        UnitScores.read(path)
    assert "Score the network again" in str(caught.value)


@pytest.mark.parametrize(
    "about",
    [
        None,
        "{",
        "[]",
        "[" * 100_000,
        '{"schema_version": 3, "network": "x", "groups": ["a"], "provenance": {"x": NaN}}',
        '{"schema_version": 2, "network": "x", "groups": ["a"], "provenance": {}}',
        '{"schema_version": 3, "network": 5, "groups": ["a"], "provenance": {}}',
        '{"schema_version": 3, "network": "x", "groups": ["a", "a"], "provenance": {}}',
        '{"schema_version": 3, "network": "x", "groups": ["a"], "provenance": {}, "more": 1}',
    ],
)
def test_damaged_descriptions_are_refused(about: str | None, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    tensors = {"scores.a": torch.ones(2).double(), "errors.a": torch.ones(2).double()}
    save_file(tensors, path, None if about is None else {"about": about})
    with pytest.raises(BadInput, match="Score the network again"):
        UnitScores.read(path)


# --- what is refused ------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_refused_with_the_next_step() -> None:
    with pytest.raises(BadInput, match="no calibration batches"):
        score_units(subject(), [])
    with pytest.raises(BadInput, match="batch 0 has no 'attention_mask'"):
        score_units(subject(), [{"input_ids": batches()[0]["input_ids"]}])
    with pytest.raises(BadInput, match="one row a sample"):
        score_units(subject(), [{**batches()[0], "attention_mask": torch.ones(2, 5).long()}])
    with pytest.raises(BadInput, match="no units to score of the kinds channels; it has: heads, neurons"):
        score_units(subject(), batches(), kinds=("channels",))
    with pytest.raises(BadInput, match="'layers'"):
        score_units(subject(), batches(), kinds=("layers",))


def test_a_network_for_exactly_two_samples_is_refused() -> None:
    model = onnx.load(export("resnet", "torchscript").path)
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(BadInput, match=r"takes 2 samples at once.*Export it with a free batch"):
        score_units(Subject.make(find_in(model).layout), batches("resnet"))
