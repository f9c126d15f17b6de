"""Files that are whole or absent: write aside, fsync, rename; read with checks and clear errors. Never pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.files.descriptors import remove_folder, retried, sync
from optin_deploy.files.ownership import Record, beside, in_the_way, record_all
from optin_deploy.files.paths import sha256_file as sha256_file  # for all that write files

JSON_LIMIT_BYTES = 64 * 2**20
"""A plan of a very large model is a few MiB; anything above this is not ours."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk, a user's share of it, or the size of one file is used up."""

NUMBER_LIST = re.compile(r"\[[\s\d.,eE+-]+\]")
"""A JSON list of numbers alone, over any number of lines."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, on an error it is removed.

    In a folder that has a record of ours, what is there and not ours is set aside.
    Raises: BadInput: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with _room_on_disk(path):
            yield temporary
            sync(temporary)
            temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner may read
            record = Record.above(path)
            if record is not None:
                record.make_room(path)
                record.note(path, sha256_file(temporary))
            retried(temporary.replace, path)
    finally:
        retried(temporary.unlink, missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it takes the place of `path`, whole.

    It keeps a record of its files, by which it may be replaced later.
    Raises: BadInput: somebody else's files are there, or the disk is full.
    """
    owner = Record(path.parent)
    if strangers := owner.strangers(path):
        raise BadInput(in_the_way(strangers))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = beside(path), beside(path, "old")
    try:
        with _room_on_disk(path):
            temporary.mkdir()
            yield temporary
            for written in (p for p in temporary.rglob("*") if p.is_file()):
                sync(written)
            record_all(temporary)
            owner.make_room(path)
            try:
                if path.exists():
                    retried(path.replace, old)
                retried(temporary.replace, path)
            finally:
                if old.exists() and not path.exists():
                    retried(old.replace, path)  # the exchange failed half-way: the old folder comes back
    finally:
        remove_folder(temporary)
        remove_folder(old)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to make a file of several parts in; it is removed in the end.

    Raises: BadInput: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with _room_on_disk(path):
            temporary.mkdir()
            yield temporary
    finally:
        remove_folder(temporary)


@contextmanager
def _room_on_disk(path: Path) -> Iterator[None]:
    """Libraries have errors of their own for a full disk; here it is one.

    Raises: BadInput.
    """
    try:
        yield
    except Exception as err:
        reason = next((os.strerror(code) for code in DISK_FULL if _tells(err, code)), None)
        if reason is None:
            raise
        raise BadInput(
            f"{path} cannot be written: {reason}. Make room, then run the same command again: finished stages are kept."
        ) from err


def _tells(err: BaseException | None, code: int) -> bool:
    """Is this the reason of an error, or of one that it came from?"""
    while err is not None:
        if getattr(err, "errno", None) == code or os.strerror(code) in str(err):
            return True
        err = err.__cause__ or err.__context__
    return False


def _umask() -> int:
    """The user's mask of permissions."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN is refused."""
    write_text(path, json_text(data))


def json_text(data: Mapping[str, Any]) -> str:
    """JSON as it is written: indented, lists of numbers on one line, NaN refused."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return NUMBER_LIST.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def read_json(path: Path, hint: str, *, ours: bool = False) -> dict[str, Any]:
    """Read a JSON object; `stored.Stored` also checks its shape.

    Args:
        hint: the next step for the user if the file is absent, e.g. "Write it with `optin plan`."
        ours: optin-deploy wrote it: then every number is finite and fits into 64 bits.
    Raises: BadInput: absent, too large, not UTF-8, not a JSON object.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist. {hint}")
    if path.stat().st_size > JSON_LIMIT_BYTES:
        raise BadInput(f"{path} is {path.stat().st_size} bytes; at most {JSON_LIMIT_BYTES} are read. {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as err:
        raise BadInput(f"{path} is not JSON ({err}). {hint}") from err
    return parsed_json(text, str(path), hint, ours=ours)


def parsed_json(text: str, what: str, hint: str, *, ours: bool = False) -> dict[str, Any]:
    """Read a JSON object from text.

    Args: what: starts an error. hint, ours: as `read_json`.
    Raises: BadInput: it is no JSON object.
    """
    numbers: Any = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _finite} if ours else {}
    try:
        data = json.loads(text, **numbers)
    except (ValueError, RecursionError) as err:  # not JSON, or nested and long beyond what Python holds
        raise BadInput(f"{what} is not JSON ({err}). {hint}") from err
    if not isinstance(data, dict):
        raise BadInput(f"{what} holds a {type(data).__name__}, not an object. {hint}")
    return data


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**64:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically; tensors that share memory are written each on their own."""
    written: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        memory = values.untyped_storage().data_ptr()
        written[name] = values.clone() if memory in taken else values  # the format knows no sharing
        taken.add(memory)
    with atomic_file(path) as temporary:
        save_file(written, temporary, dict(metadata or {}))
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of its names: it comes in another one at each run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if len(header.get("__metadata__", ())) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(ordered) == size, "only the order changed"
        file.seek(8)
        file.write(ordered)


def read_tensors(path: Path, hint: str) -> dict[str, Tensor]:
    """Read safetensors.

    Raises: BadInput: absent, truncated or not safetensors.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist. {hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as err:
        # The last three: a type that this version of safetensors or torch does not have.
        raise BadInput(f"{path} is truncated or not a safetensors file ({err}). {hint}") from err


def read_metadata(path: Path, hint: str) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises: BadInput: absent, truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as err:
        raise BadInput(f"{path} is absent or not a safetensors file ({err}). {hint}") from err


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, of any dtype (numpy has no bfloat16)."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def sha256_json(data: object) -> str:
    """sha256 (hex) of canonical JSON: the key of a stage's settings."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
