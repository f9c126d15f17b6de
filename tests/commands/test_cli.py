"""The command line as a user meets it: help, exit codes, the whole job, the stages, what is reused, dry runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
import transformers
import typer
from safetensors.torch import load_file

import optin_deploy
from optin_deploy.cli import app
from optin_deploy.errors import EXIT_CODES
from optin_deploy.network.hashing import network_hash
from optin_deploy.network.read_onnx import read_file
from support.tiny_checkpoint import (
    CLASSES,
    FFN,
    HIDDEN,
    LAYERS,
    SEQ_LEN,
    Shell,
    bert,
    classifier,
    copy_of,
    finished_job,
    gpt2,
    labelled,
    lines,
    photos,
    snapshot,
    temporary_files,
    text_options,
    texts,
    vit,
)

COMMANDS = tuple(typer.main.get_group(app).commands)
READ_ONLY = ("doctor",)
"""Commands that write nothing; every other one has --dry-run."""
HEAVY = ("torch", "transformers", "onnx", "onnxruntime")
EXPENSIVE = ("scores.safetensors", "model/model.safetensors", "model.onnx", "dense.onnx")
"""What a second run must not make again."""
HELP_SCRIPT = """
import contextlib, io, json, sys
from optin_deploy import cli
said = {}
for name in json.loads(sys.argv[1]):
    sys.argv = ["optin", *([name] if name else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli._run(cli.app)
    said[name] = [code, out.getvalue()]
print(json.dumps({"said": said, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""

REFUSED_SCRIPT = """
import contextlib, io, json, sys
from optin_deploy import cli
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["optin", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli._run(cli.app)
    said.append([code, err.getvalue()])
print(json.dumps({"said": said, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    """What `optin --help` and every `optin COMMAND --help` say, and the modules loaded after all of them."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_SCRIPT, json.dumps(["", *COMMANDS])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def export_again(shell: Shell, out: Path, *more: object) -> Any:
    """The command that made `finished`, with more flags."""
    measured = [] if {"--no-dense", "trt"} & {*map(str, more)} else ["--threads", 1]
    return shell("optin-export", classifier(), *text_options(labelled(), out), *measured, *more)


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Files of `before` whose modification time or content is another."""
    return {name for name in before if before[name] != after.get(name)}


def run_onnx(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([node.name for node in session.get_outputs()], session.run(None, feeds), strict=True))


# help and usage


def test_the_commands_of_the_contract_are_there() -> None:
    assert {"export", "score", "plan", "rewrite", "build", "bench", "show"} <= set(COMMANDS)


def test_help_lists_the_commands_and_the_exit_codes(helped: dict[str, Any]) -> None:
    code, text = helped["said"][""]
    assert code == 0
    assert set(COMMANDS) <= set(re.findall(r"[a-z-]+", text))
    flat = " ".join(re.sub(r"[│\n]", " ", text).split())
    assert [number for number, meaning in EXIT_CODES.items() if f"{number} {meaning}" not in flat] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples(helped: dict[str, Any], command: str) -> None:
    code, text = helped["said"][command]
    assert code == 0
    assert "Example" in text
    assert f"optin {command} " in text or f"optin-{command} " in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in READ_ONLY])
def test_a_command_that_writes_has_a_dry_run(helped: dict[str, Any], command: str) -> None:
    assert "--dry-run" in helped["said"][command][1]


def test_help_loads_nothing_heavy(helped: dict[str, Any]) -> None:
    assert "optin_deploy" in helped["modules"]
    assert not set(helped["modules"]).intersection(HEAVY)


def test_shares_and_seeds_that_cannot_be_are_refused_before_anything_heavy_is_loaded() -> None:
    cases = {
        "--flops 0.0": (
            ["export", "m", "--flops", "0"],
            ["plan", "w", "--flops", "0"],
            ["sweep", "w", "--flops", "1,0"],
        ),
        "--params 1.5": (["export", "m", "--params", "1.5"], ["plan", "w", "--params", "1.5"]),
        "--tokens 0": (
            ["export", "m", "--tokens", "0"],
            ["plan", "w", "--tokens", "0"],
            ["sweep", "w", "--tokens", "0"],
        ),
        "--seed -1": (
            ["export", "m", "--seed", "-1"],
            ["score", "m", "--out", "w", "--seed", "-1"],
            ["finetune", "w", "--data", "rows", "--seed", "-1"],
        ),
    }
    given = [(says, command) for says, commands in cases.items() for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_SCRIPT, json.dumps([command for _, command in given])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for (says, command), (code, error) in zip(given, found["said"], strict=True):
        assert (code, says in error) == (2, True), (command, error)
    assert not set(found["modules"]).intersection(HEAVY)


@pytest.mark.parametrize("program", ["optin", "optin-export"])
def test_the_installed_programs_start(program: str) -> None:
    script = Path(sys.executable).with_name(program)
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "optin-export" in done.stdout or "export" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "nope"),
        (["score"], "MODEL"),
        (["score", "model"], "--out"),
        (["export", "model", "--bogus"], "--bogus"),
        (["export", "model", "--flops", "many"], "--flops"),
        (["export", "model", "--seq-len", "1.5"], "--seq-len"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_what_is_wrong(shell: Shell, arguments: list[str], says: str) -> None:
    ran = shell("optin", *arguments)
    assert ran.code == 2
    assert says.lower() in ran.err.lower()
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("program", ["optin", "optin-export"])
def test_without_arguments_the_help_is_shown(program: str) -> None:
    script = Path(sys.executable).with_name(program)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


# the whole job


def test_the_output_folder_holds_the_files_of_the_contract() -> None:
    out = finished_job()
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"model.onnx", "dense.onnx", "report.json", "report.md", "samples.safetensors"} <= files
    assert {"plan.json", "scores.safetensors", "curves.json"} <= files
    assert {f"model/{name}" for name in ("model.safetensors", "config.json", "plan.json", "optin.json")} <= files
    assert {"model/tokenizer.json", "model/tokenizer_config.json"} <= files
    assert temporary_files(out) == []


@pytest.mark.parametrize("name", ["plan.json", "model/plan.json", "report.json"])
def test_a_json_file_carries_its_schema_version_and_the_hash_of_the_network(name: str) -> None:
    data = json.loads((finished_job() / name).read_text())
    assert data["schema_version"] == 2
    found = data.get("hashes", data)["network"]
    assert found == network_hash(read_file(finished_job() / "dense.onnx"))


def test_the_scores_carry_their_schema_version_and_the_hash_of_the_network() -> None:
    with safetensors.safe_open(finished_job() / "scores.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["schema_version"] == 3
    assert about["network"] == network_hash(read_file(finished_job() / "dense.onnx"))
    assert re.fullmatch("[0-9a-f]{64}", about["provenance"]["key"])


def test_labels_make_accuracy_the_metric() -> None:
    # The labels are the dense model's own predictions.
    quality = json.loads((finished_job() / "report.json").read_text())["quality"]
    assert quality["metric"] == "accuracy"
    assert quality["dense"] == 1.0
    assert 0 <= quality["pruned"] <= 1
    assert quality["samples"] == 12


def test_the_exported_model_is_smaller_in_every_form() -> None:
    out = finished_job()
    report = json.loads((out / "report.json").read_text())
    assert 0.4 < report["macs"]["kept"] <= 0.6
    assert report["params"]["pruned"] < report["params"]["dense"]
    sizes = report["size_bytes"]
    assert sizes == {"pruned": (out / "model.onnx").stat().st_size, "dense": (out / "dense.onnx").stat().st_size}
    assert sizes["pruned"] < sizes["dense"]
    model = optin_deploy.load(out)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["pruned"]
    queries = [getattr(layer.attention.self, "query", None) for layer in model.bert.encoder.layer]  # none without heads
    assert report["heads"] == [query.out_features // 8 if query else 0 for query in queries]  # heads are 8 wide
    neurons = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    assert report["neurons"] == [*neurons, model.bert.pooler.dense.out_features]


def test_folder_and_model_folder_load_to_the_same_original_class() -> None:
    both = [optin_deploy.load(finished_job()), optin_deploy.load(finished_job() / "model")]
    assert [type(model) for model in both] == [transformers.BertForSequenceClassification] * 2
    first, second = (model.state_dict() for model in both)
    assert all(torch.equal(first[name], second[name]) for name in first)
    dense = transformers.BertForSequenceClassification.from_pretrained(classifier())
    assert both[0].config.id2label == dense.config.id2label == dict(enumerate(CLASSES))


def test_dense_and_pruned_artifacts_have_the_same_inputs_and_outputs() -> None:
    graphs = [onnx.load(finished_job() / name).graph for name in ("model.onnx", "dense.onnx")]
    inputs, outputs = ([tuple(v.name for v in getattr(g, side)) for g in graphs] for side in ("input", "output"))
    assert inputs == [("input_ids", "attention_mask", "token_type_ids")] * 2
    assert outputs == [("logits",)] * 2


def test_the_recorded_samples_are_what_the_artifacts_compute() -> None:
    samples = load_file(finished_job() / "samples.safetensors")
    feeds = {name.removeprefix("input."): t.numpy() for name, t in samples.items() if name.startswith("input.")}
    assert {len(rows) for rows in feeds.values()} == {8}
    assert set(feeds) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, file in (("pruned", "model.onnx"), ("dense", "dense.onnx")):
        found = run_onnx(finished_job() / file, feeds)["logits"]
        np.testing.assert_allclose(found, samples[f"{name}.logits"].numpy(), atol=1e-4, rtol=0)
    assert not torch.allclose(samples["pruned.logits"], samples["dense.logits"], atol=1e-4)


def test_tokenizer_and_config_lie_beside_the_onnx_file_too() -> None:
    # Optimum's ORTModel classes look for them there.
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished_job())
    original = transformers.AutoTokenizer.from_pretrained(classifier())
    assert tokenizer(texts()[0])["input_ids"] == original(texts()[0])["input_ids"]
    assert transformers.AutoConfig.from_pretrained(finished_job()).model_type == "bert"


@pytest.mark.slow
def test_a_gpt2_classifier_is_cut_and_exported_without_its_cache(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", gpt2(), *text_options(lines(), out), "--no-dense")
    assert ran.code == 0, ran.err
    model = optin_deploy.load(out)
    assert type(model) is transformers.GPT2ForSequenceClassification
    assert model.config.use_cache
    widths = json.loads((out / "report.json").read_text())["neurons"]
    assert [block.mlp.c_fc.nf for block in model.transformer.h] == widths
    assert sum(widths) < LAYERS * FFN
    graph = onnx.load(out / "model.onnx").graph
    assert [each.name for each in graph.input] == ["input_ids", "attention_mask"]
    assert [each.name for each in graph.output] == ["logits"]


def test_a_gpt2_classifier_without_a_padding_token_says_what_to_do(shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(gpt2(), tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    ran = shell("optin-export", folder, *text_options(lines(), tmp_path / "out"))
    assert ran.code == 2
    assert "does not take two samples at once" in ran.err
    assert "pad_token_id" in ran.err


def test_an_image_folder_calibrates_a_vit_and_no_dense_leaves_the_dense_artifact_out(
    shell: Shell, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", vit(), "--calibration", photos(), "--out", out, "--align", 8, "--no-dense")
    assert ran.code == 0, ran.err
    assert not (out / "dense.onnx").exists()
    assert (out / "model" / "preprocessor_config.json").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["latency"] == []
    assert set(report["size_bytes"]) == {"pruned"}
    assert report["quality"]["metric"] == "accuracy"
    assert report["quality"]["samples"] == 6
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = optin_deploy.load(out)(pixel_values=pixels).logits.numpy()
    found = run_onnx(out / "model.onnx", {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
    assert temporary_files(out) == []


def test_without_labels_agreement_is_the_metric(shell: Shell, tmp_path: Path) -> None:
    for model, metric in ((bert(), "cosine_to_dense"), (classifier(), "same_prediction")):
        out = tmp_path / metric
        ran = shell("optin-export", model, *text_options(lines(), out), "--engine", "torch", "--threads", 1)
        assert ran.code == 0, ran.err
        report = json.loads((out / "report.json").read_text())
        quality = report["quality"]
        assert quality["metric"] == metric
        assert quality["dense"] == 1.0
        assert -1 <= quality["pruned"] < 1.0
        assert [row["engine"] for row in report["latency"]] == ["torch"]
        assert report["size_bytes"]["pruned"] == (out / "model" / "model.safetensors").stat().st_size


def test_the_pooler_that_feature_extraction_does_not_use_is_gone(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shell("optin-export", bert(), *text_options(lines(), out), "--engine", "torch", "--no-dense").code == 0
    assert not [name for name in load_file(out / "model" / "model.safetensors") if name.startswith("pooler")]


def test_without_calibration_the_bundled_set_is_used_with_a_warning(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--seq-len", SEQ_LEN, "--samples", 16, "--engine", "torch", "--no-dense", "--out", out]
    ran = shell("optin-export", bert(), *flags)
    assert ran.code == 0, ran.err
    assert "warning" in ran.err
    assert "your own data" in ran.err
    assert "your own data" in (out / "report.md").read_text()


# the stages, one command each


def test_the_stages_meet_in_files(shell: Shell, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = text_options(lines(), work)
    options.remove("--align")
    options.remove(8)

    ran = shell("optin", "score", bert(), *options)
    assert ran.code == 0, ran.err
    assert f"optin plan {work}" in ran.out
    assert set(snapshot(work)) == {"source.json", "dense.onnx", "scores.safetensors"}
    written = snapshot(work)
    ran = shell("optin", "score", bert(), *options)
    assert "Found finished" in ran.out
    assert not changed(written, snapshot(work)) & {"dense.onnx", "scores.safetensors"}

    ran = shell("optin", "plan", work, "--flops", 0.5, "--dry-run")
    assert "nothing was written" in ran.out
    assert not (work / "curves.json").exists()
    ran = shell("optin", "plan", work, "--flops", 0.5, "--align", 8)
    assert ran.code == 0, ran.err
    assert f"optin rewrite {work}" in ran.out
    assert (work / "curves.json").exists()
    plan = json.loads((work / "plan.json").read_text())
    cost = plan["cost"]
    assert 0.4 < cost["macs_pruned"] / cost["macs_dense"] <= 0.5
    assert plan["settings"]["allocation"] == "curves"
    uniform = tmp_path / "uniform"
    shutil.copytree(work, uniform)
    ran = shell("optin", "plan", uniform, "--allocation", "uniform", "--flops", 0.5, "--align", 8)
    assert ran.code == 0, ran.err
    told = json.loads((uniform / "plan.json").read_text())
    assert told["settings"]["allocation"] == "uniform"
    assert told["cost"]["macs_pruned"] / told["cost"]["macs_dense"] <= 0.5
    assert len({len(units) for name, units in told["keep"].items() if name.endswith("neurons")}) == 1

    ran = shell("optin", "rewrite", work)
    assert ran.code == 0, ran.err
    assert f"optin build {work}" in ran.out
    model = optin_deploy.load(work)
    assert type(model) is transformers.BertModel
    assert "Found finished" in shell("optin", "rewrite", work).out

    ran = shell("optin", "build", work, "--pool", "mean")
    assert ran.code == 0, ran.err
    assert "model.onnx" in ran.out
    assert "dense.onnx" in ran.out
    feeds = {
        "input_ids": np.arange(20, 38, dtype=np.int64).reshape(2, 9),
        "attention_mask": np.array([[1] * 9, [1] * 5 + [0] * 4], dtype=np.int64),
        "token_type_ids": np.zeros((2, 9), dtype=np.int64),
    }
    found = run_onnx(work / "model.onnx", feeds)
    with torch.inference_mode():
        states = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state.numpy()
    assert states.shape == (2, 9, HIDDEN)
    np.testing.assert_allclose(found["last_hidden_state"], states, atol=1e-4, rtol=0)
    means = np.stack([states[0].mean(0), states[1, :5].mean(0)])
    np.testing.assert_allclose(found["sentence_embedding"], means, atol=1e-4, rtol=0)

    ran = shell("optin", "bench", work, "--at", "batch=2,seq=12", "--at", "batch=1", "--threads", 1)
    assert ran.code == 0, ran.err
    assert re.search(r"\b2\b\D+\b12\b", ran.out)
    rows = json.loads((work / "measurements.json").read_text())["latency"]
    assert [(row["batch"], row["seq_len"], row["threads"]) for row in rows] == [(2, 12, 1), (1, SEQ_LEN, 1)]

    ran = shell("optin", "show", work)
    assert ran.code == 0, ran.err
    assert str(bert()) in ran.out
    assert str(lines()) in ran.out
    assert f"keeps {cost['macs_pruned'] / cost['macs_dense']:.1%}" in ran.out
    assert temporary_files(work) == []


def test_show_prints_the_report_of_a_finished_job(shell: Shell) -> None:
    ran = shell("optin", "show", finished_job())
    assert ran.code == 0
    assert (finished_job() / "report.md").read_text() in ran.out


@pytest.mark.slow
def test_the_torch_engine_measures_the_dense_model_of_the_same_task(shell: Shell, tmp_path: Path) -> None:
    # The classifier's encoder as a feature extractor: its dense counterpart has no classifier either.
    from optin_deploy.exporters import to_torch

    opened: list[str] = []

    class Watched(to_torch.TorchRuntime):
        def __init__(self, model: torch.nn.Module, **options: Any) -> None:
            opened.append(type(model).__name__)
            super().__init__(model, **options)

    flags = [*text_options(lines(), tmp_path / "out"), "--engine", "torch", "--task", "feature-extraction"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_torch, "TorchRuntime", Watched)
        assert shell("optin-export", classifier(), *flags).code == 0
    assert set(opened) == {"BertModel"}


# a second run


def test_a_second_run_reuses_every_finished_stage(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    ran = export_again(shell, finished)
    assert ran.code == 0, ran.err
    different = changed(before, snapshot(finished))
    assert not different & set(EXPENSIVE)
    assert "report.json" in different  # new timings


def test_another_budget_redoes_only_what_depends_on_it(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    ran = export_again(shell, finished, "--flops", 0.4)
    assert ran.code == 0, ran.err
    different = changed(before, snapshot(finished))
    assert not different & {"scores.safetensors", "dense.onnx"}
    assert {"plan.json", "model/model.safetensors", "model.onnx"} <= different
    report = json.loads((finished / "report.json").read_text())
    assert report["macs"]["kept"] <= 0.4
    assert report["settings"]["flops"] == 0.4


@pytest.mark.parametrize(
    ("flags", "kept", "made"),
    [
        (["--no-compensation"], {"scores.safetensors"}, {"model.onnx", "model/model.safetensors"}),
        (["--scorer", "exact"], set(), {"scores.safetensors"}),
        (["--seed", 1], set(), {"scores.safetensors", "model/model.safetensors"}),
    ],
)
def test_another_setting_redoes_the_stages_that_read_it(
    shell: Shell, finished: Path, flags: list[object], kept: set[str], made: set[str]
) -> None:
    before = snapshot(finished)
    ran = export_again(shell, finished, "--engine", "torch", "--no-dense", *flags)
    assert ran.code == 0, ran.err
    different = changed(before, snapshot(finished))
    assert made <= different
    assert not different & kept


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b""], ids=["truncated", "empty"])
@pytest.mark.parametrize("name", ["scores.safetensors", "model/model.safetensors"])
def test_a_damaged_stage_is_done_again(shell: Shell, finished: Path, name: str, damage: Any) -> None:
    (finished / name).write_bytes(damage((finished / name).read_bytes()))
    ran = export_again(shell, finished, "--engine", "torch", "--no-dense")
    assert ran.code == 0, ran.err
    assert load_file(finished / name)


def test_scores_of_another_run_beside_a_fitting_json_are_not_used(shell: Shell, finished: Path) -> None:
    # What an interruption between the two files leaves behind.
    other = copy_of(finished, finished.with_name("other"))
    assert export_again(shell, other, "--engine", "torch", "--no-dense", "--scorer", "exact").code == 0
    good = {name: tensor.clone() for name, tensor in load_file(finished / "scores.safetensors").items()}  # not mapped
    shutil.copyfile(other / "scores.safetensors", finished / "scores.safetensors")
    assert export_again(shell, finished, "--engine", "torch", "--no-dense").code == 0
    found = load_file(finished / "scores.safetensors")
    for name, tensor in good.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=0)


# dry runs


def test_a_dry_run_of_a_new_job_writes_nothing(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--calibration", lines(), "--seq-len", SEQ_LEN, "--dry-run"]
    ran = shell("optin-export", bert(), *common, "--flops", 0.5)
    assert ran.code == 0, ran.err
    assert "bert-0.5" in ran.out  # ./MODEL-FLOPS
    assert "nothing was written" in ran.out
    assert "12 heads, 192 neurons" in ran.out
    assert shell("optin", "score", bert(), *common, "--out", "work").code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--flops", 0.3],
        ["rewrite"],
        ["build"],
        ["build", "--engine", "trt"],
        ["bench"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_dry_run_of_a_stage_writes_nothing(shell: Shell, finished: Path, arguments: list[object]) -> None:
    before = snapshot(finished)
    ran = shell("optin", arguments[0], finished, *arguments[1:], "--dry-run")
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert snapshot(finished) == before


def test_a_dry_run_over_a_finished_job_writes_nothing(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    assert export_again(shell, finished, "--dry-run").code == 0
    assert snapshot(finished) == before


@pytest.mark.parametrize("flags", [["--engine", "bogus"], ["--precision", "int3"], ["--pool", "max"]])
def test_a_dry_run_of_build_checks_what_build_checks(shell: Shell, flags: list[str]) -> None:
    ran = shell("optin", "build", finished_job(), "--dry-run", *flags)
    assert ran.code == 2
    assert flags[1] in ran.err


def test_a_dry_run_of_build_needs_a_model(shell: Shell, tmp_path: Path) -> None:
    assert shell("optin", "build", tmp_path / "nowhere", "--dry-run").code == 2


# engines that cannot be built here


def test_trt_leaves_the_portable_files_and_says_what_to_run(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    (finished / "report.json").unlink()
    ran = export_again(shell, finished, "--engine", "trt")
    assert ran.code == 3
    assert "Traceback" not in ran.err
    assert f"optin build {finished.name} --engine trt --precision fp16" in ran.err
    assert "trtexec" in ran.err
    assert not changed(before, snapshot(finished)) & set(EXPENSIVE)
    report = json.loads((finished / "report.json").read_text())
    assert (report["settings"]["engine"], report["settings"]["precision"]) == ("trt", "fp16")
    assert report["latency"] == []
    assert set(report["size_bytes"]) == {"pruned", "dense"}
    assert f"optin build {finished.name} --engine trt" in (finished / "report.md").read_text()
    assert not (finished / "model.engine").exists()


@pytest.mark.parametrize("command", ["export", "build"])
@pytest.mark.parametrize(("flags", "code"), [([], 3), (["--prepare-only"], 0)])
def test_prepare_only_makes_a_missing_engine_a_success(
    shell: Shell, finished: Path, command: str, flags: list[str], code: int
) -> None:
    if command == "export":
        ran = export_again(shell, finished, "--engine", "trt", "--no-dense", *flags)
    else:
        ran = shell("optin", "build", finished, "--engine", "trt", *flags)
    assert ran.code == code
    assert f"optin build {finished.name} --engine trt" in ran.out + ran.err


def test_the_precision_for_the_target_is_in_the_command(shell: Shell, finished: Path) -> None:
    ran = shell("optin", "build", finished, "--engine", "trt", "--precision", "fp32")
    assert ran.code == 3
    assert "--engine trt --precision fp32" in ran.err
    assert "--fp16" not in ran.err


def test_the_command_for_the_target_works_there(
    shell: Shell, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The target has the folder, but neither the dense model nor the calibration data.
    ran = shell("optin", "build", finished, "--engine", "trt")
    told = re.search(r"optin (build .*)", ran.err)
    assert told
    target = tmp_path / "target"
    target.mkdir()
    shutil.move(finished, target / finished.name)
    source = json.loads((target / finished.name / "source.json").read_text())
    source |= {"model": "/only/on/the/first/machine", "calibration": "/only/there.jsonl"}
    (target / finished.name / "source.json").write_text(json.dumps(source))
    monkeypatch.chdir(target)
    ran = shell("optin", *shlex.split(told[1]))
    assert ran.code == 3, ran.err  # no TensorRT here either: but nothing else is missing
