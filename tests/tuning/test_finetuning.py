"""Fine-tuning a cut network: towards labels and the dense outputs, as a graph, in a folder of its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, Trainer

import optin_deploy
from optin_deploy.data.halves import split
from optin_deploy.data.samples import read_samples
from optin_deploy.data.targets import Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import READ, Label
from optin_deploy.files.storage import read_metadata, write_text
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.folder_build import FolderBuild
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.tuned_folder import finetune_folder
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.graph import Network
from optin_deploy.network.learned import learned
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.network.sealed import finished, store
from optin_deploy.network.weights import with_weights
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.source import Source
from optin_deploy.pruning.trial import error_of
from optin_deploy.quality.held_out import stacked
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.tuning.classifier import classes_of, names_of
from optin_deploy.tuning.finetune import check, finetune
from optin_deploy.tuning.settings import STATE, TrainingRows, Tuning
from support.tiny_checkpoint import (
    Shell,
    bert,
    classifier,
    copy_of,
    finished_job,
    labelled,
    lines,
    photos,
    snapshot,
    temporary_files,
    text_options,
    texts,
    vit,
)
from support.tiny_folders import sentence_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_learned_weights_are_those_of_layers_and_norms() -> None:
    network = prepare(Source(str(classifier()), calibration=str(lines()), seq_len=16)).ready.network
    found = learned(network)
    model = AutoModelForSequenceClassification.from_pretrained(classifier())
    tables = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)}
    names = dict(model.named_parameters())
    values = [value for name, value in names.items() if name.rpartition(".")[0] not in tables]
    assert sorted(math.prod(network.weights[name].shape.numpy()) for name in found) == sorted(map(torch.numel, values))


@pytest.mark.parametrize("distill", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_training_brings_a_cut_network_nearer(distill: float) -> None:
    folder = finished_job()
    source = Workspace(folder).source()
    prepared = prepare(source, folder)
    ready, smaller = prepared.ready, read_file(folder / "model.onnx")
    batches = ready.rows.calibration.batches
    tuned = finetune(ready, smaller, Tuning(epochs=6, learning_rate=2e-3, distill=distill, batch_size=8))
    before, after = (error_of(ready, network) for network in (smaller, tuned.network))
    if distill == 1:
        assert after < 0.7 * before
    wanted = torch.tensor([list(ready.names or ()).index(str(label)) for label in ready.rows.calibration.labels])

    def loss(network: object) -> float:
        program = Program(network)  # type: ignore[arg-type]
        names = [port.name for port in program.network.inputs]
        with torch.no_grad():
            logits = [program({name: batch[name] for name in names}).outputs["logits"] for batch in batches]
        return float(torch.nn.functional.cross_entropy(torch.cat(logits), wanted))

    if distill < 1:
        assert loss(tuned.network) < 0.9 * loss(smaller)
    assert set(tuned.network.weights) == set(smaller.weights)
    assert {n: w.shape for n, w in tuned.network.weights.items()} == {n: w.shape for n, w in smaller.weights.items()}
    frozen = set(smaller.weights) - learned(smaller)
    assert frozen
    for name in frozen:
        np.testing.assert_array_equal(tuned.network.weights[name].numpy(), smaller.weights[name].numpy())


@pytest.mark.slow
def test_a_seed_fixes_the_result_and_texts_without_labels_teach_too(shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(finished_job(), tmp_path / "job")
    before = (folder / "model.onnx").read_bytes()
    digests = []
    for name in ("a", "b"):
        options = ("--data", lines(), "--out", tmp_path / name, "--learning-rate", 1e-3, "--batch-size", 8)
        ran = shell("optin", "finetune", folder, *options)
        assert ran.code == 0, ran.err
        digests.append((tmp_path / name / "model.onnx").read_bytes()[-64:])
        told = json.loads((tmp_path / name / "tuned.json").read_text())
        assert told["after"]["metric"] == "same_prediction"
        assert not (tmp_path / name / STATE).exists()
        assert temporary_files(tmp_path / name) == []
    assert digests[0] == digests[1]
    assert (folder / "model.onnx").read_bytes() == before
    plan = NetworkPlan.read(tmp_path / "a" / "plan.json")
    assert plan == NetworkPlan.read(folder / "plan.json")
    built = FolderBuild(tmp_path / "a").build(engine="onnx")
    assert built is not None
    shipped = shell("optin", "ship", tmp_path / "a", "--out", tmp_path / "repository")
    assert shipped.code == 0, shipped.err
    loaded = optin_deploy.load(tmp_path / "a")
    feeds = {"input_ids": torch.ones(2, 9, dtype=torch.int64), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    feeds["token_type_ids"] = torch.zeros_like(feeds["input_ids"])
    with OrtRuntime(tmp_path / "a" / "model.onnx", threads=1) as engine, torch.no_grad():
        found = engine.run({name: value.numpy() for name, value in feeds.items()})["logits"]
        np.testing.assert_allclose(found, loaded(**feeds)["logits"].numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("optin_deploy.tuning.trainer.STEPS", 2)
    options = ("--data", labelled(), "--epochs", 2, "--batch-size", 8, "--learning-rate", 1e-3)
    whole = shell("optin", "finetune", finished_job(), *options, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    train = Trainer.training_step

    def killed(self: Trainer, *rest: object, **how: object) -> object:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return train(self, *rest, **how)  # type: ignore[arg-type]

    started: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        assert shell("optin", "finetune", finished_job(), *options, "--out", tmp_path / "again").code == 130
    assert not (tmp_path / "again" / "model.onnx").exists()
    before = sorted((tmp_path / "again" / STATE).glob("*/checkpoint-*"))
    torn = before[0].with_name("checkpoint-9")  # as if killed while it was written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")

    def counted(self: Trainer, *rest: object, **how: object) -> object:
        started.append(self.state.global_step)
        return train(self, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "training_step", counted)
    again = shell("optin", "finetune", finished_job(), *options, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert started[0] == 2
    assert "goes on after step 2 of an earlier run" in caplog.text
    (state,) = [path for path in before if path.name == "checkpoint-2"]
    assert not state.exists()
    one, other = (read_file(tmp_path / name / "model.onnx").weights for name in ("whole", "again"))
    for name, weight in one.items():
        np.testing.assert_allclose(weight.numpy(), other[name].numpy(), atol=1e-6)


def test_other_rows_labels_or_networks_begin_anew(tmp_path: Path) -> None:
    folder = finished_job()
    prepared = prepare(Workspace(folder).source(), folder)
    smaller, seen = read_file(folder / "model.onnx"), []

    class Stopped(Exception):
        pass

    def key_of(ready: Ready, network: Network, **how: float) -> None:
        with pytest.MonkeyPatch.context() as patch:

            def stop(self: Trainer, **rest: object) -> None:
                seen.append(Path(self.args.output_dir).name)
                raise Stopped

            patch.setattr(Trainer, "train", stop)
            with pytest.raises(Stopped):
                finetune(ready, network, Tuning(**how), scratch=tmp_path)  # type: ignore[arg-type]

    ready = prepared.ready
    rows = ready.rows.calibration
    others = replace(ready, rows=replace(ready.rows, calibration=replace(rows, labels=rows.labels[::-1])))
    name = min(learned(smaller))
    other = with_weights(smaller, {name: torch.zeros(*smaller.weights[name].shape.numpy())})
    for one in (ready, ready, others):
        key_of(one, smaller)
    key_of(ready, other)
    key_of(ready, smaller, learning_rate=1e-3)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4


@pytest.mark.slow
def test_a_finished_folder_is_not_lost_and_mixed_ones_are_refused(shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(finished_job(), tmp_path / "job")
    options = ("--data", labelled(), "--learning-rate", 1e-3)
    assert shell("optin", "finetune", folder, *options).code == 0  # --out is beside it
    tuned = tmp_path / "job-tuned"
    before = (tuned / "model.onnx").read_bytes()
    exported = ("optin-export", classifier(), *text_options(labelled(), tuned))
    scored = ("optin", "score", classifier(), "--calibration", labelled(), "--seq-len", 16, "--out", tuned)
    for command in (("optin", "rewrite", tuned), exported, (*exported, "--dry-run"), scored, (*scored, "--dry-run")):
        ran = shell(*command)
        assert (ran.code, "holds a fine-tuned model" in ran.err) == (2, True), ran.err
    assert (tuned / "model.onnx").read_bytes() == before
    again = shell("optin", "finetune", folder, *options, "--out", tuned)
    assert again.code == 0, again.err
    other = copy_of(finished_job(), tmp_path / "other")
    ran = shell("optin", "finetune", folder, *options, "--out", other)
    assert (ran.code, "holds another model" in ran.err) == (2, True), ran.err
    planned = shell("optin", "plan", folder, "--flops", 0.9, "--allocation", "uniform")
    assert planned.code == 0, planned.err
    ran = shell("optin", "finetune", folder, *options, "--out", tmp_path / "x")
    assert "was cut by another plan" in ran.err
    assert not (tmp_path / "x").exists()


def test_what_was_fine_tuned_goes_with_force_alone(tmp_path: Path) -> None:
    out, source = tmp_path / "out", Source("bert", calibration="rows.txt")
    workspace = Workspace.claim(out, source)
    for name in ("tuned.json", "model.onnx", "plan.json", "config.json"):
        write_text(out / name, "{}")
    for text in ("{}", "{} "):  # as written, and edited
        (out / "tuned.json").write_text(text)
        with pytest.raises(BadInput, match=r"holds a fine-tuned model.*Use another folder, or --force to replace it;"):
            Workspace.claim(out, source)
        with pytest.raises(BadInput, match="Use another folder; to train it again"):
            workspace.check_untuned()
        with Workspace.at_work(out, source, tunes=True):
            assert (out / "model.onnx").is_file()
    Workspace.claim(out, source, force=True)
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["source.json", "tuned.json.kept1"]


def test_a_finished_model_stays_until_the_next_training_has_ended(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tmp_path / "tuned"
    options = ("--out", tuned, "--batch-size", 16)
    ran = shell("optin", "finetune", finished_job(), "--data", labelled(), *options)
    assert ran.code == 0, ran.err
    before = snapshot(tuned)
    rows = [json.loads(line) for line in labelled().read_text().splitlines()]

    def written(name: str, changed: list[dict[str, object]]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in changed))
        return path

    unknown = written("unknown", [row | {"label": "politics"} for row in rows])
    partly = written("partly", [row | {"label": row["label"] if i % 3 else None} for i, row in enumerate(rows)])
    judging = written("judging", [row | {"text": f"new {row['text']}"} for row in rows])
    for data, says in ((unknown, "label 'politics' is not one of the model's"), (partly, "Label all rows, or none")):
        for dry in (("--dry-run",), ()):
            ran = shell("optin", "finetune", finished_job(), "--data", data, "--eval", judging, *options, *dry)
            assert (ran.code, says in ran.err) == (2, True), ran.err

    def broken(self: Trainer, *rest: object, **how: object) -> None:
        raise KeyboardInterrupt

    again = ("--data", labelled(), *options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", broken)
        assert shell("optin", "finetune", finished_job(), *again, "--epochs", 2).code == 130
        ran = shell("optin", "finetune", finished_job(), *again)  # the very same training, which is not done again
    assert ran.code == 0, ran.err
    assert f"Found finished {tuned / 'model.onnx'}" in ran.out
    other = copy_of(finished_job(), tmp_path / "other")
    for command in (("plan", other, "--flops", 0.9, "--allocation", "uniform"), ("rewrite", other)):
        ran = shell("optin", *command)
        assert ran.code == 0, ran.err
    ran = shell("optin", "finetune", other, *again)
    assert (ran.code, "holds a fine-tuned model of another plan" in ran.err) == (2, True), ran.err
    assert snapshot(tuned) == before
    ran = shell("optin", "finetune", other, *again, "--force")
    assert ran.code == 0, ran.err
    assert NetworkPlan.read(tuned / "plan.json") == NetworkPlan.read(other / "plan.json")


def test_model_onnx_of_a_training_is_written_last(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "tuned", list[Path]()
    command = ("optin", "finetune", finished_job(), "--data", labelled(), "--out", out)

    def killed(network: Network, path: Path, *rest: object, **how: object) -> None:
        seen.append(path)
        if path.name == "model.onnx":
            raise KeyboardInterrupt
        store(network, path, *rest, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        for name in ("optin_deploy.jobs.tuned_folder.store", "optin_deploy.jobs.stages.store"):
            patch.setattr(name, killed)
        assert shell(*command).code == 130
    assert [path.name for path in seen] == ["dense.onnx", "model.onnx"]
    assert not (out / "model.onnx").exists()
    beside = {path.name for path in out.iterdir()}
    assert beside >= {"config.json", "tokenizer.json", "plan.json", "samples.safetensors", "tuned.json"}
    ran = shell(*command)
    assert (ran.code, "Wrote" in ran.out) == (0, True), ran.err
    known = finished(out / "model.onnx")
    assert known is not None
    assert read_metadata(out / "samples.safetensors", "")["model"] == known.key


def test_classes_alone_teach_no_network_that_puts_out_none_of_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "tags"
    config = AutoConfig.from_pretrained(classifier())
    AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(classifier() / name, folder)
    ready = prepare(Source(str(folder), calibration=str(lines()), seq_len=16)).ready
    ready = labelled_as(ready, [("arts", "sport"), ("sport",)])
    check(ready, ready.network, Tuning())
    with pytest.raises(BadInput, match="puts out no class of a row, and --distill 0"):
        check(ready, ready.network, Tuning(distill=0))


def test_classes_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    taught: list[object] = []

    def noted(*rest: Any) -> torch.Tensor:
        found.append(classes_of(*rest))
        return found[-1]

    monkeypatch.setattr("optin_deploy.tuning.finetune.classes_of", noted)
    monkeypatch.setattr(
        "optin_deploy.tuning.finetune.train", lambda student, ready, numbers, *rest: taught.append(numbers)
    )
    finetune_folder(finished_job(), tmp_path / "out", TrainingRows(labelled()), Tuning())
    assert len(found) == 1
    assert taught == found


def test_no_row_judges_that_calibrated_the_cut(shell: Shell, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(finished_job(), tmp_path / "job")
    source = Workspace(folder).source()
    calibrated = set(prepare(source, folder).ready.rows.calibration.keys)
    other = replace(source, seed=1)
    plain, judging = (prepare(other, folder, **how).ready.rows.held_out for how in ({}, {"cut_by": source}))
    assert plain is not None
    assert judging is not None
    assert set(plain.keys) & calibrated
    assert set(judging.keys) == set(plain.keys) - calibrated
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"text": f"again {text}", "label": "arts"}) + "\n" for text in texts()))
    caplog.clear()
    options = ("--data", new, "--eval", labelled(), "--out", tmp_path / "x", "--dry-run")
    ran = shell("optin", "finetune", folder, *options)
    assert ran.code == 0, ran.err
    assert f"{len(calibrated)} rows that should judge equal a calibration row and do not count" in caplog.text
    old = tmp_path / "old.txt"
    some, _ = split(read_samples(labelled()), samples_limit=source.samples, seed=source.seed)
    old.write_text("".join(f"{sample.text}\n" for sample in some))
    ran = shell("optin", "finetune", folder, "--data", new, "--eval", old, *options[4:])
    assert (ran.code, "rows that should judge calibrated the cut. Give --eval" in ran.err) == (2, True), ran.err
    replace(source, calibration=str(tmp_path / "gone.jsonl")).write(folder / "source.json")
    assert shell("optin", "finetune", folder, *options).code == 0
    assert "rows that calibrated the cut may be among those that judge" in caplog.text


def test_padding_is_told_by_a_mask_of_any_name(tmp_path: Path) -> None:
    network = prepare(Source(str(bert()), calibration=str(lines()), seq_len=16)).ready.network
    model = network.model.clone()
    (mask,) = [value for value in model.graph.inputs if value.name == "attention_mask"]
    mask.name = "input_mask"
    store(Network(model, "renamed"), tmp_path / "x.onnx", "key")
    source = Source(str(tmp_path / "x.onnx"), tokenizer=str(bert()), calibration=str(labelled()), seq_len=16)
    ready = prepare(source).ready
    tuned = finetune(ready, ready.network, Tuning(epochs=0))
    texts = {name: torch.ones(2, 6, dtype=torch.int64) for name in ("input_ids", "input_mask", "token_type_ids")}
    texts["input_mask"][0, 3:] = 0
    short = {name: value[:1, :3] for name, value in texts.items()}
    program = Program(tuned.network)
    whole, alone = (program(feeds).outputs["logits"] for feeds in (texts, short))
    torch.testing.assert_close(whole[:1], alone, rtol=0, atol=1e-5)


class States(torch.nn.Module):
    """A mean over the tokens of states that come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(12, 32), torch.nn.Linear(32, 12)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = inputs_embeds + self.narrow(torch.relu(self.wide(inputs_embeds)))  # (B, T, 12)
        real = attention_mask.unsqueeze(-1).to(states)
        return (states * real).sum(1) / real.sum(1)


