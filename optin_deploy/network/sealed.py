"""An ONNX file of ours on disk: sealed, so that a changed one is noticed, with large weights in a file beside it.

The last bytes of the file are a metadata entry with the sha256 of all bytes before: to protobuf two messages in a row
are one, so that every reader takes the file as it is. The hash of the weights' own file is among the sealed bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from optin_deploy.files.descriptors import retried
from optin_deploy.files.storage import atomic_file, scratch_folder, sha256_file
from optin_deploy.network.graph import Network
from optin_deploy.network.write import data_path, take_away, write

KEY = "optin.key"
"""Metadata entry: hash of weights and settings, by which a finished export is recognised."""
DATA = "optin.data_sha256"
"""Metadata entry: sha256 of the file with the weights, if they lie in one."""
MADE_FROM = "optin.made_from"
"""Metadata entry: sha256 of the float32 file that one of another type was made from."""
SEAL = "optin.sha256"
"""Metadata entry, the last one: sha256 of the file up to it."""
OURS = (KEY, DATA, MADE_FROM, SEAL)
"""What a file says of itself: it is not handed on to what is made from it."""
BLOCK = 2**20


@dataclass(frozen=True)
class Finished:
    """What an ONNX file that was written whole says of itself."""

    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sha256: str
    """Hash of the file, which itself holds the hash of the data file."""
    data: Mapping[str, str]
    """sha256 of the file with the weights, by its name; empty: the ONNX file holds them."""
    said: Mapping[str, str]
    """All entries of its metadata."""


def store(
    network: Network, path: Path, key: str, entries: Mapping[str, str] | None = None, *, anew: bool = False
) -> Finished:
    """Write a network, sealed, unless a finished file with this key is there.

    Args: key: hash of all that the file depends on. entries: more to say in its metadata. anew: write it anyway.
    Raises: BadInput: the disk is full. onnx.checker.ValidationError: our fault.
    """
    known = finished(path)
    if known is not None and known.key == key and not anew:
        return known
    model = network.model.clone()
    for name in OURS:
        model.metadata_props.pop(name, None)
    model.metadata_props.update({KEY: key, **(entries or {})})
    with scratch_folder(path) as folder:
        draft = folder / path.name
        write(Network(model, network.source), draft)
        if data_path(draft).exists():
            complete(draft, {})
        else:
            onnx.checker.check_model(str(draft))
            _seal(draft)
        install(draft, path)
    found = finished(path)
    assert found is not None, "the file was written just now"
    return found


def complete(draft: Path, entries: Mapping[str, str]) -> None:
    """Finish a file that a library wrote, and its data file if there is one: note, check, seal.

    Args: entries: of the metadata, such as KEY.
    Raises: onnx.checker.ValidationError.
    """
    proto = onnx.load(draft, load_external_data=False)
    del proto.graph.value_info[:]
    data = data_path(draft)
    said = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in OURS}
    said |= {**entries, **({DATA: sha256_file(data)} if data.exists() else {})}
    onnx.helper.set_model_props(proto, said)
    onnx.save(proto, draft)
    onnx.checker.check_model(str(draft))
    _seal(draft)


def install(draft: Path, out: Path) -> None:
    """Move a complete draft to its place, the weights first; the data file of an older one goes if none is needed.

    Killed half-way it leaves no ONNX file, rather than one beside the weights of another.
    """
    before, data = finished(out), data_path(out)
    if data_path(draft).exists():
        if data.exists():
            take_away(out)
        _move(data_path(draft), data)
        _move(draft, out)
        return
    _move(draft, out)
    if before is not None and before.data:
        take_away(data)


def finished(path: Path) -> Finished | None:
    """What a file says that `install` put there; None: there is none, or it or its data were changed since."""
    data_file = data_path(path)
    if not path.is_file() or (data_file.exists() and not data_file.is_file()):  # a pipe would be waited for
        return None
    try:
        whole, sha256 = _hashed(path)
        if not whole:
            return None
        proto = onnx.load(path, load_external_data=False)
        said = {entry.key: entry.value for entry in proto.metadata_props}
        data = {data_file.name: sha256_file(data_file)} if DATA in said else {}
    except (OSError, DecodeError):
        return None
    if data and said[DATA] not in data.values():
        return None
    return Finished(
        key=said.get(KEY, ""),
        inputs=tuple(entry.name for entry in proto.graph.input),
        outputs=tuple(entry.name for entry in proto.graph.output),
        sha256=sha256,
        data=data,
        said=said,
    )


def was_changed(path: Path, proto: onnx.ModelProto) -> bool:
    """Did an exporter of ours write this model, and is the file, or its data, not as it was written?"""
    return any(entry.key == SEAL for entry in proto.metadata_props) and finished(path) is None


def _seal(path: Path) -> None:
    digest = sha256_file(path)
    with path.open("ab") as file:
        file.write(_entry(digest))


def _hashed(path: Path) -> tuple[bool, str]:
    """Does the file end in its seal? And the sha256 of all of it."""
    left = path.stat().st_size - len(_entry("0" * 64))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(BLOCK, max(0, left))):
            digest.update(block)
            left -= len(block)
        sealed, end = digest.hexdigest(), file.read()
    digest.update(end)
    return end == _entry(sealed), digest.hexdigest()


def _entry(sha256: str) -> bytes:
    entry = onnx.StringStringEntryProto(key=SEAL, value=sha256)
    data: bytes = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    return data


def _move(draft: Path, out: Path) -> None:
    with atomic_file(out) as temporary:
        retried(draft.replace, temporary)
