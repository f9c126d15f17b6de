"""Bad input gives exit code 2, a message with the value and the next step, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import optin_deploy
from support.exported_once import BY_TORCHSCRIPT
from support.tiny_checkpoint import (
    POSITIONS,
    Ran,
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
    vit,
)

CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
import optin_deploy
from optin_deploy.cli import export_main
export_main()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a refused job must write nothing."""
    return tmp_path / "out"


def refuse(ran: Ran, *says: object, code: int = 2) -> None:
    """The run ended with a clear error that says all of these."""
    assert ran.code == code, ran.err
    assert "error: " in ran.err
    assert "Traceback" not in ran.err
    assert [part for part in map(str, says) if part not in ran.err] == [], ran.err


def refuse_job(shell: Shell, model: Path | str, out: Path, *flags: object, says: tuple[object, ...]) -> None:
    """`optin-export` with cheap defaults (later flags win) is refused, and so is its dry run; `out` stays absent."""
    options = [*text_options(lines(), out), "--engine", "torch"]
    if model == vit():  # images have no length in tokens
        place = options.index("--seq-len")
        del options[place : place + 2]
    for more in (["--dry-run"], []):
        refuse(shell("optin-export", model, *options, *flags, *more), *says)
        assert not out.exists()
        assert temporary_files(out) == []


def copied(model: Path, folder: Path, *, without: str = "no such file") -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns(without)))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# the model


@pytest.mark.usefixtures("by_torchscript")
def test_an_architecture_that_nothing_here_knows_of_goes_by_its_graph(shell: Shell, tmp_path: Path, out: Path) -> None:
    model = copied(bert(), tmp_path / "megatron", without="model.safetensors")
    config = transformers.AutoConfig.from_pretrained(bert()).to_dict()
    config = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    transformers.MegatronBertModel(transformers.MegatronBertConfig(**config)).save_pretrained(model)
    ran = shell("optin-export", model, *text_options(lines(), out), "--no-dense")
    assert ran.code == 0, ran.err
    assert type(optin_deploy.load(out)) is transformers.MegatronBertModel


def test_an_absent_model_folder(shell: Shell, tmp_path: Path, out: Path) -> None:
    refuse_job(shell, tmp_path / "nowhere", out, says=(tmp_path / "nowhere", "does not exist", "hub id"))


