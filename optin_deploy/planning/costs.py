"""What any plan of a network costs, exactly: multiply-accumulates, parameters and bytes, as its algebra tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis
from optin_deploy.planning.budget import Budget, Limits
from optin_deploy.planning.polynomial import Known, Polynomial, Terms, Widths, add, terms_of, values
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import Way, way
from optin_deploy.structure.structure import Structure

MOST = 2**62
"""Largest cost, so that sums fit into 64 bits."""


class Resource(Protocol):
    """What a plan spends, in whole numbers."""

    @property
    def option(self) -> str:
        """What the user calls it, such as --flops."""

    @property
    def dense(self) -> int:
        """Cost of the network as it is."""

    def total(self, widths: Widths) -> int:
        """Return the exact cost at these widths of all groups."""

    def changes(self, name: str, counts: Sequence[int], widths: Widths) -> np.ndarray:
        """Return what the cost changes by if one group has each of these counts, and the others stay as they are.

        Returns: (counts,) whole numbers.
        """


@dataclass(frozen=True, eq=False)
class Copies:
    """A weight that is stored once for each way in which nodes cut it, or whose entries share bytes."""

    ways: tuple[Polynomial, ...]
    groups: tuple[frozenset[str], ...]
    """Groups that are cut along each way."""
    bits: int | None
    """Bits of an entry; None means that entries are counted."""

    def total(self, widths: Widths, whole: Widths) -> int:
        """Return its entries or bytes."""
        cut = [any(widths[name] < whole[name] for name in names) for names in self.groups]
        stored = [self.ways[0].total(whole)] if not all(cut) else []
        stored += [entries.total(widths) for entries, changed in zip(self.ways, cut, strict=True) if changed]
        return sum(int(self._counted(entries)) for entries in stored)

    def along(self, name: str, counts: np.ndarray, widths: Widths, whole: Widths) -> np.ndarray:
        """Return its entries or bytes if one group has each of these counts, (counts,)."""
        found, all_cut = np.zeros(len(counts), dtype=np.int64), np.ones(len(counts), dtype=bool)
        for entries, names in zip(self.ways, self.groups, strict=True):
            others = any(widths[other] < whole[other] for other in names if other != name)
            if name in names:
                powers = entries.along(name, widths)
                stored = entries.total({**widths, name: 0}) + values(powers, counts)
                cut = np.full(len(counts), True) if others else counts < whole[name]
                found += np.where(cut, self._counted(stored), 0)
                all_cut &= cut
            elif others:
                found += self._counted(entries.total(widths))
            else:
                all_cut[:] = False
        return found + np.where(all_cut, 0, self._counted(self.ways[0].total(whole)))

    def _counted(self, entries: int | np.ndarray) -> int | np.ndarray:
        return entries if self.bits is None else -(-entries * self.bits // 8)


@dataclass(frozen=True, eq=False)
class Cost:
    """A `Resource` that is a polynomial, but for a few weights."""

    option: str
    polynomial: Polynomial
    copies: tuple[Copies, ...]
    whole: Widths
    """Units of all groups."""
    base: int | None = None
    """Cost of the network as it was given, if the counted network also merges tokens; None means that it is the same
    network."""

    @cached_property
    def dense(self) -> int:
        """See `Resource.dense`."""
        return self.total(self.whole) if self.base is None else self.base

    def total(self, widths: Widths) -> int:
        """See `Resource.of`."""
        return self.polynomial.total(widths) + sum(each.total(widths, self.whole) for each in self.copies)

    def changes(self, name: str, counts: Sequence[int], widths: Widths) -> np.ndarray:
        """See `Resource.changes`."""
        every = np.array([widths[name], *counts], dtype=np.int64)
        found = values(self.polynomial.along(name, widths), every)
        for each in self._copies_of.get(name, ()):
            found += each.along(name, every, widths, self.whole)
        changed: np.ndarray = found[1:] - found[0]
        return changed

    @cached_property
    def _copies_of(self) -> Mapping[str, list[Copies]]:
        found: dict[str, list[Copies]] = {}
        for each in self.copies:
            for name in frozenset().union(*each.groups):
                found.setdefault(name, []).append(each)
        return found


@dataclass(frozen=True, eq=False)
class Costs:
    """All that the algebra knows of a network's plans."""

    macs: Cost
    """Multiply-accumulates of the probe's inputs."""
    params: Cost
    """Entries of the stored weights that nodes read."""
    size: Cost
    """Bytes of these, in the types in which they are stored."""

    def widths(self, keep: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the widths of all groups, of which some keep these units."""
        return {**self.macs.whole, **{name: len(units) for name, units in keep.items()}}


def costs_of(layout: Layout, sizes: Mapping[Axis, int] | None = None) -> Costs:
    """Find what plans cost.

    Args: sizes: of axes of the inputs, other than those of the probe; they change the multiply-accumulates.
    A group without units costs nothing; what only its units read may go too, and is counted as if it stayed. Two ways
    to cut a weight count as two stored tensors, also where they happen to keep the same units.
    Raises: BadInput: numbers beyond 2^62.
    """
    structure = layout.structure
    names = {group.leaf.root: group.name for group in layout.groups}
    whole = layout.units
    known: Known = {**(sizes or {}), **names}
    terms: Terms = {}
    for _, axes in structure.products:
        add(terms, terms_of(axes, known))
    macs = Cost("--flops", Polynomial(terms), (), whole)
    costs = Costs(
        macs, _stored(structure, names, whole, by_bytes=False), _stored(structure, names, whole, by_bytes=True)
    )
    if max(costs.macs.dense, costs.size.dense) >= MOST:
        raise BadInput(
            f"{structure.network.source}: {costs.macs.dense:.1e} multiply-accumulates and {costs.size.dense:.1e} bytes "
            "are more than can be planned for. Give smaller inputs by --shape."
        )
    return costs


def _stored(structure: Structure, names: Mapping[Axis, str], whole: Widths, *, by_bytes: bool) -> Cost:
    """Entries or bytes of all weights."""
    ways: dict[str, dict[tuple[Way, ...], tuple[Axis, ...]]] = {}
    for use in structure.uses:
        ways.setdefault(use.weight, {})[tuple(way(axis, names) for axis in use.axes)] = use.axes
    terms: Terms = {}
    copies = []
    for weight, found in ways.items():
        dtype = structure.network.weights[weight].dtype
        bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth  # a string is never cut
        each = [terms_of(axes, names) for axes in found.values()]
        if len(each) == 1 and (bits % 8 == 0 or not by_bytes):
            add(terms, each[0], bits // 8 if by_bytes else 1)
            continue
        groups = [frozenset(name for key in one for name in key) for one in each]
        copies.append(Copies(tuple(map(Polynomial, each)), tuple(groups), bits if by_bytes else None))
    return Cost("--size" if by_bytes else "--params", Polynomial(terms), tuple(copies), whole)


@dataclass(frozen=True, eq=False)
class CostLimit:
    """A resource, and the most that a plan may spend of it."""

    resource: Resource
    most: int
    asked: str
    """The limit as the user wrote it, such as --flops 0.6."""
    relative: bool = False
    """Whether the user gave a share of the dense network."""

    def option_for(self, amount: int) -> str:
        """Return the option with which this amount is allowed, rounded up."""
        option = self.resource.option
        if self.relative:
            return f"{option} {-(-(10**4) * amount // self.resource.dense) / 10**4:g}"
        return (
            f"{option} {-(-amount // 2**10)}KiB"
            if option == "--size"
            else f"{option} {math.ceil(amount / 1000) / 1000:g}ms"
        )


def limits_within(costs: Costs, limits: Limits) -> list[CostLimit]:
    """Return the limits of multiply-accumulates, parameters and bytes that a user set; time is measured elsewhere."""
    resources = {cost.option: cost for cost in (costs.macs, costs.params, costs.size)}
    return [_limit(resources[budget.option], budget) for budget in limits.budgets()]


def _limit(resource: Resource, budget: Budget) -> CostLimit:
    # The share as it was typed: 0.29 * 100 is 28.999999999999996 in floating point.
    most = math.floor(Fraction(str(budget.limit)) * resource.dense) if budget.relative else int(budget.limit)
    return CostLimit(resource, most, str(budget), budget.relative)


def fits(limits: Sequence[CostLimit], widths: Widths) -> bool:
    """Return whether widths stay within all limits."""
    return all(limit.resource.total(widths) <= limit.most for limit in limits)
