"""Rows of published data sets: queries with texts that fit them, and that do not; and which of them judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.data.halves import split
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.data.targets import Grade
from optin_deploy.errors import BadInput


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_rankings_are_read_as_pairs(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": [f"p{i}"], "negative": ["n", f"m{i}"]} for i in range(3)]
    found = read_samples(written(tmp_path / "a.jsonl", rows))
    assert [(each.text, each.text_pair) for each in found[:4]] == [
        ("q0", "p0"),
        ("q0", "n"),
        ("q0", "m0"),
        ("q1", "p1"),
    ]
    labels = [each.label for each in found]
    assert all(isinstance(each, Grade) for each in labels)
    assert [each.grade for each in labels if isinstance(each, Grade)] == [1.0, 0.0, 0.0] * 3
    queries = [each.query for each in labels if isinstance(each, Grade)]
    assert len(set(queries)) == 3
    assert queries == sorted(queries)
    one = read_samples(written(tmp_path / "b.jsonl", [{"query": "q", "positive": "p", "negative": ["n"]}]))
    assert [each.text_pair for each in one] == ["p", "n"]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": [], "negative": ["n"]},
        {"query": "q", "positive": ["p"]},
        {"query": "q", "positive": ["p"], "negative": [" "]},
        {"query": "q", "positive": ["p"], "negative": [3]},
        {"query": 3, "positive": ["p"], "negative": ["n"]},
    ],
)
def test_rankings_without_texts_on_both_sides_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.jsonl:1: .*Give `query` and lists of texts"):
        read_samples(written(tmp_path / "a.jsonl", [row]))


# ---- which rows judge


def halves_of(samples: Sequence[Sample], limit: int = 512, seed: int = 0) -> tuple[set[str], set[str]]:
    first, second = split(samples, samples_limit=limit, seed=seed)
    assert (first, second) == split(samples, samples_limit=limit, seed=seed)
    return tuple({f"{each.text} {each.text_pair or ''}".strip() for each in half} for half in (first, second))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("queries", "limit", "learned", "held_out"), [(1000, 512, 512, 128), (500, 2000, 800, 200), (100, 24, 24, 32)]
)
def test_a_query_is_held_out_with_its_text(
    queries: int, limit: int, learned: int, held_out: int, tmp_path: Path
) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(queries)]
    first, second = halves_of(read_samples(written(tmp_path / "a.jsonl", rows)), limit)
    assert (len(first), len(second)) == (learned, held_out)
    assert not first & second
    assert {text[1:] for text in second if text[0] == "q"} == {text[1:] for text in second if text[0] == "p"}
    assert halves_of(read_samples(tmp_path / "a.jsonl"), limit, seed=1)[1] != second


def test_texts_of_queries_in_both_halves_calibrate_and_are_searched(tmp_path: Path) -> None:
    """A few answers to many questions; and pairs that stand there both ways, where no query may calibrate."""
    rows = [{"query": f"q{i}", "positive": f"p{i % 10}"} for i in range(100)]
    first, second = halves_of(read_samples(written(tmp_path / "a.jsonl", rows)))
    assert {f"p{int(text[1:]) % 10}" for text in second if text[0] == "q"} == {t for t in second if t[0] == "p"}
    assert len({text for text in first if text[0] == "p"}) == 10
    assert not {text for text in first & second if text[0] == "q"}
    assert len([text for text in second if text[0] == "q"]) == 16
    pairs = [(f"a{i}", f"b{i}") for i in range(100)]
    both = [{"query": one, "positive": other} for a, b in pairs for one, other in ((a, b), (b, a))]
    first, second = halves_of(read_samples(written(tmp_path / "b.jsonl", both)))
    assert {text[1:] for text in second if text[0] == "a"} == {text[1:] for text in second if text[0] == "b"}
    assert len(second) == 40
    assert len(second - first) >= 20  # one of each pair is a query that nothing learned from


def test_scored_pairs_and_rankings_are_held_out_as_they_are(tmp_path: Path) -> None:
    scored = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(100)]
    first, second = halves_of(read_samples(written(tmp_path / "a.jsonl", scored)))
    assert (len(first), len(second)) == (160, 40)
    assert {text[1:] for text in first}.isdisjoint(text[1:] for text in second)
    lists = [{"query": f"q{i}", "positive": ["p"], "negative": [f"n{k}" for k in range(9)]} for i in range(100)]
    first, second = halves_of(read_samples(written(tmp_path / "b.jsonl", lists)))
    assert (len(first), len(second)) == (512, 160)  # 16 queries
    assert {text.split()[0] for text in first}.isdisjoint(text.split()[0] for text in second)
    assert len({text.split()[0] for text in second}) == 16


def test_one_query_alone_is_split_as_texts_are(tmp_path: Path) -> None:
    rows = [{"query": "q", "positive": f"p{i}"} for i in range(39)]
    samples = read_samples(written(tmp_path / "a.jsonl", rows))
    first, second = halves_of(samples)
    assert (len(first), len(second)) == (32, 8)
    plain = [Sample(text=each.text) for each in samples]
    assert halves_of(plain) == (first, second)
