"""Tables and texts as people have them: any delimiter, Unicode, line end and length."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pytest

from optin_deploy.data import samples as samples_module
from optin_deploy.data import tables
from optin_deploy.data.samples import read_samples
from optin_deploy.errors import BadInput
from optin_deploy.files import opening as data_files
from support.tiny_files import write

TABLE = [("Schön, oder; nicht?", "3.5"), ("zwei\nZeilen", "1"), ("drei", "2")]


def table(delimiter: str, end: str = "\n") -> str:
    text = StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(
        [("label", "text"), *((b, a) for a, b in TABLE)]
    )
    return text.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_of_any_country_gives_the_same_rows(tmp_path: Path, delimiter: str, encoding: str) -> None:
    found = read_samples(write(tmp_path / "a.csv", table(delimiter).encode(encoding)))
    assert [(sample.text, str(sample.label)) for sample in found] == TABLE
    assert [sample.source.rpartition(":")[2] for sample in found] == ["2", "3", "5"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_wide_unicode_with_a_mark_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    content = "\ufeff" + ("zwölf\n€ 😀\n" if name == "a.txt" else '{"text": "zwölf"}\n{"text": "€ 😀"}\n')
    found = read_samples(write(tmp_path / name, content.encode(encoding)))
    assert [(sample.text, sample.source[-2:]) for sample in found] == [("zwölf", ":1"), ("€ 😀", ":2")]


def test_numbers_with_a_decimal_comma_are_numbers(tmp_path: Path) -> None:
    found = read_samples(write(tmp_path / "a.csv", "text;label\n1,5;3,5\nx;2,0\ny;a,b\nz;\n"))
    assert [(sample.text, sample.label) for sample in found] == [("1,5", "3.5"), ("x", 2), ("y", "a,b"), ("z", None)]
    (sample,) = read_samples(write(tmp_path / "b.csv", 'text,label\nx,"3,5"\n'))
    assert sample.label == "3,5"  # commas stand between the fields: it is a name


def test_the_delimiter_is_the_one_that_names_the_text_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;a, b\nx, y;1\n")
    assert [sample.text for sample in read_samples(path)] == ["x, y"]
    assert [sample.text for sample in read_samples(write(path, "text\nx; y\n"))] == ["x; y"]  # one column
    assert [sample.text for sample in read_samples(write(path, 'sep=;\n"text";"label"\nx;1\n'))] == ["x"]
    with pytest.raises(BadInput, match=r"a\.csv:3: no column 'text'.*'body, id'"):
        read_samples(write(path, "sep=;\nbody;id\nx;1\n"))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_lines_may_end_as_on_old_macs(tmp_path: Path, name: str) -> None:
    rows = {"a.txt": ["one", "two"], "a.csv": ["text", "one", "two"], "a.jsonl": ['{"text": "one"}', '{"text": "two"}']}
    found = read_samples(write(tmp_path / name, "\r".join(rows[name])))
    assert [sample.text for sample in found] == ["one", "two"]
    lone = read_samples(write(tmp_path / "b.txt", "a\rb\nc\n"))  # among other line ends it is a character
    assert [sample.text for sample in lone] == ["a\rb", "c"]


def test_long_fields_are_read(tmp_path: Path) -> None:
    long = "so, long " * 50_000
    path = write(tmp_path / "a.csv", f'text,label\n"{long}",1\n"{long[:-1]}\n{long}",2\n')
    assert [sample.text for sample in read_samples(path)] == [long, f"{long[:-1]}\n{long}"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_endless_lines_and_fields_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(data_files, "_CHUNK_BYTES", 64)
    first = '{"text": "x"}' if name == "a.jsonl" else "text"
    with pytest.raises(BadInput, match=rf"{name}:2: a line of more than"):
        read_samples(write(tmp_path / name, f"{first}\n{'x' * 300}\nz"))


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit()
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 0)
    try:
        csv.field_size_limit(1000)
        with pytest.raises(BadInput, match=r"a\.csv:3: not CSV: field larger.*never closed"):
            read_samples(write(tmp_path / "a.csv", 'text\none\n"two\n' + "three\n" * 1000))
    finally:
        csv.field_size_limit(before)


def test_more_rows_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_ROWS", 9)
    path = write(tmp_path / "a.txt", "x\n" * 9)
    assert len(read_samples(path)) == 9
    with pytest.raises(BadInput, match=r"a\.txt: more than 9 rows.*smaller file"):
        read_samples(write(path, "x\n" * 10))


@pytest.mark.parametrize(
    ("written", "label"),
    [("1", 1), ('"1"', 1), ("1.0", 1), ('" 1"', 1), ('"01"', "01"), ("true", 1), ('"true"', "true"), ("NaN", None),
     ("null", None), ('""', None), (f"1{'0' * 24}", f"1{'0' * 24}"), ("-0", 0), ("1e3", 1000)],
)  # fmt: skip
def test_labels_as_people_write_them(tmp_path: Path, written: str, label: str | int | None) -> None:
    (sample,) = read_samples(write(tmp_path / "a.jsonl", f'{{"text": "x", "label": {written}}}\n'))
    assert sample.label == label
