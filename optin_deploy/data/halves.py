"""Which rows calibrate and which judge: drawn by a seed, none in both."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput

log = logging.getLogger(__name__)

MIN_SAMPLES = 8
MIN_HELD_OUT = 16


def split(
    samples: Sequence[Sample], *, samples_limit: int, held_out: float = 0.2, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Shuffle with the seed and cut into (calibration, held-out); no row is in both, nor one that equals it.

    Of rows that are equal (text and second text, or the bytes of the image) the first is taken, with a warning.
    Args: samples_limit, held_out: see `halves`.
    Raises: BadInput: fewer than 8 different samples, or an option out of range.
    """
    rows = list(distinct(samples))
    repeats = len(samples) - len(rows)
    if repeats:
        log.warning("%d of %d calibration samples repeat others and are left out", repeats, len(samples))
    if len(rows) < MIN_SAMPLES:
        where = f" (from {samples[0].source})" if samples else ""
        kind = f"different ones among {len(samples)} calibration samples" if repeats else "calibration samples in all"
        raise too_few(len(rows), kind + where)
    some, others = halves(len(rows), limit=samples_limit, held_out=held_out, seed=seed)
    return tuple(rows[i] for i in some), tuple(rows[i] for i in others)


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
