"""The noise of scoring by plain integers: signs, streams, keys of samples, and the tokens that are drawn."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from support.tiny_scoring import Batch, rows

Pick = Callable[[Batch, int], list[int]]
"""Places of the tokens of one sample that are compared, in order."""
GOLDEN, ALL_BITS = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64, as published."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & ALL_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & ALL_BITS
    return x ^ x >> 31


def word(key: int, number: int, counter: int) -> int:
    """64 random bits of a sample."""
    return splitmix(splitmix((key ^ number) & ALL_BITS) + counter * GOLDEN & ALL_BITS)


def signs_of(key: int, number: int, height: int, width: int) -> Tensor:
    """+1 and -1, (height, width)."""
    bits = [[word(key, number, (i << 32) + j // 64) >> j % 64 & 1 for j in range(width)] for i in range(height)]
    return 2.0 * torch.tensor(bits, dtype=torch.float64) - 1


def stream_of(seed: int, name: str, index: int) -> int:
    """Number of one use of noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()[:8], "little")


def key_of(sample: Batch) -> int:
    """Of the content of a batch of one."""
    if "pixel_values" in sample:
        values = sample["pixel_values"].flatten().tolist()
        data = struct.pack(f"<{len(values)}d", *values)
    else:
        ids = sample["input_ids"][0, real_tokens(sample, 0)].tolist()
        data = struct.pack(f"<{len(ids)}q", *ids)
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "little")


def real_tokens(batch: Batch, i: int) -> list[int]:
    """All tokens of a text that are no padding; all patches and the class token of an image."""
    if "attention_mask" in batch:
        return [j for j, real in enumerate(batch["attention_mask"][i].tolist()) if real]
    return list(range(1 + (batch["pixel_values"].shape[-1] // 4) ** 2))


def drawn_tokens(count: int, seed: int) -> Pick:
    """Those real tokens with the smallest random numbers (as signed integers), smallest first."""

    known: dict[tuple[int, ...], list[int]] = {}

    def pick(batch: Batch, i: int) -> list[int]:
        key, places = key_of(rows(batch, [i])), real_tokens(batch, i)
        if (key, *places) not in known:
            drawn = {place: word(key, stream_of(seed, "tokens", 0), order) for order, place in enumerate(places)}
            order = sorted(drawn, key=lambda place: drawn[place] - (drawn[place] >> 63 << 64))
            known[(key, *places)] = order[:count]
        return known[(key, *places)]

    return pick
