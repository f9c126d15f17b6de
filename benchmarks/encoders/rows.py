"""What encoders learn from and are judged by, made from packages: news, newswire, letters with made-up personal data.

Each function writes rows that calibrate and rows that judge, and returns both paths. No article is in both, and models
that are trained here learn from neither (the embedder learns from the texts that calibrate).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.data import bbc_headlines
from benchmarks.tasks.text import R8, orange_rows
from benchmarks.zoo.material import CITIES, GIVEN, STREETS, SURNAMES
from optin_deploy.files.storage import write_text

Paths = tuple[Path, Path]
Row = Mapping[str, Any]
Article = tuple[str, str]
"""Headline and body."""
SEARCHES, JUDGING, CALIBRATING = 1000, 400, 300
"""Articles that judge embeddings, articles that judge pairs, and articles that calibrate pairs."""
OFFERED = 10
"""Bodies that are offered for a headline, the right one among them."""
BODY_WORDS, CONTEXT_WORDS = 70, 80
"""Words of a body, and around an answer."""
QUESTIONS = 6
"""Most questions of one article."""
NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*")
"""One or more words with capitals inside of a sentence."""
GAP = "[MASK]"
"""Stands in a question for what is asked."""


@cache
def articles() -> tuple[Article, ...]:
    """The news in an order of their own, of those that begin alike only one."""
    found = bbc_headlines()
    Random(0).shuffle(found)
    return tuple({_beginning(body): (title, body) for title, body in found}.values())


def _beginning(body: str) -> str:
    return " ".join(body.split()[:BODY_WORDS])


def searches(out: Path, _: Path, queries: int = SEARCHES) -> Paths:
    """Headlines, each with its article, which is looked for among those of all queries."""
    judging, others = articles()[:queries], articles()[SEARCHES:]
    texts = ({"text": text} for article in others for text in article)
    return _written(out, texts, ({"query": title, "positive": body} for title, body in judging))


def rankings(out: Path, _: Path) -> Paths:
    """Headlines, each with its article and nine others that share the most words with it."""
    judging, others = articles()[:JUDGING], articles()[JUDGING : JUDGING + CALIBRATING]
    pairs = ({"text": title, "text_pair": body} for title, bodies in offered(others) for body in bodies[:4])
    rows = ({"query": title, "positive": bodies[:1], "negative": bodies[1:]} for title, bodies in offered(judging))
    return _written(out, pairs, rows)


def offered(some: Iterable[Article]) -> list[tuple[str, list[str]]]:
    """Headlines with the beginning of their body, then of those bodies that are most like the headline."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles, bodies = zip(*((title, _beginning(body)) for title, body in some), strict=True)
    words = TfidfVectorizer(stop_words="english")
    alike = (words.fit_transform([*bodies, *titles])[len(bodies) :] @ words.transform(bodies).T).toarray()
    np.fill_diagonal(alike, np.inf)
    order = np.argsort(-alike, axis=1, kind="stable")[:, :OFFERED]
    return [(title, [bodies[place] for place in row]) for title, row in zip(titles, order, strict=True)]


def answers(out: Path, _: Path) -> Paths:
    """Sentences with a gap, each with a part of the same article in which what is missing stands too."""
    judging = [row for article in articles()[:JUDGING] for row in questions(article)[:2]]
    others = [row for article in articles()[JUDGING : JUDGING + CALIBRATING] for row in questions(article)]
    return _written(out, ({name: row[name] for name in ("question", "context")} for row in others), judging)


def questions(article: Article) -> list[dict[str, Any]]:
    """Questions about an article: a sentence without one of its names, and words around another place of that name
    (cloze questions as of Hermann et al., Teaching Machines to Read and Comprehend, 2015, arXiv 1506.03340)."""
    sentences = re.split(r"(?<=[.!?]) ", article[1])
    draw, found, seen = Random(article[0]), [], set[str]()
    for place in draw.sample(range(len(sentences)), len(sentences)):
        rest = " ".join(sentences[:place] + sentences[place + 1 :])
        names = [name for name in NAME.findall(sentences[place]) if name not in seen and name in rest]
        if not names or len(sentences[place].split()) > CONTEXT_WORDS / 2:
            continue
        name = max(names, key=len)
        seen.add(name)
        context = _around(rest, name, draw)
        question = sentences[place].replace(name, GAP, 1)
        found.append(
            {
                "question": question,
                "context": context,
                "answers": {"text": [name], "answer_start": [context.index(name)]},
            }
        )
    return found[:QUESTIONS]