def states_of_two_lengths(folder: Path) -> Ready:
    """A network of states beside a mask of padding, with rows of 5 and of 7 tokens."""
    free = {0: "batch", 1: "tokens"}
    example = (torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.int64))
    axes = {"inputs_embeds": free, "attention_mask": free, "embedding": {0: "batch"}}
    names = {"input_names": ["inputs_embeds", "attention_mask"], "output_names": ["embedding"], "dynamic_axes": axes}
    torch.onnx.export(States().eval(), example, folder / "x.onnx", dynamo=False, **names)  # type: ignore[arg-type]
    (folder / "rows").mkdir()
    for tokens in (5, 7):
        states = np.random.default_rng(tokens).standard_normal((20, tokens, 12)).astype(np.float32)
        np.savez(
            folder / "rows" / f"{tokens}.npz", inputs_embeds=states, attention_mask=np.ones((20, tokens), np.int64)
        )
    return prepare(Source(str(folder / "x.onnx"), calibration=str(folder / "rows"))).ready


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's older exporter
def test_states_of_unequal_lengths_share_a_step_where_a_mask_tells_their_padding(tmp_path: Path) -> None:
    ready = states_of_two_lengths(tmp_path)
    tuned = finetune(ready, ready.network, Tuning(batch_size=40, learning_rate=1e-3))
    assert tuned.after.pruned > 0.9
    rows = ready.rows.calibration
    for batch in rows.batches:
        alone, padded = batch["inputs_embeds"][:1], stacked([batch["inputs_embeds"][:1], torch.zeros(1, 9, 12)])[:1]
        mask = stacked([batch["attention_mask"][:1], torch.zeros(1, 9, dtype=torch.int64)])[:1]
        program = Program(tuned.network)
        wanted = program({"inputs_embeds": alone, "attention_mask": batch["attention_mask"][:1]}).outputs["embedding"]
        found = program({"inputs_embeds": padded, "attention_mask": mask}).outputs["embedding"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    batches = tuple({**batch, "more": batch["inputs_embeds"][:, :3, : 5 + i]} for i, batch in enumerate(rows.batches))
    other = replace(ready, rows=replace(ready.rows, calibration=replace(rows, batches=batches)))
    with pytest.raises(BadInput, match=r"takes more of unequal sizes beside the tokens.*: 3 x 5, 3 x 6\. Give rows of"):
        check(other, ready.network, Tuning())


def test_networks_in_16_bits_and_rows_without_labels_are_refused(tmp_path: Path) -> None:
    folder = finished_job()
    prepared = prepare(Workspace(folder).source(), folder)
    smaller = read_file(folder / "model.onnx")
    half = with_weights(smaller, {name: torch.zeros(2, dtype=torch.float16) for name in list(learned(smaller))[:1]})
    with pytest.raises(BadInput, match="has weights of FLOAT16, in which small steps are lost"):
        finetune(prepared.ready, half, Tuning())
    rows = prepared.ready.rows.calibration
    bare = replace(rows, labels=(None,) * len(rows))
    ready = replace(prepared.ready, rows=replace(prepared.ready.rows, calibration=bare))
    with pytest.raises(BadInput, match="--distill 0 learns from labels alone"):
        finetune(ready, smaller, Tuning(distill=0))
    with pytest.raises(BadInput, match="--epochs 0 fits a classifier alone"):
        finetune(ready, smaller, Tuning(epochs=0))


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
@pytest.mark.parametrize("kind", ["text", "image"])
def test_an_embedder_gets_a_classifier_of_the_classes_of_its_rows(kind: str, shell: Shell, tmp_path: Path) -> None:
    model, data = {"text": (bert(), labelled()), "image": (vit(), photos())}[kind]
    source = Source(
        str(model), task="feature-extraction", calibration=str(data), seq_len=16 if kind == "text" else None
    )
    export_model(Job(source, Limits(flops=0.7), allocation="uniform", points=(), dense=False), tmp_path / "job")
    found = {}
    for epochs in (0, 8):
        out = tmp_path / f"out{epochs}"
        options = ("--data", data, "--epochs", epochs, "--learning-rate", 2e-3, "--batch-size", 8, "--out", out)
        ran = shell("optin", "finetune", tmp_path / "job", *options)
        assert ran.code == 0, ran.err
        told = json.loads((out / "tuned.json").read_text())
        names = sorted({str(row.label) for row in read_samples(data)})
        assert told["classes"] == names
        assert f"classes: {', '.join(names)}" in ran.out
        assert told["after"]["metric"] == "accuracy"
        network = read_file(out / "model.onnx")
        assert [port.name for port in network.outputs] == ["logits"]
        prepared = prepare(Workspace(out).source(), tmp_path / "job")
        rows = prepared.ready.rows.calibration
        inputs = [port.name for port in network.inputs]
        with OrtRuntime(out / "model.onnx", threads=1) as engine:
            logits = np.concatenate(
                [engine.run({name: batch[name].numpy() for name in inputs})["logits"] for batch in rows.batches]
            )
        wanted = torch.tensor([names.index(str(label)) for label in rows.labels])
        found[epochs] = float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), wanted))
    assert found[8] < found[0] < np.log(len(names))


