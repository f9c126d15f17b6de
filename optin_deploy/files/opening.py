"""Files with a user's data: what may be opened, and the lines of its text in whatever Unicode it is written."""

from __future__ import annotations

import codecs
import stat
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from optin_deploy.errors import BadInput

MAX_FILE_BYTES = 2 * 1024**3
MAX_LINE_BYTES = 16 * 1024**2
"""Largest size of a line, and of a field that spans several lines: a text of millions of words, but never all
memory."""
_CHUNK_BYTES = 1024**2
_WIDE_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
               (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
"""Byte order marks; those of UTF-32 first, as one of them begins like UTF-16's."""

_NO_TEXT = (
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS, not the file itself: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, as .xlsx and .zip files are: unpack it, or save the sheet as CSV"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"PAR1", "a Parquet file: convert it to .jsonl"),
)
"""How files begin that are often given in place of text, and what to do."""


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


def check_name(path: Path) -> None:
    """Refuse a name that no report could hold.

    Raises: BadInput.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as err:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise BadInput(f"{shown}: this name is not valid UTF-8, so that no report could hold it. Rename it.") from err


def check_inside(path: Path, folder: Path) -> None:
    """Raises: BadInput: the path is, or lies behind, a link that leads out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{path} is a link that leads out of {folder}. Copy the file there.")


def special_kind(path: Path) -> str | None:
    """What a path is if it is neither a file nor a folder: opening a pipe would wait for ever.

    Raises: OSError: there is nothing.
    """
    mode = path.stat().st_mode
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    return next((name for test, name in (*kinds, (stat.S_ISBLK, "a device")) if test(mode)), None)


def text_lines(stream: BinaryIO, name: str | Path) -> Iterator[tuple[int, str]]:
    r"""Lines of a UTF-8 file, or of a UTF-16 or UTF-32 file with a byte order mark, with their numbers from 1.

    A line ends with \n; with \r in files (of old Macs) that begin without any \n.
    Raises: BadInput: other bytes, or a line above 16 MiB; names the line. OSError.
    """
    start = stream.read(_CHUNK_BYTES)
    for beginning, what in _NO_TEXT:
        if start.startswith(beginning):
            raise BadInput(f"{name}: this is {what}.")
    wide = next((encoding for mark, encoding in _WIDE_MARKS if start.startswith(mark)), None)
    chunks: Iterator[bytes] = chain((start,), iter(partial(stream.read, _CHUNK_BYTES), b""))
    if wide is not None:
        chunks = _as_utf8(chunks, wide, name)
        start = next(chunks, b"")
        chunks = chain((start,), chunks)
    end = b"\r" if b"\r" in start and b"\n" not in start else b"\n"
    for number, raw in enumerate(_split(chunks, end, name), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if "\0" in line:
                raise BadInput(
                    f"{name}:{number}: not UTF-8 text: a zero byte at position {raw.index(0) + 1}, as UTF-16 without a"
                    f" byte order mark has. Convert it, for example: iconv -f UTF-16LE -t UTF-8 {name}"
                )
        except UnicodeDecodeError as err:
            raise BadInput(
                f"{name}:{number}: not UTF-8 text: byte 0x{err.object[err.start]:02x} at position {err.start + 1}."
                f" Only Unicode is read; convert it, for example: iconv -f LATIN1 -t UTF-8 {name}"
            ) from err
        yield number, line


def _as_utf8(chunks: Iterator[bytes], encoding: str, name: str | Path) -> Iterator[bytes]:
    try:
        for text in codecs.iterdecode(chunks, encoding):
            yield text.encode()
    except UnicodeError as err:
        raise BadInput(
            f"{name}: begins as {encoding.upper()}, but is not ({err}). Save it again as UTF-8 text."
        ) from err


def _split(chunks: Iterator[bytes], end: bytes, name: str | Path) -> Iterator[bytes]:
    r"""Lines, each with its end; \r becomes \n."""
    rest, number = b"", 1
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(end)
        for line in whole:
            yield line + b"\n"
        number += len(whole)
        if len(rest) > MAX_LINE_BYTES:
            raise BadInput(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES // 1024**2} MiB. Write one sample a line, and"
                " leave out what no model reads to its end."
            )
    if rest:
        yield rest
