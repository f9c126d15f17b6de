"""Widths by scores: units of one kind are a pool with an order in which it grows; two pools share what may be spent.

`uniform` grows all groups of a pool by the same share, `paper` by one ranking of all their units, best score per cost
first. Where units of different kinds are scored in one measure, every size of one pool is tried with the largest of
the other that fits, and the pair of the largest total score is kept (Khaki & Plataniotis, ICLR 2024, algorithm 1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import combinations

import numpy as np

from optin_deploy.planning.costs import CostLimit, fits
from optin_deploy.planning.ladder import Ladder, narrowest
from optin_deploy.planning.polynomial import Widths

LEAST_SHARE = 1e-12
"""Least cost as a share of a limit; anything cheaper counts as this much. Time does not always grow with the width."""

Scores = Mapping[str, np.ndarray]
"""A score for each unit of each group; higher = keep."""
Step = tuple[int, int]
"""A ladder by number, and the rung that it climbs to."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Groups of one kind, and the order in which they grow from their least widths to all units."""

    ladders: Sequence[Ladder]
    steps: Sequence[Sequence[Step]]
    places: Sequence[Fraction | float]
    """How much of the pool stays before the first step and after each, from 0 to 1, never falling."""
    scores: Scores = field(repr=False)

    @cached_property
    def counts(self) -> np.ndarray:
        """Kept units before the first step and after each, (steps + 1, ladders)."""
        now = [each.counts[0] for each in self.ladders]
        found = [tuple(now)]
        for step in self.steps:
            for number, rung in step:
                now[number] = self.ladders[number].counts[rung]
            found.append(tuple(now))
        return np.array(found)

    @cached_property
    def totals(self) -> np.ndarray:
        """Summed scores of what stays, (steps + 1,)."""
        values = [each.values(self.scores[each.name]) for each in self.ladders]
        now = sum(float(each[0]) for each in values)
        at, found = [0] * len(values), [now]
        for step in self.steps:
            for number, rung in step:
                now += float(values[number][rung] - values[number][at[number]])
                at[number] = rung
            found.append(now)
        return np.array(found)

    def widths(self, size: int) -> dict[str, int]:
        """Return the widths after so many steps."""
        return {each.name: int(count) for each, count in zip(self.ladders, self.counts[size], strict=True)}


def by_share(ladders: Sequence[Ladder], scores: Scores) -> Pool:
    """Let each group have the share of its units that is nearest to one share for all; none is empty but all are."""
    changes: dict[Fraction, list[Step]] = {}
    between = [(number, rung) for number, each in enumerate(ladders) for rung in range(1, len(each.counts))]
    halves = {
        (number, rung): Fraction(sum(ladders[number].counts[rung - 1 : rung + 1]), 2 * ladders[number].units)
        for number, rung in between
    }
    first = min(halves.values())
    for number, rung in between:
        place = halves[number, rung] if ladders[number].counts[rung - 1] else first
        changes.setdefault(place, []).append((number, rung))
    places = sorted(changes)
    return Pool(ladders, [changes[place] for place in places], [Fraction(0), *places], scores)


def by_score(ladders: Sequence[Ladder], scores: Scores, limits: Sequence[CostLimit], whole: Widths) -> Pool:
    """Let the steps of all groups come by score per cost; of one group in the order of its widths.

    Costs are those in the whole network; of several limits, the sum of shares of what may be spent on units.
    """
    least = narrowest(ladders, whole)
    rooms = [max(1, limit.most - limit.resource.total(least)) for limit in limits]
    ranked = []
    for number, each in enumerate(ladders):
        costs = [np.diff(limit.resource.changes(each.name, each.counts, whole)) for limit in limits]
        shares = np.sum([cost / room for cost, room in zip(costs, rooms, strict=True)], axis=0).clip(min=LEAST_SHARE)
        # Best first inside a group holds for sums too, but for rounding: a later step must not come before.
        worth = np.minimum.accumulate(np.diff(each.values(scores[each.name])) / shares)
        ranked += [
            (-rank, number, rung + 1, share) for rung, (rank, share) in enumerate(zip(worth, shares, strict=True))
        ]
    ranked.sort(key=lambda step: step[:3])
    gone = np.cumsum([0.0, *(share for *_, share in ranked)])
    return Pool(ladders, [[(number, rung)] for _, number, rung, _ in ranked], (gone / gone[-1]).tolist(), scores)


def together(pools: Sequence[Pool], limits: Sequence[CostLimit], whole: Widths) -> list[int]:
    """Return the largest sizes that fit of which all pools keep the same part; the least sizes are known to fit."""
    places = sorted({place for pool in pools for place in pool.places})

    def sizes(place: Fraction | float) -> list[int]:
        return [bisect_right(pool.places, place) - 1 for pool in pools]

    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(limits, widths_of(pools, sizes(places[middle]), whole)):
            low = middle
        else:
            high = middle - 1
    return sizes(places[low])


def largest_total(pools: Sequence[Pool], limits: Sequence[CostLimit], whole: Widths) -> list[int]:
    """Return the sizes of the largest total score: two pools at a time, until no two can do better."""
    sizes = together(pools, limits, whole)
    if len(pools) == 2:
        return _best_pair(pools, sizes, (0, 1), limits, whole)
    changed = True
    while changed:
        changed = False
        for pair in combinations(range(len(pools)), 2):
            found = _best_pair(pools, sizes, pair, limits, whole)
            if _total(pools, found) > _total(pools, sizes):
                sizes, changed = found, True
    return sizes


def _best_pair(
    pools: Sequence[Pool], sizes: Sequence[int], pair: tuple[int, int], limits: Sequence[CostLimit], whole: Widths
) -> list[int]:
    """Try every size of one pool with the largest of the other that fits; the others stay as they are, which fit."""
    found, best, (one, other) = list(sizes), list(sizes), pair
    found[other] = len(pools[other].steps)
    for size in range(len(pools[one].steps) + 1):
        found[one] = size
        while found[other] >= 0 and not fits(limits, widths_of(pools, found, whole)):
            found[other] -= 1
        if found[other] < 0:
            break
        # Of equal totals the one with most of the first pool.
        if _total(pools, found) >= _total(pools, best):
            best = list(found)
    return best


def _total(pools: Sequence[Pool], sizes: Sequence[int]) -> float:
    return sum(float(pool.totals[size]) for pool, size in zip(pools, sizes, strict=True))


def widths_of(pools: Sequence[Pool], sizes: Sequence[int], whole: Widths) -> dict[str, int]:
    """Return the widths of all groups."""
    found = dict(whole)
    for pool, size in zip(pools, sizes, strict=True):
        found.update(pool.widths(size))
    return found


def filled(pools: Sequence[Pool], sizes: Sequence[int], limits: Sequence[CostLimit], whole: Widths) -> dict[str, int]:
    """Return the widths, with what still fits of the steps that come later; each group stops where it does not fit."""
    widths = widths_of(pools, sizes, whole)
    left = [limit.most - limit.resource.total(widths) for limit in limits]
    stopped = set()
    for name, count in _later(pools, sizes):
        if name in stopped:
            continue
        more = [int(limit.resource.changes(name, [count], widths)[0]) for limit in limits]
        if all(cost <= room for cost, room in zip(more, left, strict=True)):
            widths[name] = count
            left = [room - cost for cost, room in zip(more, left, strict=True)]
        else:
            stopped.add(name)
    return widths


def _later(pools: Sequence[Pool], sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    for pool, size in zip(pools, sizes, strict=True):
        for step in pool.steps[size:]:
            for number, rung in step:
                yield pool.ladders[number].name, pool.ladders[number].counts[rung]
