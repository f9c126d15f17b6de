"""Random signs that depend on a sample's content, not on its place: the same on every device, in every batch.

A counter-based generator: sign j of row i of a sample is a bit of mix(mix(key ^ stream) + counter(i, j)), with the
finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014). Signs have mean 0 and variance 1, which is all that an
unbiased estimate of a squared norm needs, and their fourth moment is the smallest possible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.feeds.rows import MASK, Batch
from optin_deploy.files.storage import tensor_bytes

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
ROW_WORDS = 2**32
"""Counters a row: longer than any row, so that padding does not move the signs of the next one."""
BITS = 8
"""Signs are looked up a byte at a time."""
SEGMENTS = "token_type_ids"
"""The input that tells two texts of one sample apart; it follows from its tokens."""


def sample_keys(batch: Batch) -> tuple[int, ...]:
    """A number for each sample that depends on its content alone, not on its place or padding."""
    valid = batch.get(MASK)
    main = [batch[name] for name in sorted(batch) if name not in (MASK, SEGMENTS)] or list(batch.values())
    found = []
    for row in range(len(main[0])):
        digest = hashlib.sha256()
        for value in main:
            padded = valid is not None and valid.shape == value.shape[:2]
            digest.update(tensor_bytes(value[row][valid[row].bool()] if padded and valid is not None else value[row]))
        found.append(int.from_bytes(digest.digest()[:6], "little"))
    return tuple(found)


def drawn(batches: Sequence[Batch], keys: Sequence[int]) -> list[Batch]:
    """The rows with these keys, each once; rows of equal width share a batch."""
    wanted = set(keys)
    rows: dict[tuple[torch.Size, ...], list[Batch]] = {}
    for batch in batches:
        for row, key in enumerate(sample_keys(batch)):
            if key in wanted:
                wanted.remove(key)
                one = {name: value[row : row + 1] for name, value in batch.items()}
                rows.setdefault(tuple(value.shape for value in one.values()), []).append(one)
    return [{name: torch.cat([row[name] for row in same]) for name in same[0]} for same in rows.values()]


def stream(seed: int, name: str, index: int) -> int:
    """A signed 64-bit number for one use of noise: a seed, what it is for, and which probe."""
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def signs(keys: Sequence[int], number: int, rows: int, columns: int, *, like: Tensor) -> Tensor:
    """Independent +1 and -1, (samples, rows, columns), with the dtype and device of `like`.

    Args: keys: of the samples. number: of the stream. More rows or columns leave those before as they were.
    """
    device = like.device
    start = _mix(torch.tensor(keys, dtype=torch.int64, device=device) ^ number)
    words = -(-columns // 64)
    row = torch.arange(rows, device=device).unsqueeze(1) * ROW_WORDS
    counters = (row + torch.arange(words, device=device)) * GOLDEN  # (rows, words)
    drawn = _mix(start.view(-1, 1, 1) + counters)
    table = torch.arange(2**BITS).unsqueeze(1) >> torch.arange(BITS) & 1
    table = (2 * table - 1).to(like)  # (256, 8)
    return table[drawn.view(torch.uint8).int()].view(len(keys), rows, -1)[..., :columns]


def uniform_order(keys: Sequence[int], number: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in random order for each sample, (samples, columns): the smallest K draw K places."""
    start = _mix(torch.tensor(keys, dtype=torch.int64, device=device) ^ number)
    return _mix(start.unsqueeze(1) + torch.arange(columns, device=device) * GOLDEN)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in MIX:
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 31)


def _right(x: Tensor, shift: int) -> Tensor:
    """Logical shift of int64, which torch shifts with its sign."""
    return (x >> shift).bitwise_and(2 ** (64 - shift) - 1)
