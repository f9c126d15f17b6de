"""How many tokens go in each block, for a mean share of them: where that costs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.structure.tokens import TokenStream, most_merged

EVERY = 3
"""Tokens go in at most one of so many blocks, where that is enough: each merge takes an engine some forty small
operators."""
POWERS = 1.0, 4.0
"""Bounds of the power with which an error grows with the number of tokens."""
PRICES = -30.0, 30.0
"""Logarithms of the prices of a token between which is sought."""
STEPS = 40


@dataclass(frozen=True)
class Growth:
    """What it costs if so many of all tokens go in one block: scale * count ** power.

    Where some are gone already, what goes counts as the same part of all.
    """

    scale: float = 1.0
    power: float = 2.0

    def error(self, counts: np.ndarray) -> np.ndarray:
        """Errors for these numbers of tokens."""
        return np.asarray(self.scale * counts**self.power)


def growth(counts: tuple[int, int], errors: tuple[float, float]) -> Growth:
    """Return what goes through the larger of two measured errors, and near the other."""
    (less, more), (low, high) = counts, errors
    if less == more or min(errors) <= 0:
        return Growth(max(high, 0.0) / more**2)
    power = min(max(log(high / low) / log(more / less), POWERS[0]), POWERS[1])
    return Growth(high / more**power, power)


def tried(stream: TokenStream) -> tuple[int, int]:
    """Return two numbers of tokens by which errors are measured, an eighth and three eighths of all."""
    most = most_merged(stream.tokens, stream.protected)
    return max(1, min(stream.tokens // 8, most)), max(1, min(3 * stream.tokens // 8, most))


def schedule(stream: TokenStream, share: float, errors: Sequence[Growth] | None = None) -> tuple[int, ...]:
    """Return how many tokens go behind the attention of each block, for the least sum of errors; none go in the first.

    They go in at most a third of the blocks, where that is enough.
    Args:
        share: mean over the blocks of the tokens that stay behind their attention, as a part of all.
        errors: of each block alone; None: it is the same in all.
    Raises: BadInput: even if as many go as can, more stay.
    """
    depth = len(stream.blocks)
    errors = errors or [Growth()] * depth
    for blocks in range(max(1, (depth + 1) // EVERY), max(2, depth)):
        fewest = _priced(stream, errors, blocks, np.inf)
        if mean_share(stream, fewest) <= share:
            return _least(stream, share, errors, blocks)
    least = mean_share(stream, fewest)
    raise BadInput(f"--tokens {share:g}: at least {least:.3f} of the tokens stay in the mean, if half of them go.")


def mean_share(stream: TokenStream, merges: Sequence[int]) -> float:
    """Return the mean over the blocks of the tokens that stay behind their attention, as a part of all."""
    left, total = stream.tokens, 0
    for count in merges:
        left -= count
        total += left
    return total / (len(merges) * stream.tokens)


def _least(stream: TokenStream, share: float, errors: Sequence[Growth], blocks: int) -> tuple[int, ...]:
    """Merges in so many blocks of least error for a share that can be had.

    A price of each token that stays in a block is sought at which the share is met; what is too much is given back.
    """
    low, high = PRICES
    found = _priced(stream, errors, blocks, np.inf)
    for _ in range(STEPS):
        middle = (low + high) / 2
        merges = _priced(stream, errors, blocks, np.exp(middle))
        if mean_share(stream, merges) <= share:
            found, high = merges, middle
        else:
            low = middle
    return _given_back(stream, share, errors, found)


def _priced(stream: TokenStream, errors: Sequence[Growth], blocks: int, price: float) -> tuple[int, ...]:
    """Merges in so many blocks of least error and price; a price that is infinite: as many as can.

    From the last block back: the least for each number of tokens before a block, and of blocks that may still merge.
    """
    most = np.array([most_merged(number, stream.protected) for number in range(stream.tokens + 1)])
    left, count = np.ogrid[: stream.tokens + 1, 1 : stream.tokens // 2 + 1]
    behind, each = np.maximum(left - count, 0), 1.0 if np.isinf(price) else price
    parts = count * (stream.tokens / np.maximum(left, 1))
    rest, choices = np.zeros((stream.tokens + 1, blocks + 1)), []
    for block in reversed(range(len(stream.blocks))):
        known = 0.0 if np.isinf(price) else errors[block].error(parts)
        allowed = count <= (most[:, None] if block else 0)
        best, chosen = each * left + rest, np.zeros(rest.shape, dtype=int)
        for uses in range(1, blocks + 1):
            costs = np.where(allowed, known + each * behind + rest[behind, uses - 1], np.inf)
            least = costs.argmin(1)
            merging = costs[left[:, 0], least] < best[:, uses]
            best[merging, uses] = costs[left[:, 0], least][merging]
            chosen[merging, uses] = least[merging] + 1
        rest = best
        choices.append(chosen)
    merges, tokens, uses = list[int](), stream.tokens, blocks
    for chosen in reversed(choices):
        merges.append(int(chosen[tokens, uses]))
        tokens, uses = tokens - merges[-1], uses - bool(merges[-1])
    return tuple(merges)


def _given_back(
    stream: TokenStream, share: float, errors: Sequence[Growth], merges: tuple[int, ...]
) -> tuple[int, ...]:
    """Merges without those that the share does not need, the costliest first."""
    while True:
        fewer = [
            tuple(count - (at == block) for at, count in enumerate(merges))
            for block, wanted in enumerate(merges)
            if wanted
        ]
        possible = [some for some in fewer if mean_share(stream, some) <= share]
        if not possible:
            return merges
        merges = min(possible, key=lambda some: expected(stream, errors, some))


def expected(stream: TokenStream, errors: Sequence[Growth], merges: Sequence[int]) -> float:
    """Return the sum of the errors of some merges."""
    left = stream.tokens - np.cumsum([0, *merges[:-1]])
    parts = np.array(merges) * stream.tokens / left
    return float(sum(each.error(part) for each, part in zip(errors, parts, strict=True)))
