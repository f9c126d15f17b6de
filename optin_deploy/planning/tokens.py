"""How many tokens are merged in each block, for a mean share of them."""

from __future__ import annotations

from optin_deploy.errors import BadInput
from optin_deploy.structure.tokens import TokenStream, most_merged

EVERY = 3
"""Tokens are merged in every so many blocks, from the second on: in all of them no quality is won, and each merge takes
an engine some forty small operators."""


def schedule(stream: TokenStream, share: float) -> tuple[int, ...]:
    """Return how many tokens go behind the attention of each block, by a straight line from the first block on.

    Args: share: mean over the blocks of the tokens that stay behind their attention, as a part of all.
    Raises: BadInput: even with the most merges more stay.
    """
    every = [_merges(stream, count) for count in range(2 * stream.tokens)]
    found = next((merges for merges, mean in every if mean <= share), None)
    if found is None:
        least = min(mean for _, mean in every)
        raise BadInput(f"--tokens {share:g}: at least {least:.3f} of the tokens stay in the mean, if half of them go.")
    return found


def _merges(stream: TokenStream, halves: int) -> tuple[tuple[int, ...], float]:
    """Merges if so many halves of a token go for each block, and the mean share that stays."""
    merges, left, total = list[int](), stream.tokens, 0
    for number in range(len(stream.blocks)):
        wanted = left - (stream.tokens - halves * number // 2)
        most = most_merged(left, stream.protected) if number and (number - 1) % EVERY == 0 else 0
        merges.append(min(max(0, wanted), most))
        left -= merges[-1]
        total += left
    return tuple(merges), total / (len(stream.blocks) * stream.tokens)
