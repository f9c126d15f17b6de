"""`optin-export FILE.onnx --calibration`: a network of any kind made smaller by data, written, measured, reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file

import optin_deploy
from optin_deploy.network.read import read
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.structure.find import find
from optin_deploy.structure.macs import macs
from support.tiny_checkpoint import Shell, photos
from support.tiny_checkpoint import run as job
from support.tiny_networks import VOCABULARY, Image, Text, export, made

ROWS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(made(Text), tmp_path_factory.mktemp("text") / "text.onnx")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npz"
    np.savez(path, ids=np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, 7)))
    return path


@pytest.fixture(scope="module")
def done(text: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one job."""
    out = tmp_path_factory.mktemp("job") / "out"
    with pytest.MonkeyPatch.context() as patch:
        code = job(
            *("optin-export", text, "--calibration", ids, "--flops", 0.6, "--align", 4, "--allocation", "uniform"),
            *("--at", "batch=1", "--at", "batch=5", "--out", out),
            monkeypatch=patch,
        )
    assert code == 0
    return out


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, dict(feeds))[0]
    return found


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_a_file_is_made_smaller_by_data_in_one_command(done: Path, text: Path) -> None:
    names = {
        "dense.onnx",
        "model.onnx",
        "plan.json",
        "scores.safetensors",
        "samples.safetensors",
        "report.json",
        "report.md",
    }
    assert names <= {path.name for path in done.iterdir()}
    told = report(done)
    assert 0.45 < told["macs"]["kept"] <= 0.6
    assert (done / "model.onnx").stat().st_size < text.stat().st_size
    kept = {group["kind"]: group for group in told["groups"]}
    assert set(kept) >= {"heads", "neurons"}
    assert told["parity"]["masked_vs_rewritten"] < 1e-9
    assert told["parity"]["torch_vs_engine"] < 1e-4
    assert [row["batch"] for row in told["latency"]] == [1, 5]
    assert told["quality"]["metric"] == "same_prediction"
    assert "same prediction" in (done / "report.md").read_text().lower()


def test_the_dense_file_gives_what_the_given_one_gives(done: Path, text: Path, ids: Path) -> None:
    feeds = {"ids": np.load(ids)["ids"][:9]}
    np.testing.assert_array_equal(run(done / "dense.onnx", feeds), run(text, feeds))


def test_recorded_samples_are_what_both_files_give(done: Path) -> None:
    samples = load_file(done / "samples.safetensors")
    feeds = {"ids": samples["input.ids"].numpy()}
    for name, file in (("dense", "dense.onnx"), ("pruned", "model.onnx")):
        (output,) = [value for key, value in samples.items() if key.startswith(f"{name}.")]
        np.testing.assert_allclose(run(done / file, feeds), output.numpy(), rtol=1e-4, atol=1e-5)


def test_macs_are_counted_at_the_length_of_the_rows(done: Path, text: Path) -> None:
    rows = {"ids": torch.zeros(1, 7, dtype=torch.int64)}
    counted = [macs(find(read(path), [rows]).structure) for path in (text, done / "model.onnx")]
    assert report(done)["macs"]["dense"] == counted[0]
    assert report(done)["macs"]["pruned"] == counted[1]


def test_compensation_brings_outputs_nearer_to_the_dense_ones(
    done: Path, text: Path, ids: Path, tmp_path: Path, shell: Shell
) -> None:
    plain = tmp_path / "plain"
    ran = shell(
        *("optin-export", text, "--calibration", ids, "--flops", 0.6, "--align", 4, "--allocation", "uniform"),
        *("--no-compensation", "--out", plain),
    )
    assert ran.code == 0, ran.err
    feeds = {"ids": np.random.default_rng(1).integers(0, VOCABULARY, (64, 7))}
    dense = run(text, feeds)
    with_, without = (np.square(run(folder / "model.onnx", feeds) - dense).mean() for folder in (done, plain))
    assert with_ < 0.8 * without