def test_a_hub_id_that_cannot_be_had(shell: Shell, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse_job(shell, "nobody/nothing", out, says=("nobody/nothing", "neither a folder nor in the Hub's cache"))


@pytest.mark.parametrize(
    ("model", "missing", "says"),
    [
        (bert, "config.json", "config.json"),
        (bert, "model.safetensors", "safetensors"),
        (bert, "tokenizer*", "tokenizer.json"),
        (vit, "preprocessor_config.json", "preprocessor_config.json"),
    ],
)
def test_a_model_folder_without_a_needed_file(
    shell: Shell, tmp_path: Path, out: Path, model: Callable[[], Path], missing: str, says: str
) -> None:
    folder = copied(model(), tmp_path / "model", without=missing)
    data = photos() if model is vit else lines()
    refuse_job(shell, folder, out, "--calibration", data, says=(says,))


def test_weights_in_a_pickle_only(shell: Shell, tmp_path: Path, out: Path) -> None:
    folder = copied(bert(), tmp_path / "model", without="model.safetensors")
    torch.save(load_file(bert() / "model.safetensors"), folder / "pytorch_model.bin")
    refuse_job(shell, folder, out, says=("pytorch_model.bin", "pickle", "save_pretrained"))


@pytest.mark.parametrize("keep", [0, 7, 500, -40])
def test_truncated_weights(shell: Shell, tmp_path: Path, out: Path, keep: int) -> None:
    folder = copied(bert(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refuse_job(shell, folder, out, says=(folder,))


def test_weights_of_another_model(shell: Shell, tmp_path: Path, out: Path) -> None:
    folder = copied(bert(), tmp_path / "model")
    shutil.copyfile(vit() / "model.safetensors", folder / "model.safetensors")
    refuse_job(shell, folder, out, says=(folder, "no weights for"))


def test_weights_of_another_size(shell: Shell, tmp_path: Path, out: Path) -> None:
    folder = copied(bert(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refuse_job(shell, folder, out, says=(folder,))


def test_a_head_without_weights(shell: Shell, out: Path) -> None:
    task = "text-classification"
    refuse_job(shell, bert(), out, "--task", task, says=(task, "classifier", "feature-extraction", "fine-tuned"))


def test_an_already_pruned_model(shell: Shell, out: Path) -> None:
    refuse_job(shell, finished_job() / "model", out, says=(finished_job() / "model",))


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1"),
        ("bert.encoder.layer.0.attention.self.value.bias", "bert.encoder.layer.0"),
        ("classifier.weight", "classifier"),
    ],
)
def test_nan_in_the_weights_names_the_layer(
    shell: Shell, tmp_path: Path, out: Path, scorer: str, weight: str, layer: str
) -> None:
    folder = copied(classifier(), tmp_path / "model")
    change_weights(folder, lambda weights: weights[weight].view(-1)[:1].fill_(torch.nan))
    flags = [*text_options(lines(), out), "--scorer", scorer, "--engine", "torch"]
    refuse(shell("optin-export", folder, *flags), layer, "NaN")
    assert set(snapshot(out) if out.exists() else ()) <= {"source.json", "job.toml", "dense.onnx"}
    assert temporary_files(out) == []


# the calibration data


def test_a_missing_calibration_file(shell: Shell, out: Path, tmp_path: Path) -> None:
    refuse_job(shell, bert(), out, "--calibration", tmp_path / "none.txt", says=(tmp_path / "none.txt", "no such file"))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv", "empty_folder"])
def test_an_empty_calibration_file(shell: Shell, out: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if path.suffix == "" else path.write_text("")
    model = vit() if path.is_dir() else bert()
    refuse_job(shell, model, out, "--calibration", path, says=(path, "at least 8"))


def test_too_few_calibration_samples(shell: Shell, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("one\ntwo\n")
    refuse_job(shell, bert(), out, "--calibration", path, says=("2 calibration samples", path, "8"))


def test_a_line_that_is_not_json(shell: Shell, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": broken}\n')
    refuse_job(shell, bert(), out, "--calibration", path, says=(f"{path}:3", '{"text": broken}', "JSON"))


def test_a_column_that_is_not_there(shell: Shell, out: Path) -> None:
    flags = ["--calibration", labelled(), "--text-column", "body"]
    refuse_job(shell, bert(), out, *flags, says=(f"{labelled()}:1", "'body'", "text, label", "--text-column"))


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n cut off"])
def test_an_image_that_does_not_open(shell: Shell, out: Path, tmp_path: Path, content: bytes) -> None:
    folder = copied(photos(), tmp_path / "photos")
    (folder / "sport" / "broken.png").write_bytes(content)
    refuse_job(shell, vit(), out, "--calibration", folder, says=(folder / "sport" / "broken.png", "does not open"))


def test_data_of_the_wrong_kind(shell: Shell, out: Path) -> None:
    refuse_job(shell, vit(), out, "--calibration", lines(), says=("a text does not fill", "pixel_values"))
    refuse_job(shell, bert(), out, "--calibration", photos(), says=("images fill", "input_ids"))


@pytest.mark.parametrize("label", ["politics", 7, -1])
def test_a_label_that_the_model_does_not_know(shell: Shell, out: Path, tmp_path: Path, label: str | int) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in labelled().read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"label": label}) + "\n" for row in rows))
    flags = ["--calibration", lines(), "--max-drop", 1, "--eval", path]
    refuse_job(shell, classifier(), out, *flags, says=(f"{path}:", repr(label), "arts, business, sport"))


# the flags


@pytest.mark.parametrize("flops", ["0", "1.5", "nan", "-1", "inf"])
def test_a_budget_outside_of_its_range(shell: Shell, out: Path, flops: str) -> None:
    refuse_job(shell, bert(), out, f"--flops={flops}", says=(f"{float(flops)}", "(0, 1]", "0.6"))


def test_a_budget_below_the_fewest_units_names_the_least(shell: Shell, out: Path, tmp_path: Path) -> None:
    # what stays: pooler and classifier, 48 * 48 + 48 * 3, and one group of 8 neurons a layer, for --align 8 on any CPU
    fixed, prunable = 48 * 48 + 48 * 3, 2 * (16 * (4 * 48 * 48 + 2 * 48 * 96) + 2 * 16 * 16 * 48)
    assert 0.001 < fixed / (fixed + prunable) < 0.01
    refuse_job(shell, classifier(), out, "--flops", 0.001, says=("0.001", "fewest units", "--flops 0.", "or more"))
    ran = shell("optin", "plan", copy_of(finished_job(), tmp_path / "dir"), "--flops", 0.001, "--align", 1)
    refuse(ran, "or more")
    least = ran.err.partition("Use --flops ")[2].split()[0]
    ran = shell("optin", "plan", tmp_path / "dir", "--flops", least, "--align", 1)
    assert ran.code == 0, ran.err  # the named least is possible
    refuse(shell("optin", "plan", tmp_path / "dir", "--flops", float(least) * 0.98, "--align", 1), "or more")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--engine", "bogus", "onnx, openvino, ort-cuda, ort-trt, torch, torch-compile, aoti, trt, trt-rtx"),
        ("--precision", "int3", "fp32"),
        ("--allocation", "bogus", "curves, uniform, paper"),
        ("--scorer", "bogus", "sketch, exact"),
        ("--task", "bogus", "feature-extraction, sentence-similarity, text-classification"),
        ("--pool", "max", "mean"),
        ("--align", "0", "16"),
        ("--samples", "0", "512"),
        ("--threads", "-1", "0"),
        ("--seq-len", "0", f"1 to {POSITIONS}"),
        ("--seq-len", "2", "3"),
        ("--seq-len", str(POSITIONS + 1), f"1 to {POSITIONS}"),
        ("--at", "batch=8,seq=999", f"1 to {POSITIONS}"),
        ("--at", "bogus", "batch=8,seq=128"),
        ("--at", "batch=0", "batch=8,seq=128"),
        ("--at", "batch=2.5", "batch=8,seq=128"),
        ("--at", "size=3", "batch=8,seq=128"),
    ],
)
def test_an_impossible_value_names_the_possible_ones(shell: Shell, out: Path, flag: str, value: str, says: str) -> None:
    shown = value.rpartition("=")[2] if flag == "--at" else value
    refuse_job(shell, bert(), out, "--engine", "onnx", f"{flag}={value}", says=(shown, says))


