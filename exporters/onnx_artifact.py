"""An exported ONNX file on disk: sealed, so that a changed one is noticed, with large weights in a file beside it.

The last bytes of the file are a metadata entry with the sha256 of all bytes before: to protobuf two messages in a row
are one, so that every reader takes the file as it is. The hash of the weights' own file is among the sealed bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from optin_deploy.ownership import Record
from optin_deploy.storage import atomic_file, sha256_file

KEY = "optin.key"
"""Metadata entry: hash of weights and settings, by which a finished export is recognised."""
DATA = "optin.data_sha256"
"""Metadata entry: sha256 of the file with the weights, if they lie in one."""
WEIGHTS = "optin.weights"
"""Metadata entry: sha256 of the tensors of the torch model that it was made from."""
SEAL = "optin.sha256"
"""Metadata entry, the last one: sha256 of the file up to it."""
STACK_TRACE = "pkg.torch.onnx.stack_trace"
WITH_SHAPES = False
"""Are the shapes of intermediate values written? Where they are, ONNX Runtime fuses each residual sum with the
LayerNorm after it into SkipLayerNormalization, whose kernel is slower on the CPU than the two: without them the dense
all-MiniLM-L6-v2 took 1 to 4% less time, cut to 60% of its units 6 to 7%, to 25% 11 to 15% (1 thread, outputs equal to
7e-7; benchmarks/results/latency_shapes.md). Every engine infers what it needs."""
BLOCK = 2**20


@dataclass(frozen=True)
class Finished:
    """What an ONNX file that was written whole says of itself."""

    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sha256: str
    """Of the file; it holds the hash of the data file."""
    data: Mapping[str, str]
    """sha256 of the file with the weights, by its name; empty: the ONNX file holds them."""


def data_path(path: Path) -> Path:
    """Where the weights of an ONNX file lie that cannot hold them: `model.onnx.data`."""
    return path.with_name(f"{path.name}.data")


def complete(draft: Path, key: str, weights: str) -> None:
    """Finish a file that an exporter wrote, and its data file if there is one: clean, check, seal.

    Args: weights: sha256 of the model's tensors.
    Raises: onnx.checker.ValidationError.
    """
    proto = onnx.load(draft, load_external_data=False)
    for node in proto.graph.node:  # where in its builder's files a node comes from is nobody's business
        kept = [prop for prop in node.metadata_props if prop.key != STACK_TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    if not WITH_SHAPES:
        without_shapes(proto)
    data = data_path(draft)
    entries = {KEY: key, WEIGHTS: weights} | ({DATA: sha256_file(data)} if data.exists() else {})
    for name, value in entries.items():
        proto.metadata_props.add(key=name, value=value)
    onnx.save(proto, draft)
    onnx.checker.check_model(str(draft))
    _seal(draft)


def without_shapes(proto: Any) -> None:
    """Take the types and shapes of intermediate values out of a graph; inputs and outputs keep theirs."""
    del proto.graph.value_info[:]


def install(draft: Path, out: Path) -> None:
    """Move a complete draft to its place, the weights first; the data file of an older one goes if none is needed.

    Killed half-way it leaves no ONNX file, rather than one beside the weights of another.
    """
    before, data = finished(out), data_path(out)
    if data_path(draft).exists():
        if data.exists():
            _remove(out)
        _move(data_path(draft), data)
        _move(draft, out)
        return
    _move(draft, out)
    if before is not None and before.data:
        _remove(data)


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
    )


def weights_of(proto: onnx.ModelProto) -> str | None:
    """sha256 of the tensors that a model was made from; None: it does not say."""
    return next((entry.value for entry in proto.metadata_props if entry.key == WEIGHTS), None)


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


def _remove(path: Path) -> None:
    """In a folder that keeps a record, only what is ours."""
    record = Record.above(path)
    if record is None:
        path.unlink(missing_ok=True)
    else:
        record.remove(os.path.relpath(path, record.root))


def _move(draft: Path, out: Path) -> None:
    with atomic_file(out) as temporary:
        draft.replace(temporary)
