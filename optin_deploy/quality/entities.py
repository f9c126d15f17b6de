"""F1 of named entities: a span counts where its ends and its kind are both right, as CoNLL's evaluation has it.

Source: Tjong Kim Sang and De Meulder, CoNLL-2003 (arXiv cs/0306050); tags as Ramshaw and Marcus, 1995.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[str, int, int]
"""Kind, first position and position behind the last."""
OUTSIDE = "O"
"""Tag of what is no part of an entity."""
TAG = re.compile(r"(?:[BIES]-(?P<kind>.+)|O)")


def tags_spans(names: Sequence[str]) -> bool:
    """Whether the classes are tags of spans, such as O, B-PER and I-PER."""
    return any("-" in name for name in names) and all(TAG.fullmatch(name) for name in names)


def spans(tags: Sequence[str]) -> set[Span]:
    """Entities of a row of tags; one begins at B- and S-, and where the kind changes, and ends behind E- and S-."""
    found: set[Span] = set()
    kind, start = "", 0
    last = "O"
    for place, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (mark in "OBS" or now != kind or last in "ES"):
            found.add((kind, start, place))
            kind = ""
        if mark != "O" and not kind:
            kind, start = now, place
        last = mark
    return found


def entity_f1(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 over all rows together; 1 where there are no entities at all.

    Args: tags of each row's words.
    """
    right = total = 0
    for one, other in zip(wanted, found, strict=True):
        known, predicted = spans(one), spans(other)
        right, total = right + len(known & predicted), total + len(known) + len(predicted)
    return 2 * right / total if total else 1.0
