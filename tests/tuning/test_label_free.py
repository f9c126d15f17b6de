"""Tuning without labels: nearer to the dense outputs on rows that it did not learn from, kept, gone on from, told."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

import optin_deploy
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import takes
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.stages import rewrite_stage
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.graph import Network
from optin_deploy.network.learned import learned
from optin_deploy.network.run import Program
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.ready import Ready
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.tuning import label_free
from optin_deploy.tuning.label_free import LOOKS, PATIENCE, tune
from optin_deploy.tuning.settings import STATE, LabelFree, parse_tune
from support.tiny_checkpoint import (
    Shell,
    classifier,
    copy_of,
    finished_job,
    labelled,
    photos,
    temporary_files,
    text_options,
    vit,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = LabelFree(minutes=60, steps=60, learning_rate=5e-3, batch_size=8)


@pytest.fixture(scope="module")
def cut() -> tuple[Ready, Network]:
    """A dense network with its rows, and it cut without repairs, so that there is much to gain."""
    folder = finished_job()
    ready = prepare(Workspace(folder).source(), folder).ready
    return ready, make(ready, Workspace(folder).read_plan(), compensation=False).network


def weights(network: Network) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in network.weights.items()}


def divergence(ready: Ready, network: Network) -> float:
    """KL divergence from the dense logits on every eighth calibration row, each run alone."""
    found = []
    programs = [Program(each) for each in (ready.network, network)]
    for row in ready.rows.calibration.rows()[7::8]:
        feeds = {port.name: row[port.name] for port in network.inputs}
        with torch.no_grad():
            dense, cut = (program(feeds).outputs["logits"].double().softmax(-1) for program in programs)
        found.append(float((dense * (dense / cut).log()).sum()))
    return float(np.mean(found))


def test_rows_that_are_held_out_come_nearer_to_the_dense_outputs(cut: tuple[Ready, Network]) -> None:
    ready, smaller = cut
    network, record = tune(ready, smaller, SHORT)
    assert record.before == pytest.approx(divergence(ready, smaller), rel=1e-4)
    assert record.after == pytest.approx(divergence(ready, network), rel=1e-4)
    assert record.after < 0.9 * record.before
    rows = len(ready.rows.calibration)
    assert (record.rows, record.held_out) == (rows - rows // 8, rows // 8)
    before, after = weights(smaller), weights(network)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert changed <= learned(smaller)


def test_a_gain_that_may_be_chance_changes_nothing(
    cut: tuple[Ready, Network], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready, smaller = cut
    some, judged = LabelFree(60, 10, 5e-4, 8), list[np.ndarray]()
    look = label_free._Tuning._look

    def noted(self: label_free._Tuning) -> torch.Tensor:
        found = look(self)
        judged.append(found.numpy())
        return found

    monkeypatch.setattr(label_free._Tuning, "_look", noted)
    tune(ready, smaller, some)
    nearest = min(judged, key=lambda each: float(each.mean()))  # batches of one row or two
    gains = judged[0] - nearest
    errors = float(gains.mean() / gains.std() * len(gains) ** 0.5)
    for limit, kept in ((0.8 * errors, True), (1.25 * errors, False)):
        monkeypatch.setattr(label_free, "CERTAIN", limit)
        caplog.clear()
        network, record = tune(ready, smaller, some)
        assert (network is not smaller) == (record.after < record.before) == kept
        assert ("came no nearer for certain" in caplog.text) != kept


def test_labels_change_nothing(cut: tuple[Ready, Network]) -> None:
    ready, smaller = cut
    rows = ready.rows.calibration
    bare = replace(rows, labels=(None,) * len(rows))
    found = [
        tune(each, smaller, LabelFree(60, 4, 5e-3, 8))[0]
        for each in (ready, replace(ready, rows=replace(ready.rows, calibration=bare)))
    ]
    for name, value in weights(found[0]).items():
        np.testing.assert_array_equal(value, weights(found[1])[name])


def test_a_killed_tuning_ends_where_an_undisturbed_one_does(
    cut: tuple[Ready, Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready, smaller = cut
    whole, record = tune(ready, smaller, SHORT)
    taken: list[int] = []
    learn = label_free._Tuning._learn

    def killed(self: label_free._Tuning) -> None:
        taken.append(self.step)
        if len(taken) == 24:
            raise KeyboardInterrupt
        learn(self)

    monkeypatch.setattr(label_free._Tuning, "_learn", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(ready, smaller, SHORT, state=tmp_path / "state.pt")
    again, other = tune(ready, smaller, SHORT, state=tmp_path / "state.pt")
    assert "goes on after step 21 of an earlier run" in caplog.text
    assert taken[23:26] == [23, 21, 22], "it went on at the last look: there is one after three steps"
    assert (again.source, other.steps, other.after) == (whole.source, record.steps, record.after)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(value, weights(again)[name])


def test_minutes_end_it_and_the_rate_falls_with_them(
    cut: tuple[Ready, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, smaller = cut
    ticks: Iterator[int] = count()
    monkeypatch.setattr(label_free, "seconds_now", lambda: float(next(ticks)))  # each look and each step takes 1 s
    monkeypatch.setattr(label_free, "PATIENCE", LOOKS + 1)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"] / self.param_groups[0]["size"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    _, record = tune(ready, smaller, LabelFree(minutes=2, learning_rate=1e-3, batch_size=8))
    assert record.seconds == pytest.approx(120, abs=1)
    assert record.steps == len(rates) == 120 - (LOOKS - 1), "the last look is behind the end"
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[0] < 1e-4
    assert rates[-1] < 1e-5
    assert rates.index(max(rates)) < 0.2 * len(rates)


def test_more_rows_at_once_than_are_held_out_are_refused_before_the_cut(
    cut: tuple[Ready, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, _ = cut
    label_free.check(ready, SHORT)
    monkeypatch.setattr(label_free, "takes", lambda network: replace(takes(network), rows=16))
    with pytest.raises(BadInput, match="exactly 16"):
        label_free.check(ready, SHORT)


def test_rows_that_are_held_out_teach_no_repair(tmp_path: Path) -> None:
    folder = copy_of(finished_job(), tmp_path / "job")
    workspace = Workspace(folder)
    prepared = prepare(workspace.source(), folder)
    ready, plan = prepared.ready, workspace.read_plan()
    rows = ready.rows.calibration
    learned_from = rows.kept([number % 8 != 7 for number in range(len(rows))])
    alone = replace(ready, rows=replace(ready.rows, calibration=learned_from))
    by_all, by_some = (weights(make(each, plan).network) for each in (ready, alone))
    found = weights(rewrite_stage(workspace, prepared, tuning=SHORT).network)
    assert any(not np.allclose(by_all[name], value, atol=1e-4) for name, value in by_some.items())
    for name, value in by_some.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_what_comes_no_nearer_ends_early_and_changes_nothing(cut: tuple[Ready, Network]) -> None:
    ready, _ = cut
    dense = ready.network
    network, record = tune(ready, dense, LabelFree(minutes=60, steps=4 * LOOKS, learning_rate=0.9, batch_size=8))
    assert record.steps == 4 * PATIENCE
    assert record.after == record.before == pytest.approx(0, abs=1e-6)
    for name, value in weights(dense).items():
        np.testing.assert_array_equal(value, weights(network)[name])


@pytest.mark.parametrize("kind", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_a_tuned_folder_holds_one_model_and_tells_what_tuning_did(
    kind: str, shell: Shell, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "job"
    of_images = ("--calibration", photos(), "--align", 8, "--out", out)
    model, rows = {"text": (classifier(), text_options(labelled(), out)), "image": (vit(), of_images)}[kind]
    command = (
        "optin-export",
        model,
        *rows,
        "--flops",
        0.5,
        "--allocation",
        "uniform",
        "--no-dense",
        "--no-compensation",
    )
    ran = shell(*command)
    assert ran.code == 0, ran.err
    plain = {path.name: path.read_bytes() for path in (out / "model.onnx", out / "model" / "model.safetensors")}
    first = json.loads((out / "report.json").read_text())
    assert "tuned" not in first
    ran = shell(*command, "--tune", "minutes=60,steps=20,lr=5e-3,batch=8")
    assert ran.code == 0, ran.err
    told = json.loads((out / "report.json").read_text())
    tuned = told["tuned"]
    assert tuned["quality_before"] == first["quality"]
    assert (tuned["minutes"], tuned["learning_rate"]) == (60, 5e-3)
    assert tuned["after"] < tuned["before"]
    page = (out / "report.md").read_text()
    assert f"Tuned without labels for {tuned['seconds'] / 60:.1f} min: {tuned['steps']} steps on " in page
    assert "\n\nBefore the tuning: " in page
    assert tomllib.loads((out / "job.toml").read_text())["tune"] == "minutes=60,steps=20,lr=5e-3,batch=8"
    assert not (out / STATE).exists()
    assert temporary_files(out) == []
    for path in (out / "model.onnx", out / "model" / "model.safetensors"):
        assert path.read_bytes() != plain[path.name]
    _check_alike(out)
    before = (out / "model.onnx").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_free._Tuning, "_learn", lambda self: pytest.fail("it was tuned already"))
        again = shell(*command, "--tune", "minutes=60,steps=20,lr=5e-3,batch=8")
    assert again.code == 0, again.err
    assert (out / "model.onnx").read_bytes() == before
    assert json.loads((out / "report.json").read_text())["tuned"] == tuned
    assert shell(*command).code == 0
    assert "model.onnx was tuned, which this undoes" in caplog.text
    assert (out / "model" / "model.safetensors").read_bytes() == plain["model.safetensors"]
    _check_alike(out)


def _check_alike(out: Path) -> None:
    """model/ of the transformers class gives what ONNX Runtime gives of model.onnx."""
    loaded = optin_deploy.load(out)
    assert type(loaded).__module__.startswith("transformers.")
    generator = torch.Generator().manual_seed(0)
    feeds = {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    if loaded.main_input_name == "input_ids":
        ids = torch.randint(5, 60, (3, 9), generator=generator)
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with OrtRuntime(out / "model.onnx", threads=1) as engine, torch.no_grad():
        found = engine.run({name: value.numpy() for name, value in feeds.items()})["logits"]
        np.testing.assert_allclose(found, loaded(**feeds).logits.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "'5' is not known; possible are minutes, steps, lr, batch"),
        ("lr=1e-4", "minutes are missing"),
        ("minutes=5,minutes=6", "minutes is given twice"),
        ("minutes=soon", "'soon' is no number for minutes"),
        ("minutes=0", "possible are more than 0, up to 10000"),
        ("minutes=nan", "possible are more than 0"),
        ("minutes=5,steps=1.5", "'1.5' is no number for steps"),
        ("minutes=5,steps=0", "--tune steps=0"),
        ("minutes=5,lr=1", "give a rate above 0 and below 1"),
        ("minutes=5,batch=0", "--tune batch=0"),
    ],
)
def test_options_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match="--tune") as caught:
        parse_tune(text)
    assert says in str(caught.value)


def test_options_are_read_as_they_are_typed() -> None:
    assert parse_tune("minutes=0.5") == LabelFree(0.5)
    assert parse_tune("minutes=5, steps=10, lr=1e-3, batch=4") == LabelFree(5, 10, 1e-3, 4)
