"""Widths by error curves: the least summed error of all groups within all limits, where groups' costs may multiply.

A multiple-choice knapsack solves it where costs add up. Where groups meet, costs are linearised around the widths in
hand and solved again: such costs are convex in logarithms, so that the linear limit holds what the exact one allows
around a point on it. Every answer is then corrected and improved by exact costs, and the best one is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.planning.allocate import Options, least_error
from optin_deploy.planning.costs import CostLimit
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.ladder import Ladder
from optin_deploy.planning.polynomial import Widths
from optin_deploy.planning.promising import bound

ROUNDS = 8
"""Rounds of linearisation; the choice mostly stops changing after three."""
REACH = 3
"""Rungs that a group goes down or up at once where there are too many groups to try all."""
ALL = 20_000
"""Pairs of widths of two groups that are still tried all."""
MANY = 200
"""Options of which no more are left to an exact solution: it would take long, and gain little in so large a network."""
LEAST_GAIN = 1e-12
"""Least gain, as a part of the error of the narrowest network; a smaller one is rounding."""


def check_curves(ladders: Sequence[Ladder], curves: Mapping[str, Curve]) -> None:
    """Make sure that there is a curve for each group.

    Raises: BadInput.
    """
    for each in ladders:
        if each.name not in curves:
            raise BadInput(f"--allocation curves: there is no error curve of {each.name}. Measure it, or leave it out.")
        if curves[each.name].counts[-1] != each.units:
            raise BadInput(
                f"--allocation curves: the error curve of {each.name} is of {curves[each.name].counts[-1]} units, but "
                f"the group has {each.units}. Measure the curves of this network."
            )


def least_summed_error(
    ladders: Sequence[Ladder], curves: Mapping[str, Curve], limits: Sequence[CostLimit], start: Widths
) -> dict[str, int]:
    """Return the widths of all groups.

    Args: start: widths that fit.
    """
    trade = _Trade(ladders, [curves[each.name].error(each.counts) for each in ladders], limits)
    around: dict[str, int] | None = dict(start)
    seen: list[dict[str, int]] = []
    found = []
    while around is not None and around not in seen and len(seen) < ROUNDS:
        seen.append(around)
        found.append(trade.grown(trade.corrected(around, start)))
        around = trade.rounded(around)
    best = trade.exchanged(min(found, key=trade.error))
    for _ in range(ROUNDS):
        better = trade.exchanged(trade.grown(trade.corrected(trade.solved(best), best)))
        if trade.error(better) >= trade.error(best):
            break
        linear, best = trade.alike(best, better), better
        if linear:  # the same problem would be solved again
            break
    return best


@dataclass(frozen=True, eq=False)
class _Trade:
    """Groups, what each of their widths costs in quality, and what may be spent."""

    ladders: Sequence[Ladder]
    errors: Sequence[np.ndarray]
    limits: Sequence[CostLimit]

    def error(self, widths: Widths) -> float:
        """Summed over groups."""
        pairs = zip(self.ladders, self.errors, strict=True)
        return sum(float(errors[each.rung[widths[each.name]]]) for each, errors in pairs)

    def rounded(self, around: Widths) -> dict[str, int] | None:
        """Find nearly the best widths as if costs were linear; None: nothing fits then."""
        options, room = self._linear(around)
        found = bound(options, room) if min(room) >= 0 else None
        return None if found is None else self._named(around, found.rounded)

    def solved(self, known: Widths) -> dict[str, int]:
        """Find the best widths as if costs were linear, or return the known ones, which fit, if that takes long."""
        options, room = self._linear(known)
        found = bound(options, room)
        if found is None:
            return dict(known)
        options = found.promising(options, self.error(known), [known[each.name] for each in self.ladders])
        if sum(len(each.counts) for each in options) > MANY:
            return dict(known)
        return self._named(known, least_error(options, room) or [known[each.name] for each in self.ladders])

    def alike(self, one: Widths, other: Widths) -> bool:
        """Return whether costs are the same around two points, as they are everywhere where no groups meet."""
        pairs = zip(self._linear(one)[0], self._linear(other)[0], strict=True)
        return all(np.array_equal(these.costs, those.costs) for these, those in pairs)

    def _linear(self, around: Widths) -> tuple[list[Options], list[int]]:
        """What each width costs while all others stay, and what may be spent on them."""
        options = []
        room = self._room(around)
        for each, errors in zip(self.ladders, self.errors, strict=True):
            costs = self._changes(each, each.counts, around)
            least = costs.min(1)
            room -= least
            options.append(Options(np.array(each.counts), errors, costs - least[:, None]))
        return options, room.tolist()

    def _named(self, widths: Widths, counts: Sequence[int]) -> dict[str, int]:
        return {**widths, **{each.name: count for each, count in zip(self.ladders, counts, strict=True)}}

    def corrected(self, widths: Widths, start: Widths) -> dict[str, int]:
        """Take steps away, those of the least error for what is spent too much, until the exact costs fit."""
        now = dict(widths)
        while True:
            over = np.maximum(-self._room(now), 0)
            if not over.any():
                return now
            steps = []
            for each, errors in zip(self.ladders, self.errors, strict=True):
                rung = each.rung[now[each.name]]
                if rung == 0:
                    continue
                saved = -self._changes(each, each.counts[rung - 1 : rung], now)[:, 0]
                share = float(np.minimum(saved / np.maximum(over, 1), 1)[over > 0].sum())
                if share > 0:
                    steps.append((float(errors[rung - 1] - errors[rung]) / share, each.name, each.counts[rung - 1]))
            if not steps:
                return dict(start)
            _, name, count = min(steps)
            now[name] = count

    def grown(self, widths: Widths) -> dict[str, int]:
        """Give steps to groups, of those that fit the one of the largest gain first."""
        now, room = dict(widths), self._room(widths)
        open_ = dict(enumerate(self.ladders))
        while open_:
            steps = []
            for number, each in list(open_.items()):
                rung = each.rung[now[each.name]] + 1
                cost = self._changes(each, each.counts[rung : rung + 1], now)
                if rung == len(each.counts) or (cost[:, 0] > room).any():
                    del open_[number]  # what does not fit now will not fit later
                    continue
                steps.append((float(self.errors[number][rung] - self.errors[number][rung - 1]), number))
            if steps:
                _, number = min(steps)
                each = self.ladders[number]
                now[each.name] = each.counts[each.rung[now[each.name]] + 1]
                room = self._room(now)
        return now

    def exchanged(self, widths: Widths) -> dict[str, int]:
        """Let groups give up units where another gains more by that, as long as the summed error falls."""
        now = dict(widths)
        least = LEAST_GAIN * sum(float(errors[0]) for errors in self.errors)
        while True:
            before, room = self.error(now), self._room(now)
            for one, other in permutations(range(len(self.ladders)), 2):
                if self._exchange(one, other, now, room, least):
                    room = self._room(now)
            if self.error(now) >= before - least:
                return self.grown(now)

    def _exchange(self, less: int, more: int, now: dict[str, int], room: np.ndarray, least: float) -> bool:
        """Let one group give up units for another, if that gains."""
        giving, taking = self.ladders[less], self.ladders[more]
        rung, taken = giving.rung[now[giving.name]], taking.rung[now[taking.name]]
        lost = self.errors[less] - self.errors[less][rung]
        gained = self.errors[more][taken] - self.errors[more]
        if rung == 0 or lost[rung - 1] + least >= gained[-1]:
            return False
        fewer, wider = giving.counts[:rung], taking.counts[taken + 1 :]
        left = room[:, None] - self._changes(giving, fewer, now)  # (limits, fewer)
        best, chosen = least, None
        for given in self._gives(left, self._changes(taking, wider[:REACH], now), wider):
            if lost[given] + best >= gained[-1]:
                continue
            costs = self._changes(taking, wider, {**now, giving.name: fewer[given]})
            fitting = np.flatnonzero((costs <= left[:, given, None]).all(0))
            if len(fitting) and gained[taken + 1 + fitting[-1]] - lost[given] > best:
                best, chosen = float(gained[taken + 1 + fitting[-1]] - lost[given]), (given, wider[fitting[-1]])
        if chosen is None:
            return False
        now[giving.name], now[taking.name] = fewer[chosen[0]], chosen[1]
        return True

    def _gives(self, left: np.ndarray, needed: np.ndarray, wider: Sequence[int]) -> Sequence[int]:
        """The rungs to which a group may go down: all, or in a large network the next ones and the highest that let
        the other group have one of its next widths, if costs add up.

        Args: left: what is left of each limit then, (limits, rungs). needed: for these widths, (limits, widths).
        """
        rungs = left.shape[1]
        if rungs * len(wider) * len(self.ladders) ** 2 <= ALL:
            return range(rungs)
        enough: np.ndarray = np.all(left[:, :, None] >= needed[:, None, :], axis=0)  # (rungs, widths)
        found = {int(np.flatnonzero(column)[-1]) for column in enough.T if column.any()}
        return sorted({*range(max(0, rungs - REACH), rungs), *found})

    def _room(self, widths: Widths) -> np.ndarray:
        """What is left of each limit, (limits,); below 0: it is exceeded."""
        return np.array([limit.most - limit.resource.total(widths) for limit in self.limits], dtype=np.int64)

    def _changes(self, each: Ladder, counts: Sequence[int], widths: Widths) -> np.ndarray:
        """What each limited cost changes by, (limits, counts)."""
        return np.array([limit.resource.changes(each.name, counts, widths) for limit in self.limits], dtype=np.int64)