def test_pooling_of_a_classifier(shell: Shell, out: Path) -> None:
    flags = ["--engine", "onnx", "--pool", "mean"]
    refuse_job(shell, classifier(), out, *flags, says=("mean", "feature-extraction", "logits"))


@pytest.mark.parametrize("command", ["build", "bench"])
def test_an_unknown_engine_of_a_stage(shell: Shell, finished: Path, command: str) -> None:
    before = snapshot(finished)
    refuse(
        shell("optin", command, finished, "--engine", "bogus"),
        "bogus",
        "onnx, openvino, ort-cuda, ort-trt, torch, torch-compile, aoti, trt, trt-rtx",
    )
    assert snapshot(finished) == before


# the output folder


@pytest.mark.parametrize("program", [("optin-export",), ("optin", "score")])
def test_a_foreign_folder_needs_force(shell: Shell, out: Path, program: tuple[str, ...]) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    before = snapshot(out)
    options: list[object] = ["--calibration", lines(), "--seq-len", 16, "--out", out]
    if program == ("optin-export",):
        options += ["--engine", "torch", "--no-dense"]
    for more in (["--dry-run"], []):
        refuse(shell(*program, bert(), *options, *more), out, "--force")
        assert snapshot(out) == before
    ran = shell(*program, bert(), *options, "--force")
    assert ran.code == 0, ran.err
    assert (out / "thesis.txt").read_text() == "precious"
    assert (out / "scores.safetensors").is_file()


