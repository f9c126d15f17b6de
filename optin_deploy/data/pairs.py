"""The second text of a row: in the column that is named, or a warning where a well-known one is left unused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from optin_deploy.errors import BadInput

PAIR_COLUMN = "text_pair"
"""Read where a table has it; any other name must be there."""
TEXT_PAIRS = "text_pairs"
"""Entry in the report of a cut model that says whether it was calibrated or judged on pairs of texts."""
SECOND_TEXTS = (
    *("hypothesis", "sentence2", "sentence_2", "question2", "text_pair", "text2", "text_2", "text_b", "sentence_b"),
    *("passage", "answer", "context", "document", "response", "paragraph", "evidence", "positive"),
    *("premise", "sentence1", "sentence_1", "question1", "text1", "text_1", "text_a", "sentence_a"),
    *("question", "query", "claim", "sentence"),
)
"""Columns of published pair data sets, those first that hold the second text."""


def check_pair_column(pair_column: str, text_column: str) -> None:
    """Refuse one column for both texts.

    Raises: BadInput.
    """
    if pair_column == text_column != PAIR_COLUMN:
        raise BadInput(
            f"--pair-column {pair_column!r} is the column of the first text too. Name two different columns."
        )


def has_pair(row: Mapping[str, object], text_column: str, pair_column: str) -> bool:
    """Does a row have a second text?"""
    return pair_column != text_column and row.get(pair_column) not in (None, "")


def unused_pair(row: Mapping[str, object], used: Iterable[str]) -> str | None:
    """A column that holds the second text of a pair by its name; None: there is none beside the columns `used`."""
    texts = {name for name, value in row.items() if isinstance(value, str) and value.strip()} - set(used)
    by_name = {name.strip().lower(): name for name in texts}
    return next((by_name[name] for name in SECOND_TEXTS if name in by_name), None)
