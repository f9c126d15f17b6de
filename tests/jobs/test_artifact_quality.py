"""What is served is judged by its own outputs: int8 by hand, sizes that are padded, warnings, and what reports show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from scipy.stats import spearmanr

from optin_deploy.exporters.base import Artifact
from optin_deploy.feeds.rows import Feeds
from optin_deploy.jobs.sized_runs import misfit, run_rows
from optin_deploy.network.read_onnx import read_file
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.artifact_table import ArtifactQuality, artifact_warnings
from optin_deploy.runtimes.ort import OrtRuntime
from support import tiny_checkpoint as tiny

pytestmark = pytest.mark.usefixtures("by_torchscript")


@pytest.fixture(scope="module")
def int8_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A cut encoder in int8, judged by pairs of sentences with scores."""
    folder, rng = tmp_path_factory.mktemp("int8"), random.Random(3)
    words = tiny.WORDS.split()
    rows = [
        {name: " ".join(rng.sample(words, 4)) for name in ("sentence1", "sentence2")} | {"score": i / 40}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*tiny.text_options(tiny.lines(), folder / "out"), "--eval", folder / "rows.jsonl", "--precision", "int8"]
    with pytest.MonkeyPatch.context() as patch:
        assert tiny.run("optin-export", tiny.bert(), *options, monkeypatch=patch) == 0
    return folder / "out", rows


def by_hand(path: Path, rows: list[dict[str, Any]]) -> float:
    """Spearman's correlation of the scores with the cosines, text by text."""
    session, tokenizer = onnxruntime.InferenceSession(path), transformers.AutoTokenizer.from_pretrained(tiny.bert())

    def embedding(text: str) -> np.ndarray:
        encoding = tokenizer(text, truncation=True, max_length=tiny.SEQ_LEN, return_tensors="np")
        fed = {each.name: encoding[each.name] for each in session.get_inputs()}
        vector = session.run(["last_hidden_state"], fed)[0][0].mean(0)
        return vector / np.linalg.norm(vector)

    cosines = [float(embedding(row["sentence1"]) @ embedding(row["sentence2"])) for row in rows]
    return float(spearmanr([row["score"] for row in rows], cosines).statistic)


def test_an_int8_artifact_is_judged_beside_the_float32_networks(int8_job: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = int8_job
    report = json.loads((out / "report.json").read_text())
    found = {(row["precision"], row["which"]): row for row in report["artifacts"]}
    names = {
        ("fp32", "dense"): "dense.onnx",
        ("fp32", "pruned"): "model.onnx",
        ("int8", "dense"): "dense.int8.onnx",
        ("int8", "pruned"): "model.int8.onnx",
    }
    assert list(found) == list(names)
    figures = {kind: by_hand(out / name, rows) for kind, name in names.items()}
    assert len({round(figure, 2) for figure in figures.values()}) > 2, "the figures tell the files apart"
    for kind, figure in figures.items():
        quality = found[kind]["quality"]
        assert (quality["metric"], quality["samples"]) == ("spearman", 40)
        assert quality["pruned"] == pytest.approx(figure, abs=0.01)  # rows are padded
        assert quality["dense"] == pytest.approx(figures["fp32", "dense"], abs=0.01)
    assert report["quality"] == found["int8", "pruned"]["quality"]


def test_every_page_shows_the_table(
    int8_job: tuple[Path, list[dict[str, Any]]], tmp_path: Path, shell: tiny.Shell
) -> None:
    out = tiny.copy_of(int8_job[0], tmp_path / "work")
    report = json.loads((out / "report.json").read_text())
    assert shell("optin", "report", out).code == 0
    pages = [
        shell("optin", "show", out).out,
        shell("optin", "push", out, "my-org/smaller", "--dry-run").out,
        (out / "report.html").read_text(),
    ]
    (speed,) = [row["speedup"] for row in report["latency"] if row["dense_precision"] == "fp32"]
    for page in pages:
        line = next(line for line in page.splitlines() if "int8 pruned, onnx" in line)
        assert f"{report['quality']['pruned']:.4f}" in line
        assert f"{speed:.2f}x at 1 x 16" in line
        assert "fp32 dense, torch" in page
    del report["artifacts"]  # as earlier versions wrote it
    (out / "report.json").write_text(json.dumps(report))
    assert shell("optin", "report", out).code == 0
    assert "fp32 dense, torch" not in (out / "report.html").read_text()


def test_what_is_built_later_is_judged_too(
    int8_job: tuple[Path, list[dict[str, Any]]], tmp_path: Path, shell: tiny.Shell
) -> None:
    out = tiny.copy_of(int8_job[0], tmp_path / "work")
    report = (out / "report.json").read_bytes()
    again = shell("optin", "build", out, "--engine", "onnx", "--precision", "int8")
    rows = [line for line in again.out.splitlines() if "int8 pruned, onnx" in line]
    assert (again.code, len(rows)) == (0, 1)
    assert f"{json.loads(report)['quality']['pruned']:.4f}" in rows[0]
    assert (out / "report.json").read_bytes() == report
    assert "points lost" not in shell("optin", "build", out, "--engine", "onnx").out
    source = json.loads((out / "source.json").read_text())
    (out / "source.json").write_text(json.dumps({**source, "evaluation": str(tmp_path / "gone.jsonl")}))
    elsewhere = shell("optin", "build", out, "--engine", "onnx", "--precision", "fp16")
    assert elsewhere.code == 0
    assert f"The artifacts were not judged: {tmp_path / 'gone.jsonl'}" in elsewhere.out


def test_rows_are_padded_to_the_sizes_of_an_artifact(int8_job: tuple[Path, list[dict[str, Any]]]) -> None:
    path = int8_job[0] / "dense.onnx"
    network = read_file(path)
    shapes = ((1, 4), (4, 12), (8, 16))
    artifact = Artifact(path, "onnx", "fp32", (), (), "", 0, shapes=shapes)
    seen = []

    class Fixed(OrtRuntime):
        """Takes the sizes of the artifact alone."""

        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            seen.append({value.shape for value in feeds.values()})
            return super().run(feeds)

    ids = torch.randint(5, 60, (7, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with Fixed(path) as runtime, OrtRuntime(path) as plain:
        found = run_rows(runtime, artifact, network, batch)["last_hidden_state"].numpy()
        expected = plain.run({name: value.numpy() for name, value in batch.items()})["last_hidden_state"]
    assert seen == [{(4, 12)}, {(4, 12)}]
    real = mask.numpy().astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    longer = {name: torch.ones(1, 17, dtype=torch.int64) for name in batch}
    rows = [Feeds((some,), (None,) * len(some["input_ids"]), "rows") for some in (batch, longer)]
    assert misfit(artifact, network, rows[0]) is None
    assert misfit(artifact, network, rows[1]) == "it takes 16 tokens at most, and they have 17"


def test_an_artifact_that_loses_clearly_more_than_the_cut_is_told() -> None:
    def row(precision: str, which: Any, accuracy: float) -> ArtifactQuality:
        return ArtifactQuality("onnx", precision, which, Quality("accuracy", 0.9, accuracy, 100))

    rows = [row("fp32", "dense", 0.9), row("fp32", "pruned", 0.88), row("int8", "dense", 0.88)]
    assert not artifact_warnings(rows), "two rows of a hundred are no clear margin"
    (line,) = artifact_warnings([*rows, row("int8", "pruned", 0.85)])
    assert line.startswith("In int8 on onnx the pruned model loses 5.00 points, in float32 2.00.")
