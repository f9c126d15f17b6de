"""Read calibration rows from texts, tables, images and recordings into samples."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.data.class_maps import mapped_photographs
from optin_deploy.data.folders import ROW_EXTENSIONS, class_files
from optin_deploy.data.pairs import PAIR_COLUMN, check_pair_column, has_pair, unused_pair
from optin_deploy.data.sounds import SOUND_EXTENSIONS
from optin_deploy.data.tables import Row, csv_rows, jsonl_rows
from optin_deploy.data.targets import (
    CONTEXT,
    QUESTION,
    SCORE,
    Answers,
    Grade,
    Role,
    answers_of,
    asks,
    graded_pairs,
    reranks,
    roles_of,
    searches,
    tagged_words,
)
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import check_name, check_size, short, special_kind, text_lines

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

TEXT_EXTENSIONS = (".txt", ".jsonl", ".csv")
MAX_ROWS = 10_000_000
"""Largest number of rows in a file: what a few GiB of memory hold."""
_FORMATS = (
    "a .txt, .jsonl or .csv file, .npz or .safetensors with every input of the network by its name, or a folder of "
    "png, jpg, jpeg, bmp, webp, gif, tif or ppm images, or of wav, flac, ogg, mp3 or aiff recordings"
)


@dataclass(frozen=True)
class Sample:
    """One calibration row: a text (with an optional second text), an image or a recording."""

    text: str | None = None
    prompt: str | None = None
    """What the text begins with, where an embedding is not of that."""
    words: tuple[str, ...] | None = None
    """The words of the text, where each of them has a tag."""
    text_pair: str | None = None
    """Second text of a pair task, such as the hypothesis of NLI."""
    image: Path | Image.Image | None = None
    """A file, opened only when its batch is made, or an image in memory."""
    sound: Path | None = None
    """A recording, opened only when its batch is made."""
    class_map: Path | None = None
    """File with the class of each pixel of the image, see `data.class_maps`."""
    label: str | int | tuple[str | int, ...] | Answers | Role | Grade | None = None
    """Class id, class name, or (regression) the number as written; several of them where a row has several labels or a
    tag for each word; None where the row has none."""
    source: str = "memory"
    """file:line, or the file of an image or a recording: what error messages point at."""

    @property
    def file(self) -> Path | None:
        """The file that is the row."""
        return self.sound or (self.image if isinstance(self.image, Path) else None)


def read_samples(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    pair_column: str = PAIR_COLUMN,
    judging: bool = False,
) -> tuple[Sample, ...]:
    """Read a .txt (a text a line), .jsonl or .csv file, or a folder of images or recordings (labels: one
    subfolder a class, or a map of classes for each image in a folder laid out as `data.class_maps` says).

    Tables have `text_column`, and may have `text_pair` and `label_column`; columns of other names must be there.
    Rows with a blank text are skipped.
    Args: judging: of folders with parts the one that judges is read, not the one that is learned from.
    Labels written as whole numbers (1, "1", 1.0) become int. Hidden files are left out; the order is that of
    the file, or of the sorted names.
    Raises: BadInput: the file, or a row in it, cannot be used; names the file and the line.
    """
    path = Path(path)
    check_pair_column(pair_column, text_column)
    with _readable(path):
        if path.is_dir():
            mapped = mapped_photographs(path, judging=judging)
            samples = tuple(Sample(image=file, class_map=of_it, source=str(file)) for file, of_it in mapped) or tuple(
                _of_class(file, name) for file, name in class_files(path)
            )
        else:
            _check_file(path)
            with path.open("rb") as stream:
                rows = _rows_to_samples(path, text_lines(stream, path), text_column, label_column, pair_column)
                samples = tuple(map(_checked, islice(rows, MAX_ROWS + 1)))
    if len(samples) > MAX_ROWS:
        raise BadInput(
            f"{path}: more than {MAX_ROWS:,} rows. A few hundred samples are enough: cut a random part of them into a"
            " smaller file."
        )
    if not samples:
        what = "folder holds no images or recordings" if path.is_dir() else "file is empty, or holds no row with a text"
        raise BadInput(f"{path}: the {what}. Possible: {_FORMATS}, with at least 8 samples in it.")
    return samples


def check_start(path: Path, text_column: str, label_column: str, pair_column: str) -> None:
    """Refuse a file that is absent, or a table whose first row lacks a column, before the long work.

    Raises: BadInput.
    """
    with _readable(path):
        _check_exists(path)
        if path.suffix.lower() in TEXT_EXTENSIONS and path.is_file():
            check_size(path)
            with path.open("rb") as stream:
                rows = _rows_to_samples(path, text_lines(stream, path), text_column, label_column, pair_column)
                next(map(_checked, rows), None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises: BadInput: the system does not let a file be read."""
    try:
        check_name(path)
        yield
    except OSError as err:
        where = path if err.filename is None else Path(err.filename)
        raise BadInput(f"{where}: cannot be read: {err.strerror or err}. Check the path and its permissions.") from err


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder. Possible: {_FORMATS}; check the path.")


