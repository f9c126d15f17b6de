"""Sizes as polynomials over the widths of groups: a product of axes becomes a sum of terms, and equal terms are one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from optin_deploy.network.axes import Axis

Widths = Mapping[str, int]
"""Kept units of every group, by name."""
Terms = dict[tuple[str, ...], int]
"""How often each product of widths counts; a group that counts twice in a product is named twice, the names sorted."""


Known = Mapping[Axis, str | int]
"""Name of the group that gives a leaf its width, or a size other than the probe's, for some leaves."""


def terms_of(axes: Iterable[Axis], known: Known) -> Terms:
    """Return the product of the sizes of axes; leaves that are not known are numbers."""
    found: Terms = {(): 1}
    for axis in axes:
        found = _product(found, _terms(axis.root, known))
    return found


def _terms(axis: Axis, known: Known) -> Terms:
    if axis.kind == "leaf":
        here = known.get(axis, axis.size)
        return {(here,): 1} if isinstance(here, str) else {(): here}
    if axis.kind == "product":
        return terms_of(axis.parts, known)
    found: Terms = {}
    for part in axis.parts:
        add(found, _terms(part.root, known))
    return found


def _product(one: Terms, other: Terms) -> Terms:
    found: Terms = {}
    for left, many in one.items():
        for right, times in other.items():
            key = tuple(sorted((*left, *right))) if left and right else left or right
            found[key] = found.get(key, 0) + many * times
    return found


def add(terms: Terms, other: Terms, times: int = 1) -> None:
    """Add terms to others, so many times."""
    for key, many in other.items():
        terms[key] = terms.get(key, 0) + many * times


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A sum of products of widths, in whole numbers; no term is negative."""

    terms: Terms = field(default_factory=dict)

    def total(self, widths: Widths) -> int:
        """Return the value at these widths."""
        return sum(many * math.prod(widths[name] for name in names) for names, many in self.terms.items())

    def along(self, name: str, widths: Widths) -> list[int]:
        """Return what multiplies the width of one group, its square, .. while the others have these; 0 first."""
        powers = [0]
        for power, others, many in self._by_group.get(name, ()):
            while len(powers) <= power:
                powers.append(0)
            powers[power] += many * math.prod(widths[other] for other in others)
        return powers

    def meets(self, name: str) -> frozenset[str]:
        """Return the other groups whose widths a group's is multiplied with."""
        return frozenset(other for _, others, _ in self._by_group.get(name, ()) for other in others)

    @cached_property
    def _by_group(self) -> Mapping[str, list[tuple[int, tuple[str, ...], int]]]:
        """Terms of each group: the power of its width, the others of the product, and how often it counts."""
        found: dict[str, list[tuple[int, tuple[str, ...], int]]] = {}
        for names, many in self.terms.items():
            for name in dict.fromkeys(names):
                others = tuple(other for other in names if other != name)
                found.setdefault(name, []).append((len(names) - len(others), others, many))
        return found


def values(powers: Iterable[int], counts: np.ndarray) -> np.ndarray:
    """Evaluate what `Polynomial.along` gives at many widths of the group, in 64 bits."""
    found, power = np.zeros(len(counts), dtype=np.int64), np.ones(len(counts), dtype=np.int64)
    for many in powers:
        found += many * power
        power = power * counts
    return found
