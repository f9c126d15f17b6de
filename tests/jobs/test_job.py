"""The main job as a library call: its arithmetic, its proofs, and what it refuses."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import optin_deploy
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.data.halves import split
from optin_deploy.data.samples import read_samples
from optin_deploy.errors import BadInput, ParityFailure
from optin_deploy.exporters import ENGINES, check_precision, exporter
from optin_deploy.exporters.base import Artifact
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.feeds.rows import Batch, Feeds
from optin_deploy.jobs.building import ArtifactPair, Built, Forms, forms_in
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.proving import check_engine
from optin_deploy.jobs.samples import record_samples
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring import artifacts as measuring
from optin_deploy.measuring.points import Point
from optin_deploy.network.examples import BATCH, LENGTH
from optin_deploy.network.sealed import store
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.runtimes.base import Feeds as Arrays
from support.tiny_checkpoint import (
    SEQ_LEN,
    Shell,
    bert,
    classifier,
    finished_job,
    labelled,
    lines,
    one_thread,
    photos,
    temporary_files,
    text_options,
    texts,
    vit,
)


def text_source() -> Source:
    return Source(str(bert()), calibration=str(lines()), seq_len=SEQ_LEN)


def run_job(out: Path, source: Source, stage: Stage = silent_stage, **options: Any) -> Any:
    how: dict[str, Any] = {"engine": "torch", "align": 8, "dense": False, **options}
    with one_thread():
        return export_model(Job(source, **how), out, stage=stage)


# what the report says is true


def test_the_reported_accuracy_is_that_of_the_loaded_models() -> None:
    # Recomputed row by row, without batches, on the rows that were held out.
    samples = read_samples(labelled())
    held_out = split(samples, samples_limit=512, seed=0)[1]
    dense = load_dense(str(classifier()))
    right = {"dense": 0, "pruned": 0}
    for name, model in (("dense", dense.model), ("pruned", optin_deploy.load(finished_job()))):
        for sample in held_out:
            encoded = dense.preprocessor(sample.text, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
            with torch.inference_mode():
                right[name] += model.config.id2label[int(model(**encoded).logits.argmax())] == sample.label
    quality = json.loads((finished_job() / "report.json").read_text())["quality"]
    assert quality["samples"] == len(held_out) == 12
    assert {name: quality[name] for name in right} == pytest.approx({name: n / 12 for name, n in right.items()})


def test_the_held_out_rows_are_not_calibrated_on() -> None:
    rows = prepare(text_source()).ready.rows
    assert rows.held_out is not None
    fitted, held_out = (set(map(str, _token_rows(part))) for part in (rows.calibration, rows.held_out))
    assert fitted
    assert held_out
    assert not fitted & held_out
    assert len(rows.calibration) + len(rows.held_out) == len(texts())


def _token_rows(feeds: Feeds) -> list[list[int]]:
    return [
        [token for token, real in zip(row.tolist(), mask.tolist(), strict=True) if real]
        for batch in feeds.batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.slow
def test_points_and_threads_reach_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    real = measuring.measure_pair

    def two_blocks(*openers: Any, **options: Any) -> Any:
        shapes.append(openers[2]["input_ids"].shape)
        return real(*openers, **options, blocks=2)

    monkeypatch.setattr(measuring, "measure_pair", two_blocks)
    points = (Point(batch=2, seq=12), Point(batch=1))
    report = run_job(tmp_path / "out", text_source(), dense=True, points=points, threads=1)
    assert shapes == [(2, 12), (1, SEQ_LEN)]
    assert [(m.batch, m.seq_len, m.threads, m.engine) for m in report.latency] == [
        (2, 12, 1, "torch"),
        (1, SEQ_LEN, 1, "torch"),
    ]
    # Attention grows with the square of the length: at 12 tokens heads weigh less than at 16.
    assert report.latency[1].ideal == pytest.approx(report.macs["dense"] / report.macs["pruned"])
    assert report.latency[0].ideal != report.latency[1].ideal


def test_the_written_report_is_the_returned_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run_job(out, text_source())
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert report.settings["model"] == str(bert())
    assert report.settings["flops"] == 0.6
    assert not report.notes


def test_stages_are_announced_in_order_and_timed(tmp_path: Path) -> None:
    titles: list[str] = []

    @contextmanager
    def stage(title: str) -> Any:
        titles.append(title)
        yield lambda done, total: None

    report = run_job(tmp_path / "out", text_source(), stage=stage)
    assert titles == ["load", "score", "curves", "plan", "rewrite", "export", "check"]
    assert list(report.seconds) == titles
    assert min(report.seconds.values()) >= 0


def test_curves_are_the_default_and_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    uniform = run_job(tmp_path / "uniform", text_source(), allocation="uniform")
    assert "curves" not in uniform.seconds
    first = run_job(out, text_source())
    assert first.hashes["plan"] != uniform.hashes["plan"]
    written = (out / "curves.json").stat().st_mtime_ns
    smaller = run_job(out, text_source(), limits=Limits(flops=0.5))
    assert (out / "curves.json").stat().st_mtime_ns == written
    assert smaller.macs["kept"] <= 0.5 < first.macs["kept"]


def test_a_full_budget_keeps_everything_and_changes_nothing(tmp_path: Path) -> None:
    report = run_job(tmp_path / "out", text_source(), limits=Limits(flops=1.0), compensation=False)
    assert report.macs["kept"] == 1.0
    assert report.params["dense"] == report.params["pruned"]
    assert report.quality.pruned == pytest.approx(1.0, abs=1e-6)


# parity


class Bent:
    """A runtime whose outputs are off by a share of the largest one."""

    def __init__(self, inner: Any, error: float) -> None:
        self.inner, self.error = inner, error

    def __enter__(self) -> Bent:
        self.inner.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.inner.__exit__(*exception)

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return {name: self.bend(value) for name, value in self.inner.run(feeds).items()}

    def synchronize(self) -> None:
        self.inner.synchronize()

    def bend(self, value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value.flat[-1] += self.error * max(1.0, float(np.abs(value).max()))
        return value


@pytest.mark.parametrize("error", [2e-4, 0.01, float("nan")])
def test_a_bent_engine_output_fails_the_job(
    finished: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    from optin_deploy.exporters.to_onnx import OnnxExporter

    honest = OnnxExporter.open
    monkeypatch.setattr(OnnxExporter, "open", lambda *args, **options: Bent(honest(*args, **options), error))
    (finished / "report.json").unlink()
    options = [*text_options(labelled(), finished), "--threads", 1]
    for ran in (shell("optin-export", classifier(), *options), shell("optin", "build", finished)):
        assert ran.code == 1
        assert "model.onnx" in ran.err
        assert "differs from what it was made of" in ran.err
        assert "Traceback" not in ran.err
    assert not (finished / "report.json").exists()  # a failed run is no row
    assert temporary_files(finished) == []


def test_rounding_passes_the_parity_check(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, forms, samples = _built(finished), _forms(finished), _samples(finished)
    found = check_engine(built, forms, samples)
    assert set(found) == {"torch_vs_engine", "torch_vs_engine_dense"}
    assert max(found.values()) <= 1e-5
    (pair,) = built.pairs
    honest = pair.engine.open
    monkeypatch.setattr(pair.engine, "open", lambda *args, **options: Bent(honest(*args, **options), 5e-5), False)
    alone = Built((replace(pair, dense=None),))
    bent = check_engine(alone, forms, samples)
    assert max(bent.values()) == pytest.approx(5e-5, rel=0.2)


def test_an_artifact_of_the_wrong_model_fails(finished: Path) -> None:
    pruned = _forms(finished).pruned
    with pytest.raises(ParityFailure, match="dense"):  # dense.onnx against the pruned network
        check_engine(_built(finished), Forms(pruned, pruned), _samples(finished))


def test_parity_is_checked_on_padded_rows_of_untraced_sizes(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _built(finished)
    seen: list[Any] = []
    engine = built.pairs[0].engine
    honest = engine.open

    def watched(path: Path, **options: Any) -> Any:
        runtime = honest(path, **options)
        run = runtime.run

        def spy(feeds: Arrays) -> dict[str, np.ndarray]:
            seen.append(feeds["attention_mask"])
            found: dict[str, np.ndarray] = run(feeds)
            return found

        runtime.run = spy
        return runtime

    monkeypatch.setattr(engine, "open", watched, False)
    check_engine(built, _forms(finished), _samples(finished))
    assert (8, SEQ_LEN) in {mask.shape for mask in seen}
    assert (BATCH, LENGTH) not in {mask.shape for mask in seen}
    assert any(mask.min() == 0 for mask in seen)


def _forms(folder: Path) -> Forms:
    return forms_in(Workspace(folder), None)


@cache
def _samples(folder: Path) -> tuple[Batch, ...]:
    return prepare(Workspace(folder).source(), folder).ready.rows.calibration.batches


def _built(folder: Path) -> Built:
    def artifact(name: str) -> Artifact:
        return Artifact(folder / name, "onnx", "fp32", ("input_ids",), ("logits",), "", 0)

    return Built((ArtifactPair(exporter("onnx"), "fp32", artifact("model.onnx"), artifact("dense.onnx")),))


# recorded samples


def test_eight_samples_are_recorded_even_if_the_last_batch_is_short(tmp_path: Path) -> None:
    prepared = prepare(text_source())
    ready = prepared.ready
    assert ready.rows.held_out is not None
    (batch,) = ready.rows.held_out.batches
    parts = ({name: rows[:9, :12] for name, rows in batch.items()}, {name: rows[:1] for name, rows in batch.items()})
    rows = replace(ready.rows, held_out=Feeds(parts, (None,) * 10, "the tests"))
    store(ready.network, tmp_path / "model.onnx", "0" * 64)
    record_samples(Workspace(tmp_path), replace(prepared, ready=replace(ready, rows=rows)), ready.network)
    tensors = load_file(tmp_path / "samples.safetensors")
    assert {len(rows) for rows in tensors.values()} == {8}


# options


def test_an_engine_knows_its_precisions() -> None:
    assert {name: check_precision(exporter(name), None) for name in ("onnx", "torch", "trt")} == {
        "onnx": "fp32",
        "torch": "fp32",
        "trt": "fp16",
    }
    with pytest.raises(BadInput, match=r"int3.*'onnx'.*fp32"):
        check_precision(exporter("onnx"), "int3")


def test_every_engine_of_the_table_follows_the_protocol() -> None:
    for name in ENGINES:
        found = exporter(name)
        assert found.engine == name
        assert found.precisions
        for precision in found.precisions:
            assert precision in TOLERANCES
            names = found.file_names(precision)
            assert all(part is None or Path(part).name == part for part in names)
            assert len(set(names)) == 2


def test_image_points_have_no_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.measure_pair
    monkeypatch.setattr(measuring, "measure_pair", lambda *args, **options: real(*args, **options, blocks=2))
    source = Source(str(vit()), calibration=str(photos()))
    report = run_job(tmp_path / "out", source, dense=True, points=(Point(batch=2), Point(batch=1)))
    assert [(m.batch, m.seq_len) for m in report.latency] == [(2, None), (1, None)]
    with pytest.raises(BadInput, match="seq=999: the inputs of ViTForImageClassification have fixed sizes"):
        run_job(tmp_path / "other", source, dense=True, points=(Point(batch=1, seq=999),))


@pytest.mark.slow
def test_another_length_counts_other_macs_even_if_the_texts_are_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = [run_job(out, replace(text_source(), seq_len=length)).macs["dense"] for length in (32, 40, 32)]
    assert found[0] == found[2] < found[1]


def test_a_dense_artifact_of_an_earlier_run_goes_when_none_is_asked_for(finished: Path) -> None:
    from optin_deploy.jobs.folder_build import FolderBuild

    assert (finished / "dense.onnx").is_file()
    FolderBuild(finished).build(engine="onnx", dense=False)
    assert not (finished / "dense.onnx").exists()


@pytest.mark.usefixtures("by_torchscript")
def test_images_are_counted_and_exported_at_the_size_that_the_processor_makes(tmp_path: Path) -> None:
    """DINOv2 is built for one size and served at another."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=64, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    transformers.AutoImageProcessor.from_pretrained(vit()).save_pretrained(tmp_path / "dino")
    report = run_job(tmp_path / "out", Source(str(tmp_path / "dino"), calibration=str(photos())))
    size = transformers.AutoImageProcessor.from_pretrained(vit()).size["height"]
    assert size < 64
    assert optin_deploy.load(tmp_path / "out").config.inference_image_size == [size, size]
    assert report.macs["dense"] < 64 * 64 * 24 * 3 + 2 * 65 * (12 * 24**2 + 2 * 65 * 24)  # what 64 pixels would cost
