"""Prepared inputs as feeds: files that hold every input of a network by its name, samples first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optin_deploy.data.arrays import ENDINGS, Array, Arrays, check_total, open_arrays
from optin_deploy.data.folders import ROW_EXTENSIONS
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import Takes, fitted
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.files.opening import short

log = logging.getLogger(__name__)

LABELS = ("labels", "label", "label_ids")
"""Names of the labels beside inputs: (samples,) of classes or numbers, (samples, positions) of classes, or names of
classes."""
MOST_FILES = 100_000


def array_files(path: Path) -> list[Path] | None:
    """The files of arrays at a path, in the order of their names, without hidden ones; None: it holds something else.

    Raises: BadInput: files of several kinds in one folder.
    """
    if path.suffix.lower() in ENDINGS and not path.is_dir():
        return [path]
    if not path.is_dir():
        return None
    seen = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    found = [each for each in seen if each.suffix.lower() in ENDINGS]
    others = [each for each in seen if each.suffix.lower() in ROW_EXTENSIONS or each.is_dir()]
    if found and others:
        raise BadInput(
            f"{path} holds {found[0].name} beside {others[0].name}: are they arrays, or the rows themselves? Keep one "
            "kind in it."
        )
    if len(found) > MOST_FILES:
        raise BadInput(f"{path}: {len(found)} files; at most {MOST_FILES} are read. A few hundred samples are enough.")
    return found or None


def array_feeds(inputs: Takes, paths: Sequence[Path], origin: str) -> Feeds:
    """Read the files; each is a batch, and their rows follow one another.

    Raises: BadInput: names, types, sizes or values do not fit the network, files differ in what they hold.
    """
    files = [open_arrays(path) for path in paths]
    check_total(files)
    used = [{*inputs.ports, _label_name(inputs, file)} for file in files]
    unused = sorted({name for file, names in zip(files, used, strict=True) for name in file.headers.keys() - names})
    batches: list[dict[str, Tensor]] = []
    labels: list[Label] = []
    for file in files:
        _check_missing(inputs, file, unused)
        batch = fitted(inputs, {name: _numbers(file, name) for name in inputs.ports}, str(file.path))
        if batches and any(not torch.equal(batch[name], batches[0][name]) for name in inputs.shared):
            raise BadInput(
                f"{file.path}: {', '.join(inputs.shared)} differs from that of {files[0].path}; it has no axis of"
                " samples, so all samples share it."
            )
        batches.append(batch)
        rows = len(batch[inputs.samples[0]])
        name = _label_name(inputs, file)
        labels += (None if name is None else labels_of(file.read(name), rows, f"{file.path}: {name}")) or [None] * rows
    if unused:
        log.warning("%s: not used, as they are no inputs of the network: %s", origin, short(", ".join(unused), 200))
    return Feeds(tuple(batches), tuple(labels), origin, inputs.shared)


def _check_missing(inputs: Takes, file: Arrays, unused: Sequence[str]) -> None:
    missing = [name for name in inputs.ports if name not in file.headers]
    if missing:
        beside = f" Not used: {short(', '.join(unused), 200)}." if unused else ""
        raise BadInput(
            f"{file.path}: it holds no {', '.join(missing)}. {inputs.source} takes {inputs}.{beside} {inputs.as_arrays}"
        )


def _label_name(inputs: Takes, file: Arrays) -> str | None:
    """The array of the labels, the first of LABELS that is there, if one is."""
    return next((name for name in LABELS if name in file.headers and name not in inputs.ports), None)


def _numbers(file: Arrays, name: str) -> Tensor:
    values = file.read(name)
    if not isinstance(values, Tensor):
        raise BadInput(f"{file.path}: {name} holds texts; the network takes numbers.")
    return values


def labels_of(values: Array, rows: int, where: str) -> list[Label] | None:
    """Labels of rows, from an array: (rows,), (rows, 1), or of classes of positions (rows, ...).

    Returns: None: they are of a kind that is not used, of which a warning tells.
    Raises: BadInput: another number of rows, or values that are no labels.
    """
    shape = tuple(values.shape)
    if not shape or shape[0] != rows:
        raise BadInput(f"{where} has the shape {shape} for {rows} samples. Give one label a sample.")
    if isinstance(values, np.ndarray):
        if len(shape) > 1:
            raise BadInput(f"{where} has the shape {shape}; names of classes have one axis, one name a sample.")
        return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in values]
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool):
        values = values.to(torch.int64)
    if values.is_complex() or (values.is_floating_point() and not bool(values.isfinite().all())):
        raise BadInput(f"{where} holds values that are no labels: complex numbers, NaN or infinity.")
    if values[0].numel() == 1:
        return [each.item() for each in values.reshape(rows)]
    if values.is_floating_point() and not bool(((values == 0) | (values == 1)).all()):
        log.warning("%s: %s numbers a sample are no labels that are used; classes are whole numbers", where, shape[1:])
        return None
    return list(values.to(torch.int64).flatten(1))
