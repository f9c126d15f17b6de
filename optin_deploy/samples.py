"""Read calibration rows from text, table and image files, or from the bundled set, into samples."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.errors import BadInput
from optin_deploy.pairs import PAIR_COLUMN, check_pair_column, has_pair, unused_pair

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

TEXT_EXTENSIONS = (".txt", ".jsonl", ".csv")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MAX_FILE_BYTES = 2 * 1024**3
_FORMATS = "a .txt, .jsonl or .csv file, or a folder of png, jpg, jpeg, bmp or webp images"


@dataclass(frozen=True)
class Sample:
    """One calibration row: a text (with an optional second text) or an image."""

    text: str | None = None
    text_pair: str | None = None
    """Second text of a pair task, such as the hypothesis of NLI."""
    image: Path | Image.Image | None = None
    """A file, opened only when its batch is made, or an image in memory."""
    label: str | int | None = None
    """Class id, class name, or (regression) the number as written; None where the row has none."""
    source: str = "memory"
    """file:line, or the image file: what error messages point at."""


def read_samples(
    path: str | Path, *, text_column: str = "text", label_column: str = "label", pair_column: str = PAIR_COLUMN
) -> tuple[Sample, ...]:
    """Read a .txt (a text a line), .jsonl or .csv file, or a folder of images (labels: one subfolder a class).

    Tables have `text_column`, and may have `text_pair` and `label_column`; columns of other names must be there.
    Rows with a blank text are skipped.
    Labels written as whole numbers (1, "1", 1.0) become int. Hidden files are left out; the order is that of
    the file, or of the sorted names.
    Raises: BadInput: the file, or a row in it, cannot be used; names the file and the line.
    """
    path = Path(path)
    check_pair_column(pair_column, text_column)
    try:
        if path.is_dir():
            samples = tuple(_image_folder(path))
        else:
            _check_file(path)
            with path.open("rb") as stream:
                samples = tuple(_rows_to_samples(path, _decode(stream, path), text_column, label_column, pair_column))
    except OSError as err:
        raise BadInput(f"{path}: cannot be read: {err.strerror or err}. Check the path and its permissions.") from err
    if not samples:
        what = "folder holds no images" if path.is_dir() else "file is empty"
        raise BadInput(f"{path}: the {what}. --calibration takes {_FORMATS}, with at least 8 samples in it.")
    return samples


def short(value: object, limit: int = 60) -> str:
    """The repr of a value, cut to `limit` characters for an error message."""
    shown = repr(value[: limit + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def check_size(path: Path) -> None:
    """Raise BadInput for a file above 2 GiB. Raises: OSError: there is no such file."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise BadInput(
            f"{path}: {size_bytes / 1024**3:.1f} GiB, but at most 2 GiB are read. A few hundred samples are enough:"
            " cut a random part of it into a smaller file."
        )


def _check_file(path: Path) -> None:
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder. --calibration takes {_FORMATS}; check the path.")
    if path.suffix.lower() not in TEXT_EXTENSIONS or not path.is_file():
        hint = "Give the folder that holds the images" if path.suffix.lower() in IMAGE_EXTENSIONS else "Convert it"
        raise BadInput(
            f"{path}: cannot read {path.suffix or 'a file without extension'}. Possible: {_FORMATS} (.jsonl: one JSON"
            f" object a line). {hint}."
        )
    check_size(path)


def _decode(stream: Iterable[bytes], name: str | Path) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if "\0" in line:  # UTF-16 without a byte order mark decodes, to nonsense
                raise UnicodeDecodeError("utf-8", raw, raw.index(0), raw.index(0) + 1, "zero byte")
        except UnicodeDecodeError as err:
            raise BadInput(
                f"{name}:{number}: not UTF-8 text: byte 0x{err.object[err.start]:02x} at position {err.start + 1}."
                f" Only UTF-8 is read; convert it, for example: iconv -f LATIN1 -t UTF-8 {name}"
            ) from err
        yield number, line


