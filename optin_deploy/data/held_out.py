"""Rows that judge: none of them equals one that calibration learns from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.data.calibration import Batches
from optin_deploy.data.repeats import contents
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput

log = logging.getLogger(__name__)


def unseen(rows: Sequence[Sample], calibration: Sequence[Sample], path: str) -> tuple[Sample, ...]:
    """The rows of `--eval` that calibration does not learn from; labels for all or for none.

    Raises: BadInput.
    """
    found = contents((*calibration, *rows))
    seen = set(found[: len(calibration)])
    left = tuple(row for row, content in zip(rows, found[len(calibration) :], strict=True) if content not in seen)
    unlabelled = [row.source for row in left if row.label is None]
    if not left:
        raise BadInput(
            f"--eval {path}: all {len(rows)} rows are calibration rows. Give rows that nothing learned from."
        )
    if 0 < len(unlabelled) < len(left):
        raise BadInput(
            f"--eval {path}: {len(unlabelled)} of {len(left)} rows have no label, the first at {unlabelled[0]}. Label"
            " all rows, or none."
        )
    if len(left) < len(rows):
        log.warning("--eval %s: %d rows are calibration rows and do not count", path, len(rows) - len(left))
    return left


def not_in(rows: Batches, seen: Batches) -> Batches:
    """The rows whose inputs equal none of `seen`: texts may differ only after the tokens that the model takes.

    A warning tells how many are left out.
    Raises: BadInput: none is left.
    """
    known = {content for batch in seen.batches for content in _inputs(batch)}
    marks = [torch.tensor([content not in known for content in _inputs(batch)]) for batch in rows.batches]
    kept = torch.cat(marks).tolist()
    if all(kept):
        return rows
    if not any(kept):
        raise BadInput(
            f"All {len(kept)} held-out rows give the model the same inputs as calibration rows, such as texts whose"
            " first --seq-len tokens are equal. Give more samples, or a higher --seq-len."
        )
    log.warning("%d held-out rows give the model the inputs of a calibration row and do not count", kept.count(False))
    batches = [
        {name: values[mark] for name, values in batch.items()}
        for batch, mark in zip(rows.batches, marks, strict=True)
        if mark.any()
    ]
    return Batches(tuple(batches), tuple(label for label, keep in zip(rows.labels, kept, strict=True) if keep))


def _inputs(batch: Mapping[str, Tensor]) -> Iterator[bytes]:
    """A value for each row, whatever it is padded to."""
    for row in range(len(next(iter(batch.values())))):
        mask = batch["attention_mask"][row].bool() if "attention_mask" in batch else ...
        digest = hashlib.sha256()
        for values in batch.values():
            digest.update(values[row][mask].numpy().tobytes())
        yield digest.digest()
