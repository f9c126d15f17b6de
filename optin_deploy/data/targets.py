"""What rows of published data sets tell beside a text: tags of words, answers in a text, what a search should find."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optin_deploy.data.tables import Row
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short

log = logging.getLogger(__name__)

Place = tuple[int, int] | None
"""Characters of a text that a token stands for, first and behind the last; None where it stands for none of them."""


@dataclass(frozen=True)
class Answers:
    """The right answers to a question about a text."""

    context: str
    texts: tuple[str, ...]
    """Each of them is right; none means that the text has no answer."""
    places: tuple[Place, ...] = ()
    """Characters of the context that each token of the row stands for."""


@dataclass(frozen=True)
class Role:
    """What a text is among the texts of an evaluation of embeddings."""

    number: int
    """Tells the text from the others."""
    positives: tuple[int, ...] = ()
    """Numbers of the texts that a search for this one should find."""
    candidate: bool = False
    """Whether searches may find it."""
    scores: tuple[tuple[int, float], ...] = ()
    """Numbers of other texts, and how alike people found both."""


@dataclass(frozen=True)
class Grade:
    """How well the second text of a pair fits the first, among all pairs of that query."""

    query: int
    """Tells the query from the others."""
    grade: float
    """0 where it does not fit."""


WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels")
"""Columns of words and their tags, where the named ones are absent."""
QUERY, POSITIVE, NEGATIVE = "query", "positive", "negative"
ONE, OTHER, SCORE = "sentence1", "sentence2", "score"
QUESTION, CONTEXT, ANSWERS = "question", "context", "answers"


def tagged_words(
    row: Mapping[str, object], text_column: str, label_column: str, source: str
) -> tuple[tuple[str, ...], tuple[str | int, ...] | None] | None:
    """Read the words of a row and the tag of each, as CoNLL's data sets give them; None: its text is no list of words.

    Raises: BadInput: not as many tags as words, or something else among them.
    """
    column = next((name for name in (text_column, *WORDS) if isinstance(row.get(name), list)), None)
    if column is None or (column != text_column and text_column in row):
        return None
    words, tags = row[column], next((row[name] for name in (label_column, *TAGS) if name in row), None)
    assert isinstance(words, list)
    if not words or not all(isinstance(each, str) and each.strip() for each in words):
        raise BadInput(f"{source}: {column!r} is {short(words)}: give a list of words, none of them blank.")
    if tags is None:
        return tuple(words), None
    if not isinstance(tags, list) or len(tags) != len(words) or not all(isinstance(each, str | int) for each in tags):
        raise BadInput(f"{source}: the tags are {short(tags)}, for {len(words)} words. Give one tag a word, in order.")
    return tuple(words), tuple(tags)


def answers_of(row: Mapping[str, object], source: str) -> Answers | None:
    """Read the answers of a row of a question and a text, as SQuAD writes them, or as a text or a list of texts.

    Returns: None where the row tells none.
    Raises: BadInput: they are something else.
    """
    given, context = row.get(ANSWERS, row.get("answer")), row[CONTEXT]
    if given is None or not isinstance(context, str):
        return None
    texts = given.get("text") if isinstance(given, Mapping) else given
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise BadInput(
            f"{source}: the answers are {short(given)}. Write a text, or a list, or {{'text': [...]}} as SQuAD does."
        )
    return Answers(context, tuple(each for each in texts if each.strip()))


def roles_of(rows: Iterable[Row]) -> Iterator[tuple[str, str, Role]]:
    """Read rows of a query with its positive, or of two texts with a score, as single texts with their roles.

    Returns: text, where it stands and role; a text that stands in several rows is given once, whatever its white space.
    Raises: BadInput: a row lacks one of them.
    """
    numbers: dict[str, int] = {}
    first: list[tuple[str, str]] = []
    positives: dict[int, list[int]] = {}
    scores: dict[int, list[tuple[int, float]]] = {}
    candidates: set[int] = set()
    alone: list[str] = []
    for source, row in rows:
        pair, scored = [], {ONE, OTHER, SCORE} <= set(row)
        for name in (ONE, OTHER) if scored else (QUERY, POSITIVE):
            text = row.get(name)
            if not isinstance(text, str) or not text.strip():
                raise BadInput(f"{source}: {name!r} is {short(text)}, not a text. Correct or delete that row.")
            pair.append(numbers.setdefault(same(text), len(numbers)))
            if len(numbers) > len(first):
                first.append((text, source))
        one, other = pair
        if scored:
            scores.setdefault(one, []).append((other, _score(row[SCORE], source)))
            continue
        candidates.add(other)
        if one == other:
            alone.append(source)
        else:
            positives.setdefault(one, []).append(other)
    for number, (text, source) in enumerate(first):
        found = (tuple(positives.get(number, ())), number in candidates, tuple(scores.get(number, ())))
        yield text, source, Role(number, *found)
    if alone:
        log.warning("%s: query and positive are one text, which does not count (%d rows)", alone[0], len(alone))


def same(text: str) -> str:
    """What texts that differ only in white space have in common."""
    return " ".join(text.split())


def _score(value: object, source: str) -> float:
    """Raises: BadInput: it is no finite number."""
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadInput(f"{source}: the score {short(value)} is no finite number. Correct or delete that row.")
    return found


def unlearned(labels: Sequence[Any], fresh: Sequence[bool]) -> Iterator[tuple[bool, Any]]:
    """Tell whether each row still judges, and as what, where rows that are not fresh calibrate too.

    A query does not, nor a ranking of which a pair calibrates; a text that is searched stays one, as an index holds it
    whatever calibrates, and so does the other text of a scored pair whose first one is fresh.
    """
    pairs = list(zip(labels, fresh, strict=True))
    gone = {label.query for label, new in pairs if isinstance(label, Grade) and not new}
    scored = {number for label, new in pairs if isinstance(label, Role) and new for number, _ in label.scores}
    for label, new in pairs:
        if isinstance(label, Grade):
            yield label.query not in gone, label
        elif not isinstance(label, Role) or new:
            yield new, label
        elif label.positives or label.scores:
            yield label.candidate or label.number in scored, replace(label, positives=(), scores=())
        else:
            yield label.candidate or label.number in scored, label


def graded_pairs(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, Grade]]:
    """Read rows of a query with the texts that fit it and those that do not, as pairs with their grades.

    Returns: query, text, where it stands and grade; rows with the same query are one list, in which a text that fits in
        one of them fits.
    Raises: BadInput: one of them is no text, or one side is empty.
    """
    queries: dict[str, int] = {}
    found: dict[tuple[int, str], tuple[str, str, str, Grade]] = {}
    for source, row in rows:
        (asked,), fitting, others = (_texts(row, name, source) for name in (QUERY, POSITIVE, NEGATIVE))
        query = queries.setdefault(same(asked), len(queries))
        for text, grade in [*((text, 1.0) for text in fitting), *((text, 0.0) for text in others)]:
            place = query, same(text)
            if place not in found or found[place][-1].grade < grade:
                found[place] = asked, text, source, Grade(query, grade)
    yield from found.values()


def _texts(row: Mapping[str, object], name: str, source: str) -> list[str]:
    """Raises: BadInput: there are none, or one is blank or no text."""
    given = row.get(name)
    texts = given if isinstance(given, list) and name != QUERY else [given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadInput(
            f"{source}: {name!r} is {short(given)}. Give `query` and lists of texts, `positive` and `negative`, none of"
            " them blank, to a cross-encoder; an embedder takes a row for each `query` and `positive`, both of them"
            " texts."
        )
    return [str(text) for text in texts]


def reranks(row: Mapping[str, object]) -> bool:
    """Is this a row of a query with lists of texts that fit it, and that do not?"""
    return QUERY in row and any(isinstance(row.get(name), list) for name in (POSITIVE, NEGATIVE))


def asks(row: Mapping[str, object]) -> bool:
    """Is this a row of a question about a text?"""
    return {QUESTION, CONTEXT} <= set(row)


def searches(row: Mapping[str, object]) -> bool:
    """Is this a row of two texts that embeddings should find near each other, or as near as a score says?"""
    return {QUERY, POSITIVE} <= set(row) or {ONE, OTHER, SCORE} <= set(row)