def _check_file(path: Path) -> None:
    _check_exists(path)
    special = special_kind(path)
    if special is not None:
        raise BadInput(f"{path}: cannot read {special}. Write its data into a file. Possible: {_FORMATS}.")
    if path.suffix.lower() not in TEXT_EXTENSIONS:
        hint = "Give the folder that holds it" if path.suffix.lower() in ROW_EXTENSIONS else "Convert it"
        raise BadInput(
            f"{path}: cannot read {path.suffix or 'a file without extension'}. Possible: {_FORMATS} (.jsonl: one JSON"
            f" object a line). {hint}."
        )
    check_size(path)


def _of_class(file: Path, name: str | None) -> Sample:
    """A file of a folder."""
    hears = file.suffix.lower() in SOUND_EXTENSIONS
    image, sound = (None, file) if hears else (file, None)
    return Sample(image=image, sound=sound, label=_label(name, str(file)), source=str(file))


def _rows_to_samples(
    path: Path, lines: Iterator[tuple[int, str]], text_column: str, label_column: str, pair_column: str
) -> Iterator[Sample]:
    if path.suffix.lower() == ".txt":
        yield from (Sample(text=line.strip(), source=f"{path}:{n}") for n, line in lines if line.strip())
        return
    blank = pairs = 0
    lists: list[Row] = []
    used, unused = (text_column, label_column, pair_column), None
    is_csv = path.suffix.lower() == ".csv"
    found = csv_rows(path, lines, text_column, (label_column, SCORE)) if is_csv else jsonl_rows(path, lines)
    for source, row in found:
        if text_column == "text" and "text" not in row:
            if reranks(row):
                lists.append((source, row))
                continue
            if searches(row):
                roles = roles_of([(source, row), *found])
                yield from (Sample(text=text, label=role, source=place) for text, place, role in roles)
                break
            if asks(row):
                pairs += 1
                yield Sample(
                    text=_text(row, QUESTION, source),
                    text_pair=_text(row, CONTEXT, source),
                    label=answers_of(row, source),
                    source=source,
                )
                continue
        tagged = tagged_words(row, text_column, label_column, source)
        if tagged is not None:
            yield Sample(text=" ".join(tagged[0]), words=tagged[0], label=tagged[1], source=source)
            continue
        text = _text(row, text_column, source)
        if not text.strip():
            blank += 1
            continue
        paired = has_pair(row, text_column, pair_column)
        pairs += paired
        unused = unused or unused_pair(row, used)
        if pair_column != PAIR_COLUMN and pair_column not in row:
            raise _no_column(pair_column, row, source, "--pair-column")
        if label_column != "label" and label_column not in row:  # the default column may be absent, a named one not
            raise _no_column(label_column, row, source, "--label-column")
        yield Sample(
            text=text,
            text_pair=_text(row, pair_column, source) if paired else None,
            label=_label(row.get(label_column), source),
            source=source,
        )
    for text, other, source, grade in graded_pairs(lists):
        yield Sample(text=text, text_pair=other, label=grade, source=source)
    if unused is not None and not pairs and not lists:
        log.warning(
            "%s: column %r may be the second text of pairs, and is not read: give --pair-column %s if the model takes "
            "pairs",
            *(path, unused, unused),
        )
    if blank:
        log.warning("%s: %d rows with a blank text were skipped", path, blank)


def _text(row: Mapping[str, object], column: str, source: str) -> str:
    if column not in row:
        raise _no_column(column, row, source, "--text-column")
    text = row[column]
    if not isinstance(text, str):
        raise BadInput(f"{source}: {column!r} is {short(text)}, not a string. Put it in quotes or delete that row.")
    return text


def _checked(sample: Sample) -> Sample:
    """Return a sample as it is.

    Raises: BadInput: a text of it holds a lone surrogate, which JSON may carry, and no tokenizer and no file takes.
    """
    labels = sample.label if isinstance(sample.label, tuple) else (sample.label,)
    answers = sample.label.texts if isinstance(sample.label, Answers) else ()
    for text in (sample.text, sample.text_pair, *labels, *answers):
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError as err:
            raise BadInput(f"{sample.source}: {short(text)} is not valid Unicode. Correct or delete that row.") from err
    return sample


def _no_column(column: str, row: Mapping[str, object], source: str, flag: str) -> BadInput:
    columns = short(", ".join(map(str, row)), 200)
    return BadInput(f"{source}: no column {column!r}. The columns are {columns}. Name the right one with {flag}.")


def _label(value: object, source: str) -> str | int | tuple[str | int, ...] | None:
    if isinstance(value, list):  # of a row with several labels, or none
        found = tuple(_label(each, source) for each in value if not isinstance(each, list))
        if len(found) == len(value) and None not in found:
            return found  # type: ignore[return-value]  # each is a class
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and math.isnan(value):
        return None  # as tables write an absent value into JSON
    if (value is not None and not isinstance(value, str | int | float)) or value in (math.inf, -math.inf):
        raise BadInput(
            f"{source}: the label {short(value)} is neither text nor a number. Write one class a row, or a list."
        )
    text = "" if value is None else str(value).strip()
    whole = re.fullmatch(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0)?", text)
    return int(whole[1]) if whole else text or None
