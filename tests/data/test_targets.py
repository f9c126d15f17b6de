"""Rows of published data sets: a query with lists of texts that fit it, and that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.data.samples import read_samples
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
