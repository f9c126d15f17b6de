"""Which rows calibrate and which judge: drawn by a seed, none in both."""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Sequence

from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import Sample
from optin_deploy.data.targets import Grade, Role
from optin_deploy.errors import BadInput

log = logging.getLogger(__name__)

MIN_SAMPLES = 8
MIN_HELD_OUT = 16


def split(
    samples: Sequence[Sample], *, samples_limit: int, held_out: float = 0.2, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Shuffle with the seed and cut into (calibration, held-out); no row is in both, nor one that equals it.

    Of rows that are equal (text and second text, or the bytes of the image) the first is taken, with a warning.
    A query is in one half with the texts that it should find or is scored against, and with all of its ranking; texts
    that queries of both halves have are in both.
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
    some, others = grouped_halves(together(rows), limit=samples_limit, held_out=held_out, seed=seed)
    return tuple(rows[i] for i in some), tuple(rows[i] for i in others)


def together(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of samples in groups that judge as a whole: a query with its texts, behind it; a ranking; or one sample.

    A text that several queries have is in the group of each.
    """
    places = {sample.label.number: place for place, sample in enumerate(samples) if isinstance(sample.label, Role)}
    groups: dict[Hashable, list[int]] = {}
    for place, sample in enumerate(samples):
        label = sample.label
        if isinstance(label, Grade):
            groups.setdefault(("ranking", label.query), []).append(place)
        elif isinstance(label, Role) and (label.positives or label.scores):
            numbers = (*label.positives, *(number for number, _ in label.scores))
            groups[place] = list(dict.fromkeys([place, *(places[number] for number in numbers if number in places)]))
    known = {place for group in groups.values() for place in group}
    return [*groups.values(), *([place] for place in range(len(samples)) if place not in known)]


def grouped_halves(
    groups: Sequence[Sequence[int]], *, limit: int, held_out: float, seed: int
) -> tuple[list[int], list[int]]:
    """Draw from groups of rows, each of them whole, the places of those for calibration and of those held out.

    As many groups are held out as have the rows that `halves` says, or 16 if their share allows it. A row of several
    groups may be in both halves, but none that stands first in a group that is held out. Groups of one are drawn by
    `halves`, and so are rows where each group has more than half of them.
    Args: see `halves`.
    """
    count = len({place for group in groups for place in group})
    alone = halves(count, limit=limit, held_out=held_out, seed=seed)
    if all(len(group) == 1 for group in groups):
        return alone
    least = min(MIN_HELD_OUT, round(held_out * len(groups)))
    drawn, rest = list(groups), []
    random.Random(seed).shuffle(drawn)
    judging: dict[int, None] = {}
    first: set[int] = set()
    for group in drawn:
        wanted = len(judging) < len(alone[1]) or len(first) < least
        if wanted and len(judging) + sum(place not in judging for place in group) <= count // 2:
            judging.update(dict.fromkeys(group))
            first.add(group[0])
        else:
            rest.append(group)
    if alone[1] and not judging:
        return alone
    calibration = dict.fromkeys(place for group in rest for place in group if place not in first)
    return list(calibration)[:limit], list(judging)


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
