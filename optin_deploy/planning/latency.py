"""The latency table: what the widths of groups take on one engine and device, measured inside the whole network.

A group's share of the time cannot be timed by itself: engines fuse, overlap and keep things in caches. So whole
networks are timed in which all groups of one shape have the same width, and the difference to the dense network is
divided among them. The time of a plan is the dense time less what its groups save; between the measured widths it is
interpolated. Where groups meet in a product, the second to be cut saves less than it would alone: by the part that its
multiply-accumulates tell, on the average over both orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from optin_deploy.common.stored import Stored
from optin_deploy.common.validation import STORED
from optin_deploy.errors import BadInput
from optin_deploy.network.hashing import network_hash
from optin_deploy.planning.costs import Cost
from optin_deploy.planning.polynomial import Widths
from optin_deploy.structure.groups import Layout

HINT = "Measure it again with `optin profile`."
MOST_NS = 10**15
"""Longest time: eleven days."""


@dataclass(frozen=True)
class Steps:
    """What one group takes at a few widths."""

    __pydantic_config__ = STORED

    counts: tuple[int, ...]
    """Kept units, rising; the last one is all."""
    ns: tuple[int, ...]
    """Nanoseconds less than the dense network takes; noise can make them rise or negative; 0 at the end."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        whole = len(self.counts) == len(self.ns) > 0 and self.counts[0] >= 0 == self.ns[-1] and rising
        if not whole or max(map(abs, self.ns)) > MOST_NS:
            raise BadInput(f"latency table: give a time for each width, 0 for all units: {self.counts}, {self.ns}.")

    def saved(self, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return nanoseconds less for each count; a narrower group saves no less, and never less than nothing.

        Below the least measured width no more is known to be saved.
        """
        falling = np.maximum.accumulate(np.maximum(self.ns, 0)[::-1])[::-1]
        found: np.ndarray = np.interp(np.asarray(counts), self.counts, falling)
        return found


@dataclass(frozen=True)
class HeldOut:
    """A plan that the table was not made from."""

    __pydantic_config__ = STORED

    widths: Mapping[str, int]
    predicted_ns: int
    measured_ns: int

    def __post_init__(self) -> None:
        if not 0 < self.measured_ns <= MOST_NS or not 0 <= self.predicted_ns <= MOST_NS:
            raise BadInput(f"latency table: a plan of {self.predicted_ns} ns predicted, {self.measured_ns} measured")

    @property
    def error(self) -> float:
        """Relative to the measured time; above 0: predicted too long."""
        return self.predicted_ns / self.measured_ns - 1


@dataclass(frozen=True)
class LatencyTable(Stored):
    """Times of one network on one engine, device and size of input."""

    schema_version = 2
    older = (None,)
    what = "a latency table of optin-deploy"
    hint = HINT

    dense_ns: int
    """Median of a batch through the dense network."""
    groups: Mapping[str, Steps]
    """Measured steps by name of group; a group that is absent takes the same time at any width."""
    network: str
    """`network.hashing.network_hash` of what was measured."""
    setting: Mapping[str, str | int]
    """Engine, precision, shapes, threads, and the device and versions it was measured with."""
    held_out: tuple[HeldOut, ...] = ()
    """Plans that were measured to see how wrong the table is."""

    def __post_init__(self) -> None:
        if not 0 < self.dense_ns <= MOST_NS:
            raise BadInput(f"latency table: the dense network takes {self.dense_ns} ns")

    def check(self, layout: Layout, setting: Mapping[str, str | int] | None = None) -> None:
        """Make sure that it is of this network, in this setting.

        Raises: BadInput: names what differs.
        """
        units = {name: steps.counts[-1] for name, steps in self.groups.items()}
        other = [
            name for name, all_ in units.items() if name not in layout.by_name or layout.by_name[name].units != all_
        ]
        if other:
            raise BadInput(
                f"latency table: {layout.structure.network.source} has no group {other[0]!r} of that size. {HINT}"
            )
        if self.network != network_hash(layout.structure.network):
            raise BadInput(f"latency table: of another network than {layout.structure.network.source}. {HINT}")
        differences = [
            f"{key} is {self.setting.get(key)!r}, not {value!r}"
            for key, value in (setting or {}).items()
            if self.setting.get(key) != value
        ]
        if differences:
            raise BadInput(f"latency table: measured elsewhere or otherwise: {', '.join(differences)}. {HINT}")

    def merging(self, ns: int, macs: Cost, merged: Cost) -> LatencyTable:
        """Return what to expect of the same network with its tokens merged, in which it takes so many nanoseconds.

        Its groups save less, in proportion to their multiply-accumulates.
        Args: macs, merged: of plans without and with these merges.
        """

        def part(name: str) -> float:
            least = [self.groups[name].counts[0]]
            alone = [int(cost.changes(name, least, cost.whole)[0]) for cost in (merged, macs)]
            return alone[0] / alone[1] if alone[1] else 1.0

        groups = {
            name: replace(steps, ns=tuple(round(part(name) * each) for each in steps.ns))
            for name, steps in self.groups.items()
        }
        return replace(self, dense_ns=ns, groups=groups, held_out=())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict, with the version at the end."""
        return {**asdict(self), "schema_version": self.schema_version}


@dataclass(frozen=True, eq=False)
class TimeCost:
    """A `planning.costs.Resource` in nanoseconds, by a table."""

    table: LatencyTable
    macs: Cost
    """MACs of the same network: they tell what groups that meet in a product save together."""
    option: str = "--latency"
    base: int | None = None
    """Nanoseconds of the network as it was given, where the table's merges tokens; None: it is the table's."""

    @property
    def dense(self) -> int:
        """See `Resource.dense`."""
        return self.table.dense_ns if self.base is None else self.base

    def total(self, widths: Widths) -> int:
        """See `Resource.of`; noise may lead below 0."""
        cut = [name for name in self.table.groups if widths[name] < self.macs.whole[name]]
        return self.table.dense_ns - sum(int(self._saved(name, widths[name], self._last(name, widths))) for name in cut)

    def changes(self, name: str, counts: Sequence[int], widths: Widths) -> np.ndarray:
        """See `Resource.changes`."""
        every = np.array([widths[name], *counts], dtype=np.int64)
        all_ = self.macs.whole[name]
        saved = np.zeros(len(every), dtype=np.int64)
        if name in self.table.groups:
            more = self.macs.changes(name, [all_, *every.tolist()], widths)
            saved += self._saved(name, every, more[0] - more[1:])
        for other in self.macs.polynomial.meets(name) & self.table.groups.keys():
            if widths[other] < self.macs.whole[other]:
                whole = {**widths, other: self.macs.whole[other]}
                counted = every.tolist()
                more = self.macs.changes(name, counted, whole) - self.macs.changes(name, counted, widths)
                saved += self._saved(other, widths[other], self._last(other, widths) + more)
        changed: np.ndarray = saved[0] - saved[1:]
        return changed

    def part(self, name: str, widths: Widths) -> float:
        """Return the part of what a group saves alone that it saves beside these widths of the others."""
        alone = float(self._alone[name][widths[name]])
        return (alone + self._last(name, widths)) / (2 * alone) if alone else 1.0

    def _saved(self, name: str, counts: int | np.ndarray, last: int | np.ndarray) -> np.ndarray:
        """Nanoseconds that a group saves, whole; `last`: what it saves of multiply-accumulates after all others."""
        alone = np.maximum(self._alone[name][counts], 1)
        found: np.ndarray = np.floor(self._steps[name][counts] * (alone + last) / (2 * alone)).astype(np.int64)
        return found

    def _last(self, name: str, widths: Widths) -> int:
        return int(self.macs.changes(name, [self.macs.whole[name]], widths)[0])

    @cached_property
    def _alone(self) -> Mapping[str, np.ndarray]:
        """Multiply-accumulates that each group saves at each width, while all others are whole."""
        whole = self.macs.whole
        return {name: -self.macs.changes(name, range(whole[name] + 1), whole) for name in self.table.groups}

    @cached_property
    def _steps(self) -> Mapping[str, np.ndarray]:
        """Nanoseconds that each group saves at each width, while all others are whole."""
        return {name: steps.saved(np.arange(steps.counts[-1] + 1)) for name, steps in self.table.groups.items()}


TABLE_HEADER = ("groups", "kept", "ms saved by each")


def table_rows(table: LatencyTable) -> list[tuple[str, ...]]:
    """A row a measured width; groups that share their times share a row."""
    rows: list[tuple[str, ...]] = []
    for steps in dict.fromkeys(table.groups.values()):
        names = [name for name, mine in table.groups.items() if mine == steps]
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"
        rows += [(where, str(n), f"{ns / 10**6:.3f}") for n, ns in zip(steps.counts, steps.ns, strict=True)]
    return rows


def held_out_line(table: LatencyTable) -> str:
    """How wrong the table is, in a sentence."""
    errors = np.abs([each.error for each in table.held_out])
    return (
        f"{len(errors)} random plans: predicted times are off by {np.median(errors):.1%} in the median, "
        f"{errors.max():.1%} at worst."
    )