def test_an_output_folder_that_is_a_file(shell: Shell, out: Path) -> None:
    out.write_text("precious")
    refuse(shell("optin-export", bert(), *text_options(lines(), out), "--force"), out, "is a file")
    assert out.read_text() == "precious"


@pytest.mark.parametrize("command", ["plan", "rewrite", "build", "bench", "show"])
def test_a_stage_on_a_folder_that_is_not_ours(shell: Shell, tmp_path: Path, command: str) -> None:
    foreign = tmp_path / "foreign"
    for make in (lambda: None, foreign.mkdir, lambda: (foreign / "thesis.txt").write_text("precious")):
        make()
        before = snapshot(foreign)
        refuse(shell("optin", command, foreign), foreign, "optin")
        assert snapshot(foreign) == before


# files in the output folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _of_another_model(path: Path) -> None:
    shutil.copyfile(path.with_name("dense.onnx") if path.suffix == ".onnx" else vit() / "model.safetensors", path)


def _same_shapes(path: Path) -> None:
    if path.suffix == ".onnx":
        graph = onnx.load(path)
        weights = next(tensor for tensor in graph.graph.initializer if len(tensor.raw_data) > 64)
        weights.raw_data = bytes(len(weights.raw_data))
        onnx.save(graph, path)
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("command", ["build", "bench"])
@pytest.mark.parametrize("damage", [_cut, _of_another_model, _same_shapes, _gone])
@pytest.mark.parametrize(("name", "engine"), [("model.onnx", "onnx"), ("model/model.safetensors", "torch")])
def test_truncated_or_foreign_pruned_weights(
    shell: Shell, finished: Path, command: str, damage: Callable[[Path], None], name: str, engine: str
) -> None:
    damage(finished / name)
    before = snapshot(finished)
    refuse(shell("optin", command, finished, "--engine", engine), name.rpartition("/")[2], "optin")
    assert snapshot(finished) == before
    assert temporary_files(finished) == []


