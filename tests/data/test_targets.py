"""Rows of published data sets: queries with texts that fit them, and that do not; and which of them judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.data.halves import split
from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.data.targets import Grade, Role
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
        {"query": ["q"], "positive": ["p"], "negative": ["n"]},
    ],
)
def test_rankings_without_texts_on_both_sides_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.jsonl:1: .*Give `query` and lists of texts.*an embedder takes a row for"):
        read_samples(written(tmp_path / "a.jsonl", [row]))


def test_a_query_of_several_rankings_is_one_and_what_fits_in_one_row_fits(tmp_path: Path) -> None:
    rows = [
        {"query": "q  a", "positive": ["p"], "negative": ["n", "m", "r"]},
        {"query": "other", "positive": ["p"], "negative": ["n"]},
        {"query": "q a", "positive": ["r"], "negative": ["n", " n ", "p", "s"]},
    ]
    found = distinct(read_samples(written(tmp_path / "a.jsonl", rows)))
    lists: dict[int, dict[str, float]] = {}
    for each in found:
        assert isinstance(each.label, Grade)
        lists.setdefault(each.label.query, {})[str(each.text_pair)] = each.label.grade
    assert list(lists.values()) == [{"p": 1, "n": 0, "m": 0, "r": 1, "s": 0}, {"p": 1, "n": 0}]
    assert len(distinct([Sample(text="q", text_pair="n", label=Grade(query, 0)) for query in (0, 1, 0)])) == 2


# ---- searches and scored pairs


def test_texts_of_searches_are_told_apart_as_repeats_are(tmp_path: Path) -> None:
    """By their words: a text written in two ways is one, so that no query loses its text to `distinct`."""
    rows = [{"query": f"q{i} a", "positive": "p  b" if i % 2 else "p b "} for i in range(4)]
    rows += [{"query": "q0  a", "positive": "r"}]
    found = distinct(read_samples(written(tmp_path / "a.jsonl", rows)))
    roles = {each.text: each.label for each in found}
    assert all(isinstance(role, Role) for role in roles.values())
    known = {role.number for role in roles.values() if isinstance(role, Role) and role.candidate}
    wanted = [role.positives for role in roles.values() if isinstance(role, Role) and role.positives]
    assert (len(roles), len(known)) == (6, 2)
    assert sorted(map(len, wanted)) == [1, 1, 1, 2]
    assert all(set(each) <= known for each in wanted)


def test_a_query_does_not_want_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"query": "a", "positive": "b"}, {"query": "c", "positive": " c"}, {"query": "a", "positive": "a"}]
    found = [each.label for each in read_samples(written(tmp_path / "a.jsonl", rows))]
    assert found == [Role(0, (1,), candidate=True), Role(1, candidate=True), Role(2, candidate=True)]
    assert "a.jsonl:2: query and positive are one text, which does not count (2 rows)" in caplog.text


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "-inf", "nan", "high", "0,5", True, None])
def test_scores_are_finite_numbers(score: object, tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": each} for each in (1, "2.5", score)]
    with pytest.raises(BadInput, match=r"a\.jsonl:3: the score .* is no finite number"):
        read_samples(written(tmp_path / "a.jsonl", rows))


def test_scores_may_have_decimal_commas_where_labels_may(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence1;sentence2;score\na;b;0,5\na;c;-1,25\n")
    assert read_samples(tmp_path / "a.csv")[0].label == Role(0, scores=((1, 0.5), (2, -1.25)))
    (tmp_path / "b.csv").write_text('sentence1,sentence2,score\na,b,"1,000"\n')
    with pytest.raises(BadInput, match=r"b\.csv:2: the score '1,000' is no finite number"):
        read_samples(tmp_path / "b.csv")


def test_a_score_beside_a_search_is_not_read(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": "b", "score": 1.0}]
    found = read_samples(written(tmp_path / "a.jsonl", rows))
    assert [each.label for each in found] == [Role(0, (1,)), Role(1, candidate=True)]


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
