"""Rows that a network is fed: by name of its inputs, in batches, with labels and a key for each row's content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from optin_deploy.data.class_maps import ClassMap
from optin_deploy.data.targets import Answers, Grade, Role, unlearned
from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_json, sha256_tensors, tensor_bytes

log = logging.getLogger(__name__)

MASK = "attention_mask"
"""The input that tells tokens from padding."""
READ = "read_mask"
"""Beside the inputs where an embedding is of the tokens behind a prompt alone: their places in the text from 1 on, 0
elsewhere."""

Batch = Mapping[str, Tensor]
"""Inputs by name, samples first."""
Label = str | int | float | tuple[str | int | None, ...] | Tensor | ClassMap | Answers | Role | Grade | None
"""Label of a row: the name or index of its class, a number, several names or indices, one index for each position, a
class for each pixel, answers to its question, what searches should find, how well a pair fits, or None for a row
without a label."""


@dataclass(frozen=True, eq=False)
class Feeds:
    """Inputs of a network in batches, on the CPU, with the labels in the order of the rows."""

    batches: tuple[Batch, ...]
    """Each {input name: (rows, ...)}; inputs that all samples share stand last. `attention_mask` is there also where
    the network calls it otherwise: run a network on those that it takes."""
    labels: tuple[Label, ...]
    """One a row, over all batches."""
    origin: str
    """Origin of the rows, for messages and records."""
    shared: tuple[str, ...] = ()
    """Inputs without an axis of samples."""

    def __post_init__(self) -> None:
        rows = sum(map(rows_of, self.batches))
        if rows != len(self.labels):
            raise BadInput(
                f"{self.origin}: {len(self.labels)} labels for {rows} rows. Give one label a row, or none at all."
            )

    def __len__(self) -> int:
        """The number of samples, not of batches."""
        return len(self.labels)

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """A digest of each row's inputs, whatever it is padded to: equal rows have equal keys."""
        return tuple(key for batch in self.batches for key in row_keys(batch, self.shared))

    @property
    def widest(self) -> Batch:
        """The batch whose rows hold the most numbers."""
        return max(self.batches, key=_width)

    @property
    def narrowest(self) -> Batch:
        """The batch whose rows hold the fewest numbers."""
        return min(self.batches, key=_width)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the names, dtypes, shapes and bytes of all tensors, batch by batch; not the labels."""
        named = {f"{i} {name}": tensor for i, batch in enumerate(self.batches) for name, tensor in batch.items()}
        return sha256_tensors(named)

    @property
    def key(self) -> str:
        """Hash of the fingerprint and the labels."""
        return sha256_json([self.fingerprint, *map(label_digest, self.labels)])

    def rows(self) -> list[Batch]:
        """Every row as a batch of its own, without what all samples share; nothing is copied."""
        return [
            {name: value[row : row + 1] for name, value in batch.items() if name not in self.shared}
            for batch in self.batches
            for row in range(rows_of(batch))
        ]

    def without(self, seen: Collection[bytes]) -> Feeds:
        """The rows whose keys are none of these, and what searches look through; a warning tells how many do not count.

        Raises: BadInput: none of them is left.
        """
        fresh = [key not in seen for key in self.keys]
        if all(fresh):
            return self
        kept, labels = zip(*unlearned(self.labels, fresh), strict=True)
        lost = sum(not keep or one is not other for keep, one, other in zip(kept, labels, self.labels, strict=True))
        if not any(keep and new for keep, new in zip(kept, fresh, strict=True)):
            raise BadInput(
                f"{self.origin}: all {len(kept)} rows that should judge give the network the same inputs as calibration"
                " rows, such as texts whose first --seq-len tokens are equal. Give more samples, or a higher --seq-len."
            )
        if lost:
            log.warning("%s: %d rows that should judge equal a calibration row and do not count", self.origin, lost)
        return replace(self, labels=labels).kept(kept)

    def distinct(self) -> Feeds:
        """The first of rows that are equal; a warning tells how many others are left out."""
        seen: dict[bytes, int] = {}
        kept = [seen.setdefault(key, place) == place for place, key in enumerate(self.keys)]
        if all(kept):
            return self
        log.warning("%s: %d of %d samples repeat others and are left out", self.origin, kept.count(False), len(kept))
        return self.kept(kept)

    def kept(self, marks: Sequence[bool]) -> Feeds:
        """The rows that are marked."""
        batches, start = [], 0
        for batch in self.batches:
            mark = torch.tensor(marks[start : (start := start + rows_of(batch))])
            if mark.any():
                batches.append({name: value if name in self.shared else value[mark] for name, value in batch.items()})
        labels = tuple(label for label, keep in zip(self.labels, marks, strict=True) if keep)
        return replace(self, batches=tuple(batches), labels=labels)


def _width(batch: Batch) -> int:
    """Numbers of a row."""
    return sum(value[:1].numel() for value in batch.values())


def label_digest(label: Label) -> str:
    """A text that differs where labels do."""
    if isinstance(label, ClassMap):
        return label.digest
    return sha256_tensors({"label": label}) if isinstance(label, Tensor) else repr(label)


def rows_of(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(next(iter(batch.values())))


def real_first(values: Tensor, batch: Batch) -> Tensor:
    """(rows, positions) in the order of a readout: real tokens first."""
    mask = batch.get(MASK)
    if mask is None or mask.shape != values.shape:
        return values
    return values.gather(1, mask.argsort(dim=1, descending=True, stable=True))


def row_keys(batch: Batch, shared: Collection[str] = ()) -> Iterator[bytes]:
    """A digest of each row; of inputs with a value for each token only those of real tokens count."""
    mask = batch.get(MASK)
    for row in range(rows_of(batch)):
        digest = hashlib.sha256()
        for name, values in batch.items():
            if name in shared:
                continue
            value = values[row]
            if mask is not None and mask.dim() == 2 and values.shape[:2] == mask.shape:
                value = value[mask[row].bool()]
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(tensor_bytes(value))
        yield digest.digest()


@dataclass(frozen=True)
class Batching:
    """How rows are put together."""

    size: int = 32
    """Most rows of a batch."""
    exact: bool = False
    """A batch has exactly so many rows; those left over are dropped, with a warning."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"batch_size={self.size}: it must be 1 or more, for example 32.")


def grouped(
    rows: Sequence[Batch], labels: Sequence[Label], origin: str, batching: Batching, shared: Batch | None = None
) -> Feeds:
    """Put rows together into batches: those of equal shapes share one, in the order in which their shapes appear.

    Args: rows: each a batch of one. shared: inputs that all rows share.
    Raises: BadInput: no batch is full.
    """
    size, shared = batching.size, shared or {}
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(tuple(value.shape for value in row.values()), []).append(place)
    chunks = [places[start : start + size] for places in alike.values() for start in range(0, len(places), size)]
    full = [chunk for chunk in chunks if len(chunk) == size] if batching.exact else chunks
    dropped = len(rows) - sum(map(len, full))
    if rows and not full:
        raise BadInput(
            f"{origin}: {len(rows)} rows, but the network takes exactly {size} at once, of equal shapes. Give more"
            " samples, or export the network with a free batch axis."
        )
    if dropped:
        log.warning("%s: %d rows do not fill a batch of exactly %d and are left out", origin, dropped, size)
    batches = [
        {name: torch.cat([rows[place][name] for place in chunk]) for name in rows[chunk[0]]} | dict(shared)
        for chunk in full
    ]
    return Feeds(tuple(batches), tuple(labels[place] for chunk in full for place in chunk), origin, tuple(shared))