def _other_network(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {**plan, "network": "0" * 64}


def _other_units(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {**plan, "keep": {name: [0] for name in plan["keep"]}}


def test_a_plan_of_another_model(shell: Shell, finished: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    (finished / "plan.json").write_text(json.dumps(_other_network(plan)))
    before = snapshot(finished)
    for more in (["--dry-run"], []):
        refuse(shell("optin", "rewrite", finished, *more), "000000000000", "optin plan")
    assert snapshot(finished) == before


@pytest.mark.parametrize("change", [_other_network, _other_units])
def test_a_plan_that_did_not_make_the_weights(
    shell: Shell, finished: Path, change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> None:
    path = finished / "model" / "plan.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refuse(shell("optin", "build", finished, "--engine", "torch"), "plan")


def test_scores_of_another_model(shell: Shell, finished: Path) -> None:
    scores = finished / "scores.safetensors"
    with safe_open(scores, "pt") as file:
        said = dict(file.metadata())
    network = next(iter(re.findall(r"[0-9a-f]{64}", said["about"])))
    save_file(load_file(scores), scores, {name: text.replace(network, "0" * 64) for name, text in said.items()})
    before = snapshot(finished)
    refuse(shell("optin", "plan", finished), "000000000000", "optin score")
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("source.json", "rewrite"),
        ("scores.safetensors", "plan"),
        ("plan.json", "rewrite"),
        ("plan.json", "show"),
        ("model/plan.json", "build"),
        ("model/optin.json", "build"),
    ],
)
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema_version": 99}', "\ufeff\x00"])
def test_a_file_that_is_not_ours(shell: Shell, finished: Path, name: str, command: str, content: str) -> None:
    (finished / name).write_text(content)
    before = snapshot(finished)
    engine = ["--engine", "torch"] if command == "build" else []
    refuse(shell("optin", command, finished, *engine), "optin")
    assert snapshot(finished) == before


def test_a_measurement_without_artifacts(shell: Shell, finished: Path) -> None:
    (finished / "dense.onnx").unlink()
    refuse(shell("optin", "bench", finished), "dense.onnx", f"optin build {finished}")
    refuse(shell("optin", "bench", finished, "--engine", "trt"), "trt", "does not run on this machine")


# Ctrl-C


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def write_half_and_interrupt(content: object, path: Path, *_: object) -> None:
    Path(path).write_bytes(b"half of the fi")
    raise KeyboardInterrupt


def test_ctrl_c_keeps_finished_stages_for_the_next_run(shell: Shell, out: Path) -> None:
    options = [*text_options(lines(), out), "--engine", "torch", "--no-dense"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optin_deploy.pruning.pruning.compensated", interrupt)
        ran = shell("optin-export", bert(), *options)
    assert ran.code == 130
    assert "run the same command again" in ran.err
    assert "Traceback" not in ran.err
    assert temporary_files(out) == []
    kept = snapshot(out)
    finished = {"source.json", "job.toml", "dense.onnx", "scores.safetensors", "curves.json", "plan.json"}
    assert finished == set(kept)
    assert shell("optin-export", bert(), *options).code == 0
    after = snapshot(out)
    assert {name for name in finished if name.startswith(("scores", "curves")) and after[name] != kept[name]} == set()
    assert "model/model.safetensors" in after


def test_ctrl_c_in_the_middle_of_a_file_leaves_no_file(shell: Shell, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optin_deploy.files.storage.save_file", write_half_and_interrupt)
        ran = shell("optin-export", bert(), *text_options(lines(), out), "--engine", "torch")
    assert ran.code == 130
    assert set(snapshot(out)) == {"source.json", "job.toml", "dense.onnx"}
    assert temporary_files(out) == []


def test_ctrl_c_while_the_model_is_saved_leaves_the_old_one(shell: Shell, finished: Path) -> None:
    before = snapshot(finished / "model")
    with pytest.MonkeyPatch.context() as patch:
        write = "optin_deploy.checkpoint.smaller.write_tensors"
        patch.setattr(write, lambda path, *_: write_half_and_interrupt(0, path))
        assert shell("optin", "rewrite", finished, "--no-compensation").code == 130
    assert snapshot(finished / "model") == before
    assert temporary_files(finished) == []


def test_ctrl_c_while_the_onnx_file_is_saved_leaves_none(shell: Shell, finished: Path) -> None:
    (finished / "model.onnx").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optin_deploy.network.sealed.write", write_half_and_interrupt)
        assert shell("optin", "rewrite", finished).code == 130
    assert not (finished / "model.onnx").exists()
    assert temporary_files(finished) == []


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_a_real_sigint_ends_the_process_cleanly(shell: Shell, out: Path) -> None:
    options = text_options(lines(), out)
    child = subprocess.Popen(
        [sys.executable, "-c", BY_TORCHSCRIPT + CHILD, str(bert()), *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stderr is not None
    with child, child.stderr as stream:
        said = []
        for line in stream:
            said.append(line)
            if line.startswith("export ..."):  # takes seconds; scores, plan and model are finished
                child.send_signal(signal.SIGINT)
    assert child.returncode == 130, "".join(said)
    assert "run the same command again" in said[-1]
    assert "Traceback" not in "".join(said)
    assert temporary_files(out) == []
    assert not (out / "report.json").exists()
    kept = snapshot(out)
    finished_stages = {"scores.safetensors", "curves.json", "model.onnx"}
    assert finished_stages <= set(kept)
    ran = shell("optin-export", bert(), *options, "--engine", "torch", "--no-dense")
    assert ran.code == 0, ran.err
    after = snapshot(out)
    assert {name for name in finished_stages if after[name] != kept[name]} == set()
