"""Which rows calibrate and which judge: drawn by a seed, none in both."""

from __future__ import annotations

import random

from optin_deploy.errors import BadInput

MIN_SAMPLES = 8
MIN_HELD_OUT = 16


def halves(count: int, *, limit: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw from `count` different rows, in random order, the places of those for calibration and of those held out.

    Where the limit leaves enough rows over, the held-out rows (a quarter of the limit, at least 16) come from
    those; otherwise the share `held_out` of all rows is cut off, and calibration gets the rest.
    Args: limit: the most rows for calibration. held_out: a fraction in [0, 0.5]; 0 gives no held-out rows.
    Raises: BadInput: an option out of range.
    """
    if limit < 1 or not 0 <= held_out <= 0.5:
        raise BadInput(
            f"samples_limit={limit}, held_out={held_out}: the limit must be 1 or more, and the held-out share"
            " lie between 0 and 0.5. The defaults are 512 (--samples) and 0.2."
        )
    rows = list(range(count))
    random.Random(seed).shuffle(rows)
    share = max(1, round(held_out * count)) if held_out else 0
    spare = count - limit
    if spare >= min(MIN_HELD_OUT, share):
        size = min(spare, most_held_out(limit)) if held_out else 0
        return rows[:limit], rows[limit : limit + size]
    return rows[: count - share], rows[count - share :]


def most_held_out(limit: int) -> int:
    """Rows that are held out where there are plenty."""
    return max(MIN_HELD_OUT, limit // 4)


def too_few(count: int, kind: str) -> BadInput:
    """Make the error for fewer rows than scores can be had from."""
    return BadInput(
        f"{count} {kind}, but {MIN_SAMPLES} are the least: some are held out to"
        " measure agreement, and scores from fewer are mostly noise. Add samples; a few hundred are good."
    )