def _around(text: str, name: str, draw: Random) -> str:
    """Words of a text in which a name stands, at a random place."""
    before, after = text[: text.index(name)].split(), text[text.index(name) :].split()
    first = draw.randrange(CONTEXT_WORDS - len(name.split()))
    return " ".join(before[max(0, len(before) - first) :] + after[: CONTEXT_WORDS - first])


def labels(out: Path, cache: Path) -> Paths:
    """Newswire, whose topics are given as lists."""
    teaching, judging = topics(cache)
    return _written(out, ({"text": row["text"]} for row in teaching[: R8.calibration]), judging[: R8.test])


def topics(cache: Path) -> tuple[list[Row], list[Row]]:
    """Rows of both parts of R8, no text twice; of the first one those that calibrate stand first."""
    seen = set[str]()
    parts: list[list[Row]] = []
    for part in ("train", "test"):
        rows = orange_rows(cache, "reuters-r8", part, R8.classes)
        Random(R8.seed).shuffle(rows)
        parts.append([])
        for row in rows:
            if row.text and row.text not in seen:
                seen.add(row.text)
                parts[-1].append({"text": row.text, "label": [R8.classes[int(str(row.label))]]})
    return parts[0], parts[1]


LETTERS = (
    "My name is {GIVEN_NAME} {SURNAME} and I live at {BUILDING_NUMBER} {STREET_NAME} , {CITY} .",
    "Please call {GIVEN_NAME} on {PHONE} before Friday .",
    "Send the invoice to {EMAIL} , not to the office in {CITY} .",
    "The passport {PASSPORT} was issued to {GIVEN_NAME} {SURNAME} last year .",
    "Her bank account is {BANK_ACCOUNT} ; the routing number is {ROUTING_NUMBER} .",
    "{GIVEN_NAME} moved from {CITY} to {BUILDING_NUMBER} {STREET_NAME} , zip code {ZIP_CODE} .",
    "See {URL} for what {GIVEN_NAME} {SURNAME} wrote .",
    "The social security number {TAX_ID} belongs to our tenant , Mr {SURNAME} .",
    "We met in {CITY} and talked about the weather for an hour .",
    "The driver's license {DRIVERS_LICENSE} expires soon , said {GIVEN_NAME} .",
)
"""Sentences whose gaps are called by what stands in them."""


def entities(out: Path, _: Path) -> Paths:
    """Letters of two or three sentences; names of people and places that judge are not those that calibrate."""
    teaching = ({"text": " ".join(row["tokens"])} for row in _letters(Random(0), 1024, 0))
    return _written(out, teaching, _letters(Random(1), 1000, 1))


def _letters(draw: Random, count: int, half: int) -> Iterator[dict[str, Any]]:
    def digits(many: int) -> str:
        return "".join(draw.choice("0123456789") for _ in range(many))

    def one(values: tuple[str, ...]) -> str:
        return draw.choice(values[half::2])

    def filled(name: str) -> str:
        site = draw.choice(("mail", "acme", "example", "northwind"))
        return {
            "GIVEN_NAME": one(GIVEN),
            "SURNAME": one(SURNAMES),
            "CITY": one(CITIES),
            "STREET_NAME": one(STREETS),
            "BUILDING_NUMBER": str(draw.randrange(1, 400)),
            "PHONE": f"{digits(3)}-{digits(3)}-{digits(4)}",
            "EMAIL": f"{one(GIVEN)}.{one(SURNAMES)}@{site}.com",
            "URL": f"https://www.{site}.org/{one(GIVEN)}",
            "PASSPORT": f"{draw.choice('ABCX')}{digits(8)}",
            "DRIVERS_LICENSE": f"{draw.choice('ABCX')}{digits(8)}",
            "BANK_ACCOUNT": digits(10),
            "ROUTING_NUMBER": digits(9),
            "ZIP_CODE": digits(5),
            "TAX_ID": f"{digits(3)}-{digits(2)}-{digits(4)}",
        }[name]

    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for word in " ".join(draw.sample(LETTERS, draw.randrange(2, 4))).split():
            parts = filled(word[1:-1]).split() if word.startswith("{") else [word]
            words += parts
            tags += [f"{'BI'[place > 0]}-{word[1:-1]}" if word.startswith("{") else "O" for place in range(len(parts))]
        yield {"tokens": words, "ner_tags": tags}


def _written(out: Path, calibrating: Iterable[Row], judging: Iterable[Row]) -> Paths:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("calibration", calibrating), ("evaluation", judging)):
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return out / "calibration.jsonl", out / "evaluation.jsonl"