def labelled_as(ready: Ready, labels: Sequence[Label]) -> Ready:
    """The same rows, with labels in turn."""
    rows = ready.rows.calibration
    given = tuple(labels[place % len(labels)] for place in range(len(rows)))
    return replace(ready, rows=replace(ready.rows, calibration=replace(rows, labels=given)))


def test_rows_that_teach_an_embedder_no_classes_are_told() -> None:
    source = Source(str(bert()), task="feature-extraction", calibration=str(lines()), seq_len=16)
    ready = prepare(source).ready
    without = "Give rows with one class each, or texts or images without labels, to learn from the dense outputs alone"
    for labels, says in (
        ([Role(0, (1,))], "a row's label is what searches should find: such rows teach no classes"),
        ([("a", "b"), ("a",)], r"a row's label is \('a', 'b'\): such rows teach no classes"),
        (["a"], "labels name 1 classes: a classifier needs two or more"),
    ):
        with pytest.raises(BadInput, match=rf"{says}\. {without}"):
            check(labelled_as(ready, labels), ready.network, Tuning())  # type: ignore[arg-type]
    check(labelled_as(ready, ["a", "b"]), ready.network, Tuning())


@pytest.mark.usefixtures("by_torchscript")
def test_a_folder_of_sentence_transformers_stays_one_until_it_gets_a_classifier(shell: Shell, tmp_path: Path) -> None:
    source = Source(str(sentence_model(tmp_path / "model", "mean")), calibration=str(lines()), seq_len=16)
    job, tuned = tmp_path / "job", tmp_path / "job-tuned"
    export_model(Job(source, Limits(flops=0.7), allocation="uniform", points=(), dense=False), job)
    for data, embeds in ((lines(), True), (labelled(), False), (lines(), True)):
        ran = shell("optin", "finetune", job, "--data", data)
        assert ran.code == 0, ran.err
        for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            assert (tuned / name).is_file() == embeds
            assert not embeds or (tuned / name).read_bytes() == (job / name).read_bytes()
    assert (tuned / "tokenizer.json").is_file()


