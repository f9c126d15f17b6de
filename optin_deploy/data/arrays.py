"""Arrays by name in .npz and .safetensors files: what the headers say is checked before a value is read. No pickle."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import MAX_FILE_BYTES, check_name, check_size, short, special_kind
from optin_deploy.files.wall import wall
from optin_deploy.files.weights import read_header, refuse_pointer

ENDINGS = (".npz", ".safetensors")
MOST_ARRAYS = 1024
"""Largest number of arrays in one file."""
MOST_AXES = 32
DIRECTORY_BYTES = 2**20
"""Largest size of the list of members at the end of a zip file."""
KINDS = "biufUS"
"""Types of numpy that hold numbers or texts."""
DAMAGE = (
    *(OSError, ValueError, EOFError, RuntimeError, LookupError, TypeError, SyntaxError, ArithmeticError),
    *(NotImplementedError, MemoryError, AttributeError, struct.error, zlib.error, zipfile.BadZipFile),
    *(zipfile.LargeZipFile, tokenize.TokenError),
)
"""What zipfile and numpy raise on damaged files."""
END, WIDE = b"PK\x05\x06", b"PK\x06\x07"
"""Marks at the end of a zip file, of a usual one and of one beyond 4 GiB."""

Array = Any
"""A torch tensor, or of texts a numpy array."""


@dataclass(frozen=True)
class Header:
    """What a file says of an array."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Arrays:
    """A file of arrays whose headers were read and found sound."""

    path: Path
    headers: Mapping[str, Header]

    @property
    def bytes(self) -> int:
        """Size of all arrays when they are unpacked."""
        return sum(header.bytes for header in self.headers.values())

    def read(self, name: str) -> Array:
        """Read one array: a tensor on the CPU, or a numpy array of texts.

        Raises: BadInput: the file is damaged, or has changed.
        """
        if self.path.suffix.lower() == ".safetensors":
            from safetensors import safe_open

            with wall(f"{self.path}: {name} cannot be read", _STEP), safe_open(self.path, "pt") as file:
                return file.get_tensor(name)
        with _sound(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            array = npy.read_array(stream, allow_pickle=False)
            if array.dtype.kind in "US":
                return array
            return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


_STEP = "Write it again with numpy.savez or safetensors, whole."


def open_arrays(path: Path) -> Arrays:
    """Read the headers of a file.

    Raises: BadInput: it is no such file, damaged, holds Python objects, or is too large.
    """
    try:
        check_name(path)
        if not path.exists():
            raise BadInput(f"{path}: no such file. Check the path.")
        special = special_kind(path)
        if special is not None or path.is_dir():
            raise BadInput(f"{path}: cannot read {special or 'a folder'} as one file. Possible: {', '.join(ENDINGS)}.")
        check_size(path)
        refuse_pointer(path)
    except OSError as err:
        raise BadInput(f"{path}: cannot be read: {err.strerror or err}. Check the path and its permissions.") from err
    if path.suffix.lower() == ".safetensors":
        stored = read_header(path)
        headers = {name: Header(one.shape, one.dtype, 0) for name, one in stored.items()}
    else:
        headers = _zipped(path)
    if not 0 < len(headers) <= MOST_ARRAYS:
        raise BadInput(f"{path}: {len(headers)} arrays in it; 1 to {MOST_ARRAYS} are possible, one an input.")
    return Arrays(path, headers)


def check_total(files: list[Arrays]) -> None:
    """Refuse files that together fill the memory.

    Raises: BadInput.
    """
    total = sum(file.bytes or file.path.stat().st_size for file in files)
    if total > MAX_FILE_BYTES:
        raise BadInput(
            f"{files[0].path}{' and others' if len(files) > 1 else ''}: {total / 1024**3:.1f} GiB, but at most"
            " 2 GiB are read. A few hundred samples are enough."
        )


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except DAMAGE as err:
        raise BadInput(
            f"{path} is damaged or not a .npz file: {short(str(err) or type(err).__name__)}. {_STEP}"
        ) from err


def _zipped(path: Path) -> dict[str, Header]:
    with _sound(path):
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = Counter(member.filename for member in members)
            twice = [name for name, times in names.items() if times > 1]
            if twice:
                raise BadInput(f"{path}: the array {short(twice[0])} stands twice in it. {_STEP}")
            if len(members) > MOST_ARRAYS:
                raise BadInput(f"{path}: {len(members)} arrays in it; at most {MOST_ARRAYS} are read, one an input.")
            found = {}
            for member in members:
                if not member.filename.endswith(".npy"):
                    raise BadInput(
                        f"{path}: {short(member.filename)} in it is no array. Give a file that numpy.savez wrote."
                    )
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    found[name] = _header(stream, member, f"{path}: {name}")
    if sum(header.bytes for header in found.values()) > MAX_FILE_BYTES:
        raise BadInput(
            f"{path}: {sum(header.bytes for header in found.values()) / 1024**3:.1f} GiB unpacked, but at most 2 GiB"
            " are read. A few hundred samples are enough."
        )
    return found


def _check_directory(path: Path) -> None:
    """Refuse a list of members that would fill the memory, before zipfile reads it."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
    end = tail.rfind(END)
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("it has no end as zip files have")
    listed = struct.unpack("<L", tail[end + 12 : end + 16])[0]
    if listed > DIRECTORY_BYTES or tail[max(0, end - 20) :].startswith(WIDE):
        raise BadInput(f"{path}: too many arrays in it; at most {MOST_ARRAYS} are read, one an input.")


def _header(stream: IO[bytes], member: zipfile.ZipInfo, where: str) -> Header:
    """Shape and type of an array, which must fill its member exactly."""
    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise BadInput(
            f"{where} holds Python objects, which are not read: they could run code. Save arrays of numbers, of one"
            " length in each axis."
        )
    if dtype.kind not in KINDS or dtype.itemsize == 0 or str(dtype) in ("float128", "longdouble"):
        raise BadInput(f"{where} holds {dtype} values; possible are numbers, and texts for labels.")
    if len(shape) > MOST_AXES or any(size < 0 for size in shape):
        raise ValueError(f"{where} has the shape {shape}")
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes != member.file_size - stream.tell():
        raise ValueError(f"{where} says {size_bytes} bytes and has {member.file_size - stream.tell()}")
    return Header(tuple(shape), str(dtype), size_bytes)
