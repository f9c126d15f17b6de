"""Pairs of texts: read from the column that is named, told where one is left unused, and not served as single texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import transformers

from optin_deploy.checkpoint.smaller import MANIFEST, read_saved
from optin_deploy.data.samples import read_samples
from optin_deploy.errors import BadInput
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.pruning.source import Source
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.shipping import ship_folder
from support import tiny_checkpoint as tiny
from support.tiny_checkpoint import Shell

ROWS = [(first, second) for first, second in zip(tiny.texts(), reversed(tiny.texts()), strict=True) if first != second]


def table(path: Path, first: str = "premise", second: str = "hypothesis") -> Path:
    """ROWS as .jsonl or .csv."""
    if path.suffix == ".csv":
        lines = [f"{first},{second}", *(f'"{a}","{b}"' for a, b in ROWS)]
    else:
        lines = [json.dumps({first: a, second: b}) for a, b in ROWS]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_pairs_are_read_from_the_column_that_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = table(tmp_path / name)
    rows = read_samples(path, text_column="premise", pair_column="hypothesis")
    assert [(row.text, row.text_pair) for row in rows] == ROWS
    source = Source(
        str(tiny.bert()), calibration=str(path), text_column="premise", pair_column="hypothesis", seq_len=16
    )
    prepared = prepare(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert())
    expected = {tuple(tokenizer(*row, truncation=True, max_length=16)["input_ids"]) for row in ROWS}
    found = {tuple(row.tolist()) for batch in prepared.ready.rows.calibration.batches for row in batch["input_ids"]}
    assert found <= expected
    assert prepared.ready.rows.pairs
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(("premise", "hypothesis"), ("hypothesis", "premise"), ("sentence1", "sentence2"), ("question1", "question2")),
        *(("question", "answer"), ("query", "passage"), ("text", "text2"), ("text", "Hypothesis"), ("body", "text_b")),
    ],
)
def test_a_well_known_second_column_that_is_not_read_is_told(
    first: str, second: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = read_samples(table(tmp_path / "a.jsonl", first, second), text_column=first)
    assert all(row.text_pair is None for row in rows)
    assert f"column '{second}' may be the second text of pairs" in caplog.text
    assert f"--pair-column {second}" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("row", [{"text": "a", "id": "7"}, {"text": "a", "hypothesis": 3}, {"text": "a", "answer": ""}])
def test_other_columns_are_not_told_of(
    row: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read_samples(tmp_path / "a.jsonl")[0].text_pair is None
    assert not caplog.text


def test_a_pair_column_that_is_not_there_or_the_text_itself_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.jsonl")
    with pytest.raises(BadInput, match=r"a\.jsonl:1: no column 'second'.*premise, hypothesis.*--pair-column"):
        read_samples(path, text_column="premise", pair_column="second")
    with pytest.raises(BadInput, match="--pair-column 'premise' is the column of the first text too"):
        read_samples(path, text_column="premise", pair_column="premise")
    (tmp_path / "b.jsonl").write_text('{"premise": "a", "hypothesis": 7}')
    with pytest.raises(BadInput, match=r"b\.jsonl:1: 'hypothesis' is 7, not a string"):
        read_samples(tmp_path / "b.jsonl", text_column="premise", pair_column="hypothesis")


@pytest.mark.parametrize("program", ["optin score", "optin-export"])
def test_every_command_that_reads_texts_takes_the_pair_column(program: str, shell: Shell, tmp_path: Path) -> None:
    path, out = table(tmp_path / "a.jsonl"), tmp_path / "out"
    columns = ["--text-column", "premise", "--pair-column", "hypothesis"]
    flags = ["--calibration", path, *columns, "--seq-len", tiny.SEQ_LEN, "--out", out]
    whole = [] if program == "optin score" else ["--align", 8, "--engine", "torch", "--no-dense"]
    ran = shell(*program.split(), tiny.bert(), *flags, *whole)
    assert ran.code == 0, ran.err
    assert "may be the second text" not in ran.err
    assert Workspace(out).source().pair_column == "hypothesis"
    if whole:
        assert read_saved(out / "model")[0].about["text_pairs"] is True


def test_a_model_of_pairs_is_not_shipped_as_one_of_single_texts(finished: Path, shell: Shell, tmp_path: Path) -> None:
    assert read_saved(finished / "model")[0].about["text_pairs"] is False
    order = ShipOrder("triton", tmp_path / "repo", "tiny", text=True)
    ship_folder(finished, order, dry_run=True)
    manifest = finished / "model" / MANIFEST
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "about": {**data["about"], "text_pairs": True}}))
    with pytest.raises(BadInput, match=r"--text: tiny takes pairs of texts.*Leave out --text"):
        ship_folder(finished, order, dry_run=True)


def test_a_second_text_that_the_first_row_lacks_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "hypothesis": ""}\n{"text": "two", "hypothesis": "three"}\n')
    read_samples(path)
    assert "column 'hypothesis' may be the second text" in caplog.text