def test_finished_scores_are_reused_and_others_are_not(
    done: Path, text: Path, ids: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return score_units(*arguments, **options)

    monkeypatch.setattr("optin_deploy.pruning.pruning.score_units", counted)
    same = ("optin-export", text, "--calibration", ids, "--align", 4, "--allocation", "uniform", "--out", done)
    assert shell(*same, "--flops", 0.7).code == 0
    assert 0.6 < report(done)["macs"]["kept"] <= 0.7
    assert not calls
    assert shell(*same, "--flops", 0.7, "--weighting", "output").code == 0
    assert len(calls) == 1


def test_the_folder_is_loaded_as_a_torch_module(done: Path, ids: Path) -> None:
    feeds = np.load(ids)["ids"][:9]
    with torch.no_grad():
        (found,) = optin_deploy.load(done)(torch.from_numpy(feeds)).values()
    np.testing.assert_allclose(run(done / "model.onnx", {"ids": feeds}), found.numpy(), rtol=1e-4, atol=1e-5)


def test_the_page_shows_every_kind_of_units(done: Path, tmp_path: Path, shell: Shell) -> None:
    page = tmp_path / "page.html"
    ran = shell("optin", "report", done, "--out", page)
    assert ran.code == 0, ran.err
    html = page.read_text()
    groups = report(done)["groups"]
    cut = {group["kind"] for group in groups if group["kept"] < group["units"]}
    assert cut
    for group in groups:
        assert (f"{group['name']}: " in html) is (group["kind"] in cut)
    assert "text.onnx" in html


def test_images_as_arrays_and_channels(tmp_path: Path, shell: Shell) -> None:
    network, data, out = export(made(Image), tmp_path / "image.onnx"), tmp_path / "rows.npz", tmp_path / "out"
    np.savez(data, pixels=np.random.default_rng(0).standard_normal((40, 3, 12, 12), dtype=np.float32))
    ran = shell("optin-export", network, "--calibration", data, "--flops", 0.7, "--align", 2, "--out", out)
    assert ran.code == 0, ran.err
    assert report(out)["macs"]["kept"] <= 0.7
    assert {group["kind"] for group in report(out)["groups"]} == {"channels"}
    assert report(out)["settings"]["allocation"] == "curves"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "texts need a tokenizer, and none lies beside the network"),
        (("--calibration", "IDS", "--pool", "mean"), "--pool mean"),
        (("--calibration", "IDS", "--flops", "0.01"), "--flops"),
        (("--calibration", "IDS", "--compare-output", "nothing"), "outputs are"),
        (("--calibration", "IDS", "--mean", "grey"), "--mean 'grey'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(
    text: Path, ids: Path, tmp_path: Path, shell: Shell, arguments: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out"
    given = [str(ids) if each == "IDS" else each for each in arguments]
    ran = shell("optin-export", text, "--out", out, *given)
    assert ran.code == 2
    assert words in ran.err
    assert not out.exists() or not any(out.iterdir())


def test_a_dry_run_writes_nothing(text: Path, ids: Path, tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", text, "--calibration", ids, "--out", out, "--dry-run")
    assert ran.code == 0, ran.err
    assert "nothing was written" in ran.out
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_a_checkpoint_of_windows_is_made_smaller_and_stays_its_class(tmp_path: Path, shell: Shell) -> None:
    model, out = tmp_path / "swin", tmp_path / "out"
    sizes = {"image_size": 32, "patch_size": 4, "window_size": 4}
    torch.manual_seed(0)
    config = transformers.SwinConfig(**sizes, embed_dim=24, depths=[1, 1], num_heads=[3, 6], num_labels=5)
    transformers.SwinForImageClassification(config).save_pretrained(model)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    ran = shell(
        *("optin-export", model, "--calibration", photos(), "--samples", 16, "--flops", 0.7, "--align", 4),
        *("--allocation", "uniform", "--out", out),
    )
    assert ran.code == 0, ran.err
    told = report(out)
    assert told["macs"]["kept"] <= 0.7
    assert told["latency"][0]["seq_len"] is None
    samples = load_file(out / "samples.safetensors")
    reloaded = transformers.SwinForImageClassification.from_pretrained(model).eval()
    with torch.no_grad():
        wanted = reloaded(pixel_values=samples["input.pixel_values"]).logits
    torch.testing.assert_close(samples["dense.logits"], wanted, rtol=1e-4, atol=1e-5)