def _rows_to_samples(
    path: Path, lines: Iterator[tuple[int, str]], text_column: str, label_column: str, pair_column: str
) -> Iterator[Sample]:
    if path.suffix.lower() == ".txt":
        yield from (Sample(text=line.strip(), source=f"{path}:{n}") for n, line in lines if line.strip())
        return
    blank = pairs = 0
    first: Mapping[str, object] = {}
    for source, row in (_csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows)(path, lines):
        text = _text(row, text_column, source)
        if not text.strip():
            blank += 1
            continue
        paired = has_pair(row, text_column, pair_column)
        pairs += paired
        first = first or row
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
    unused = unused_pair(first, (text_column, label_column, pair_column))
    if unused is not None and not pairs:
        log.warning(
            "%s: column %r may be the second text of pairs, and is not read: give --pair-column %s if the model takes "
            "pairs",
            *(path, unused, unused),
        )
    if blank:
        log.warning("%s: %d rows with a blank text were skipped", path, blank)


def _jsonl_rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as err:
            raise BadInput(
                f"{path}:{number}: not a JSON object: {short(line.strip())} ({err}). Each line must be one, such as"
                ' {"text": "...", "label": 1}; correct or delete that line.'
            ) from err
        yield f"{path}:{number}", row


def _csv_rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Mapping[str, object]]]:
    reader = csv.reader((line for _, line in lines), strict=True)
    header: list[str] = []
    start = 1  # of the record, which may span several lines
    try:
        for fields in reader:
            source, start = f"{path}:{start}", reader.line_num + 1
            if not header:
                header = [name.strip() for name in fields]
            elif fields:
                if len(fields) != len(header):
                    raise BadInput(
                        f"{source}: {len(fields)} fields, but the first line names {len(header)} columns"
                        f" ({', '.join(header)}). Put double quotes around a text that contains commas."
                    )
                yield source, dict(zip(header, fields, strict=True))
    except csv.Error as err:
        raise BadInput(
            f"{path}:{start}: not CSV: {err}. Put double quotes around a text that contains commas, quotes or line"
            " breaks, and double each quote inside it."
        ) from err


def _text(row: Mapping[str, object], column: str, source: str) -> str:
    if column not in row:
        raise _no_column(column, row, source, "--text-column")
    text = row[column]
    if not isinstance(text, str):
        raise BadInput(f"{source}: {column!r} is {short(text)}, not a string. Put it in quotes or delete that row.")
    try:
        text.encode()
    except UnicodeEncodeError as err:  # a lone surrogate, which JSON may carry and no tokenizer takes
        raise BadInput(
            f"{source}: {column!r} is not valid Unicode: {short(text)}. Correct or delete that row."
        ) from err
    return text


def _no_column(column: str, row: Mapping[str, object], source: str, flag: str) -> BadInput:
    columns = short(", ".join(map(str, row)), 200)
    return BadInput(f"{source}: no column {column!r}. The columns are {columns}. Name the right one with {flag}.")


def _label(value: object, source: str) -> str | int | None:
    if isinstance(value, bool):
        return int(value)
    if value is not None and not isinstance(value, str | int | float):
        raise BadInput(f"{source}: the label {short(value)} is neither text nor a number. Write one class a row.")
    text = "" if value is None else str(value).strip()
    whole = re.fullmatch(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0)?", text)
    return int(whole[1]) if whole else text or None


def _image_folder(root: Path) -> Iterator[Sample]:
    for entry in _entries(root, root):
        if not entry.is_dir():
            if entry.suffix.lower() in IMAGE_EXTENSIONS:
                yield Sample(image=entry, source=str(entry))
            continue
        for leaf in _entries(entry, root):
            if leaf.is_dir():
                raise BadInput(
                    f"{leaf}: a folder two levels below {root}. Images lie in the folder itself or in one subfolder a"
                    f" class; give {entry} if its subfolders are the classes, or move {leaf.name} away."
                )
            if leaf.suffix.lower() in IMAGE_EXTENSIONS:
                yield Sample(image=leaf, label=_label(entry.name, str(leaf)), source=str(leaf))


def _entries(folder: Path, root: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            try:
                inside = entry.resolve(strict=True).is_relative_to(root.resolve())
            except (OSError, RuntimeError):  # broken, or a loop
                inside = False
            if not inside:
                raise BadInput(
                    f"{entry}: a link that leaves {root} or leads nowhere ({short(str(entry.readlink()))}). Only files"
                    " inside the folder are read; copy the file there, or delete the link."
                )
        yield entry
