"""What stays of each group of units, for people: a row for each block of the network, and a sentence for the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from optin_deploy.structure.blocks import by_block
from optin_deploy.structure.labels import KINDS

HEADER = ("where", "what stays")


@dataclass(frozen=True)
class KeptGroup:
    """How many units of a group stay."""

    name: str
    kind: str
    kept: int
    units: int | None
    """Units before the cut; None means that they are not known."""

    @property
    def whole(self) -> bool:
        """Do all stay?"""
        return self.kept == self.units


def kept_of(keep: Mapping[str, Sequence[int]], units: Mapping[str, int]) -> list[KeptGroup]:
    """Groups of a plan.

    Args: keep: kept units by name of group. units: how many there were, of all groups, as far as that is known.
    """
    names = dict.fromkeys((*units, *keep))
    counts = {name: len(keep[name]) if name in keep else units[name] for name in names}
    return [KeptGroup(name, _kind(name), counts[name], units.get(name)) for name in names]


def kept_rows(groups: Sequence[KeptGroup]) -> list[tuple[str, str]]:
    """Rows of HEADER for what was cut; blocks in a row of which the same stays share one."""
    by_name = {group.name: group for group in groups}
    rows: list[tuple[str, str]] = []
    for block, inner in by_block(by_name).items():
        text = _listed([(within, by_name[name]) for within, name in inner if not by_name[name].whole])
        if text:
            rows.append((block, text))
    same = [(text, [block for block, _ in rows]) for text, rows in groupby(rows, key=lambda row: row[1])]
    return [(where, text) for text, blocks in same for where in _joined(blocks)]


def kept_lines(groups: Sequence[KeptGroup]) -> list[str]:
    """One sentence about all units of the kinds that were cut, and one about the groups that were not."""
    whole = [group for group in groups if group.whole]
    cut = {group.kind for group in groups if not group.whole}
    lines = []
    if cut:
        lines.append(f"There stay {_all(group for group in groups if group.kind in cut)}.")
    if whole:
        counts = Counter(group.kind for group in whole)
        listed = ", ".join(f"{many:,} of {kind}" for kind, many in counts.items())
        lines.append(f"Nothing was cut in {len(whole):,} of {len(groups):,} groups: {listed}.")
    return lines


def _kind(name: str) -> str:
    """What is said after the colon; a number that tells two groups apart is none of it."""
    kind = re.sub(r" \d+$", "", name.rpartition(": ")[2])
    return kind if kind in KINDS else "units"


def _listed(groups: Sequence[tuple[str, KeptGroup]]) -> str:
    """Groups of one block; those of a kind that it has twice with their place in it."""
    many = Counter(group.kind for _, group in groups)
    return ", ".join(
        (f"{within}: " if many[group.kind] > 1 and within else "") + _amount(group.kept, group.units, group.kind)
        for within, group in groups
    )


def _amount(kept: int, units: int | None, kind: str) -> str:
    return f"{kept:,} {kind}" if units is None else f"{kept:,} of {units:,} {kind}"


def _all(groups: Iterable[KeptGroup]) -> str:
    found: dict[str, list[KeptGroup]] = {}
    for group in groups:
        found.setdefault(group.kind, []).append(group)
    return ", ".join(
        _amount(
            sum(group.kept for group in these),
            None if any(group.units is None for group in these) else sum(group.units or 0 for group in these),
            kind,
        )
        for kind, these in found.items()
    )


def _joined(blocks: Sequence[str]) -> list[str]:
    """Name entries of a list that follow each other as one: `layer.0 to 3`."""
    found: list[list[str]] = []
    for block in blocks:
        stem, _, number = block.rpartition(".")
        last = found[-1][-1] if found else ""
        if number.isdigit() and last == f"{stem}.{int(number) - 1}":
            found[-1].append(block)
        else:
            found.append([block])
    return [first if not more else f"{first} to {more[-1].rpartition('.')[2]}" for first, *more in found]