def test_labels_of_any_type_name_each_class_once() -> None:
    assert names_of([0.0, 1.0, 10.0, 2.0, None]) == ("0", "1", "2", "10")
    assert names_of(["1", "2", 1, 2.0, "a"]) == ("1", "2", "a")
    with pytest.raises(BadInput, match=r"a row's label is 0\.5: such rows teach no classes"):
        names_of([0.0, 0.5])
    with pytest.raises(BadInput, match="labels name 1 classes"):
        names_of(["1", 1, 1.0])


def test_an_embedding_behind_a_prompt_gets_no_classifier(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", {"pooling_mode": "mean", "include_prompt": False})
    for prompt, refused in (("the old song: ", True), ("", False)):
        prompts = {"prompts": {"usual": prompt, "query": "a song"}, "default_prompt_name": "usual"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        ready = prepare(Source(str(folder), calibration=str(labelled()), seq_len=32)).ready
        assert all(READ in batch for batch in ready.rows.calibration.batches)
        if refused:
            with pytest.raises(BadInput, match=r"include_prompt is false\).* Give texts without labels"):
                check(ready, ready.network, Tuning())
            check(labelled_as(ready, [None]), ready.network, Tuning())
        else:
            finetune(ready, ready.network, Tuning(epochs=0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--epochs", -1), "possible are 0 to 1000"),
        (("--learning-rate", 0), "give a rate above 0"),
        (("--batch-size", 0), "give 1 or more rows"),
        (("--distill", 1.5), "possible are 0"),
        (("--out", "{job}"), "is the folder of the model itself"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[object, ...], says: str, shell: Shell, tmp_path: Path) -> None:
    given = [str(option).format(job=finished_job()) for option in options]
    out = () if "--out" in given else ("--out", tmp_path / "x")
    ran = shell("optin", "finetune", finished_job(), "--data", labelled(), *given, *out)
    assert (ran.code, says in ran.err) == (2, True), ran.err
    assert not (tmp_path / "x").exists()


def test_a_rate_that_breaks_the_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_job()
    prepared = prepare(Workspace(folder).source(), folder)

    def broken(self: Trainer, *rest: object, **how: object) -> None:
        with torch.no_grad():
            next(self.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Trainer, "train", broken)
    with pytest.raises(BadInput, match="Give a lower one"):
        finetune(prepared.ready, read_file(folder / "model.onnx"), Tuning())
