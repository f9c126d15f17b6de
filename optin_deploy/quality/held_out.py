"""Which calibration samples judge, where the others fit a compensation; and how samples are joined to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Batch, rows_of

JUDGED_EVERY = 4
"""Every fourth sample measures the error, of a large calibration set fewer; the others fit the compensation."""
MOST_JUDGED = 128
"""Samples that measure the error."""
JUDGED_BATCH = 32
"""Small batches are joined until they have so many judged samples."""


def judged_samples(batches: Sequence[Batch]) -> list[Tensor]:
    """Which samples judge, (rows,) a batch; they are spread over all lengths.

    Raises: BadInput: too few samples to fit and to judge.
    """
    total = sum(map(rows_of, batches))
    if total < JUDGED_EVERY:
        raise BadInput(
            f"{total} calibration samples are too few for error curves: give at least {JUDGED_EVERY} "
            "(--samples), or choose --allocation uniform."
        )
    return list(torch.split(spread(total, JUDGED_EVERY, MOST_JUDGED), [rows_of(batch) for batch in batches]))


def spread(total: int, every: int, most: int) -> Tensor:
    """Every fourth of all samples, say, or fewer of them, so that they are at most so many; (total,) of bool."""
    every = max(every, -(-total // most))
    return torch.arange(total) % every == every - 1


def joined(batches: Sequence[Batch], marks: Sequence[Tensor]) -> list[Batch]:
    """The marked samples in batches of a useful size."""
    groups: list[list[Batch]] = []
    for batch, mark in zip(batches, marks, strict=True):
        if not mark.any():
            continue
        some = samples_of(batch, mark)
        if not groups or sum(map(rows_of, groups[-1])) >= JUDGED_BATCH or not _alike(groups[-1][0], some):
            groups.append([])
        groups[-1].append(some)
    return [{name: stacked([batch[name] for batch in group]) for name in group[0]} for group in groups]


def samples_of(batch: Batch, mark: Tensor) -> Batch:
    """The marked samples of a batch; mark: (rows,), bool."""
    return {name: value[mark.to(value.device)] for name, value in batch.items()}


def _alike(one: Batch, other: Batch) -> bool:
    """Whether both can be one batch; only an attention mask tells padding from tokens."""
    if one.keys() != other.keys():
        return False
    texts = "attention_mask" in one
    return all(
        value.shape[1:] == other[name].shape[1:] or (texts and value.dim() == other[name].dim() == 2)
        for name, value in one.items()
    )


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Join rows of one input: (rows, tokens, ...) each, or all of one size -> (all rows, most tokens, ...).

    Texts are padded with zeros.
    """
    if values[0].dim() < 2:
        return torch.cat(list(values))
    longest = max(value.shape[1] for value in values)
    return torch.cat([_padded(value, longest) for value in values])


def _padded(value: Tensor, longest: int) -> Tensor:
    if value.shape[1] == longest:
        return value
    return nn.functional.pad(value, (0, 0) * (value.dim() - 2) + (0, longest - value.shape[1]))
