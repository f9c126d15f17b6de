"""Turn a budget and unit scores into keep-masks: exact costs, never over the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from optin_deploy.allocate import Options, least_error
from optin_deploy.cost.macs import MacCost
from optin_deploy.curves import Curve, Curves
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.scoring.scores import Scores

ALLOCATIONS = ("uniform", "paper", "curves")


@dataclass(frozen=True)
class Budget:
    """How much may stay."""

    limit: float
    relative: bool = True
    """True: limit is a share of the dense MACs, in (0, 1]; False: MACs of one sample."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit) or self.limit <= 0 or (self.relative and self.limit > 1):
            raise BadInput(f"--flops {self.limit}: give the share of MACs to keep, in (0, 1], for example 0.6.")

    def macs(self, cost: MacCost) -> int:
        """The limit in MACs of one sample.

        Raises: InfeasibleBudget: below what the unprunable layers cost.
        """
        # The share as it was typed: 0.29 * 100 is 28.999999999999996 in floating point.
        limit = math.floor(Fraction(str(self.limit)) * cost.dense) if self.relative else int(self.limit)
        if limit < cost.fixed:
            least = -(-100 * cost.fixed // cost.dense) / 100
            raise InfeasibleBudget(
                f"{limit / cost.dense:.3f} of the dense MACs asked, but the unprunable layers alone are "
                f"{cost.fixed / cost.dense:.3f}. Use --flops {least:.2f} or more."
            )
        return limit


def search(
    scores: Scores,
    layout: ModelLayout,
    cost: MacCost,
    budget: Budget,
    *,
    align: int = 16,
    allocation: str = "uniform",
    curves: Curves | None = None,
) -> Masks:
    """Choose the heads and neurons to keep.

    Args:
        align: neurons are kept in multiples of this (or all of a layer's).
        allocation: `uniform`: the same number of heads and neurons in every layer, the best units inside;
            `paper`: one ranking of all heads and one of all neurons over the whole model;
            `curves`: the widths of least summed error by the error curves, the best units inside.
        curves: of this model and these scores; needed by `curves` alone.
    The first two try every number of kept heads, fill the rest of the budget with neurons, and keep the pair of the
    largest total score (Khaki & Plataniotis, ICLR 2024, algorithm 1).
    Raises: BadInput, InfeasibleBudget.
    """
    check_search(align, allocation)
    scores.check(layout)
    heads = [_Ranked(s.numpy(), 1, c) for s, c in zip(scores.heads, cost.head, strict=True)]
    neurons = [_Ranked(s.numpy(), align, c) for s, c in zip(scores.neurons, cost.neuron, strict=True)]
    room = budget.macs(cost) - cost.fixed
    if allocation == "curves":
        if curves is None:
            raise BadInput("--allocation curves needs error curves: measure them with `error_curves`.")
        curves.check(layout)
        groups = _least_error((*heads, *neurons), (*curves.heads, *curves.neurons), room)
    else:
        order = _by_depth if allocation == "uniform" else _by_score
        some_heads, some_neurons = _best_pair(order(heads), order(neurons), room)
        layers = range(len(layout.layers))
        groups = [*(some_heads.count(i) for i in layers), *(some_neurons.count(i) for i in layers)]
    kept = [ranked.keep(count) for ranked, count in zip((*heads, *neurons), groups, strict=True)]
    return Masks(tuple(kept[: len(heads)]), tuple(kept[len(heads) :]), layout.hash)


def check_search(align: int, allocation: str) -> None:
    """Refuse impossible options.

    Raises: BadInput.
    """
    if allocation not in ALLOCATIONS:
        raise BadInput(f"unknown --allocation {allocation!r}; possible: {', '.join(ALLOCATIONS)}.")
    if align < 1:
        raise BadInput(f"--align {align}: give a positive number of neurons, for example 16.")


class _Ranked:
    """A layer's units, best first, in groups of `align` that are kept together; the last group may be smaller."""

    def __init__(self, scores: np.ndarray, align: int, unit_cost: int) -> None:
        self.order = np.argsort(-scores, kind="stable")
        bounds = [*range(0, len(scores), align), len(scores)]
        self.sizes = np.diff(bounds)
        self.ends = bounds[1:]
        self.values = np.add.reduceat(scores[self.order], bounds[:-1])
        self.costs = self.sizes * unit_cost

    def keep(self, groups: int) -> tuple[bool, ...]:
        kept = np.zeros(len(self.order), dtype=bool)
        kept[self.order[: self.ends[groups - 1] if groups else 0]] = True
        return tuple(kept.tolist())


def _least_error(branches: Sequence[_Ranked], curves: Sequence[Curve], room: int) -> list[int]:
    """Kept groups of each branch."""
    options = []
    for ranked, curve in zip(branches, curves, strict=True):
        counts = np.array([0, *ranked.ends])
        costs = np.array([0, *np.cumsum(ranked.costs)])
        options.append(Options(np.arange(len(counts)), curve.at(counts), costs[np.newaxis]))
    found = least_error(options, [room])
    assert found is not None  # keeping nothing is always within the room
    return found


Step = tuple[list[int], float, int]
"""Layers that get one more group, the score this adds, and its cost."""


def _by_score(layers: Sequence[_Ranked]) -> list[Step]:
    """One group at a time, best score per cost first, over all layers (inside a layer always best first)."""
    groups = []
    for index, layer in enumerate(layers):
        # Best first inside a layer holds for sums too, but for rounding: a later group must not come before.
        worth = np.minimum.accumulate(layer.values / layer.costs)
        for position, rank in enumerate(worth):
            groups.append((-rank, index, position, layer.values[position], layer.costs[position]))
    return [([index], float(value), int(cost)) for _, index, _, value, cost in sorted(groups, key=lambda g: g[:3])]


def _by_depth(layers: Sequence[_Ranked]) -> list[Step]:
    """One more group in every layer at once; layers of different size advance in proportion."""
    depth = max(len(layer.values) for layer in layers)
    steps: list[Step] = []
    for step in range(depth):
        picked = [
            (index, position)
            for index, layer in enumerate(layers)
            for position in range(step * len(layer.values) // depth, (step + 1) * len(layer.values) // depth)
        ]
        value = sum(float(layers[i].values[p]) for i, p in picked)
        steps.append(([i for i, _ in picked], value, int(sum(layers[i].costs[p] for i, p in picked))))
    return steps


def _best_pair(heads: list[Step], neurons: list[Step], limit: int) -> tuple[list[int], list[int]]:
    """Layer indices of the kept head groups and neuron groups, within `limit` MACs."""
    head_value, head_cost = _running(heads)
    neuron_value, neuron_cost = _running(neurons)
    affordable = np.searchsorted(neuron_cost, limit - head_cost, side="right") - 1  # neuron steps beside h head steps
    total = np.where(head_cost <= limit, head_value + neuron_value[np.maximum(affordable, 0)], -np.inf)
    best = len(total) - 1 - int(total[::-1].argmax())  # of equal totals the one with most heads: they cost nothing more
    return (
        [layer for step in heads[:best] for layer in step[0]],
        [layer for step in neurons[: affordable[best]] for layer in step[0]],
    )


def _running(steps: list[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Value and cost of the first 0, 1, 2, ... steps."""
    return np.cumsum([0.0, *(s[1] for s in steps)]), np.cumsum([0, *(s[2] for s in steps)])


def make_plan(masks: Masks, layout: ModelLayout, cost: MacCost) -> PruningPlan:
    """Masks as indices, with the exact cost of what stays."""
    heads, neurons = (
        tuple(tuple(int(u) for u in np.flatnonzero(keep)) for keep in kept) for kept in (masks.heads, masks.neurons)
    )
    return PruningPlan(
        heads=heads,
        neurons=neurons,
        layout_hash=layout.hash,
        macs_dense=cost.dense,
        macs_pruned=cost.of([len(h) for h in heads], [len(n) for n in neurons]),
        macs_fixed=cost.fixed,
        tokens=cost.tokens,
    )
