"""Rows of tables as users have them: JSON lines, and CSV of any country."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import MAX_LINE_BYTES, short

DELIMITERS = (",", ";", "\t", "|")
"""Delimiters of CSV. Where the comma is the decimal sign, spreadsheets write semicolons."""

Row = tuple[str, Mapping[str, object]]
"""A row's place (file:line), and its values by column."""


def jsonl_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """One JSON object a line; blank lines are left out.

    Raises: BadInput: names the line.
    """
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as err:
            raise BadInput(
                f"{path}:{number}: not a JSON object: {short(line.strip())} ({err}). Each line must be one, such as"
                ' {"text": "...", "label": 1}; correct or delete that line.'
            ) from err
        yield f"{path}:{number}", row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {short(_repeated(name for name, _ in pairs))} stands twice in it")
    return found


def csv_rows(
    path: Path, lines: Iterable[tuple[int, str]], column: str, number_columns: Collection[str]
) -> Iterator[Row]:
    """Rows of a CSV file by the names in its first line.

    Args:
        column: a name that the first line should hold: what stands between the names is told by it.
        number_columns: where a number may have a decimal comma, if commas are not what stands between fields.
    Raises: BadInput: names the line where the record begins.
    """
    # One limit for the process: it is only raised, so that other users of the csv module are not refused anything.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return
    named = re.fullmatch(r"sep=([,;|\t])[\r\n]*", first[1])  # tells Excel the delimiter, and is no row
    delimiter = named[1] if named else _delimiter(first[1], column)
    skipped = first[0] if named else first[0] - 1
    reader = csv.reader(
        (line for _, line in (lines if named else chain([first], lines))), strict=True, delimiter=delimiter
    )
    header: list[str] = []
    start = skipped + 1  # of the record, which may span several lines
    try:
        for fields in reader:
            source, start = f"{path}:{start}", skipped + reader.line_num + 1
            if not header:
                header = [name.strip() for name in fields]
                _check_header(header, source)
            elif fields:
                if len(fields) != len(header):
                    raise BadInput(
                        f"{source}: {len(fields)} fields, but the first line names {len(header)} columns"
                        f" ({', '.join(header)}). Put double quotes around a text that contains {_NAMES[delimiter]}."
                    )
                row = dict(zip(header, fields, strict=True))
                for name in number_columns if delimiter != "," else ():
                    if _DECIMAL.fullmatch(row.get(name, "")):
                        row[name] = row[name].replace(",", ".")
                yield source, row
    except csv.Error as err:
        raise BadInput(
            f"{path}:{start}: not CSV: {err}. Put double quotes around a text that contains {_NAMES[delimiter]}, quotes"
            " or line breaks, and double each quote inside it; a quote that is never closed runs to the end."
        ) from err


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_DECIMAL = re.compile(r"\s*[+-]?\d+,\d+\s*")


def _delimiter(line: str, column: str) -> str:
    """The first that makes `column` one of the names; else that which makes most names, a comma if in doubt."""
    names = {}
    for delimiter in DELIMITERS:
        try:
            names[delimiter] = [name.strip() for name in next(csv.reader([line], strict=True, delimiter=delimiter))]
        except csv.Error:  # a quoted name that goes on over the line, or another delimiter after it
            names[delimiter] = []
    found = [delimiter for delimiter in DELIMITERS if column in names[delimiter]]
    return found[0] if found else max(DELIMITERS, key=lambda delimiter: len(names[delimiter]))


def _check_header(header: list[str], source: str) -> None:
    repeated = _repeated(name for name in header if name)
    if repeated is not None:
        raise BadInput(
            f"{source}: the column {short(repeated)} stands twice in the first line. Rename one of them, or delete it."
        )


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
