"""Turn budgets and unit scores into keep-masks: exact costs, never over a budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from optin_deploy.allocate import Options, least_error
from optin_deploy.arguments import whole
from optin_deploy.budget import Budget, Limit
from optin_deploy.cost.macs import MacCost
from optin_deploy.cost.units import UnitCost
from optin_deploy.curves import Curve, Curves
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.scoring.scores import Scores

ALLOCATIONS = ("curves", "uniform", "paper")
LEAST_SHARE = 1e-12
"""Of a budget: what costs less counts as this much. Time does not always grow with the width."""


def search(
    scores: Scores,
    layout: ModelLayout,
    cost: UnitCost,
    budget: Budget,
    *,
    align: int = 16,
    allocation: str = "uniform",
    curves: Curves | None = None,
) -> Masks:
    """Choose the heads and neurons to keep under one budget; see `search_within`.

    Raises: BadInput, InfeasibleBudget.
    """
    limits = [(cost, budget.within(cost))]
    return search_within(scores, layout, limits, align=align, allocation=allocation, curves=curves)


def search_within(
    scores: Scores,
    layout: ModelLayout,
    limits: Sequence[Limit],
    *,
    align: int = 16,
    allocation: str = "uniform",
    curves: Curves | None = None,
    emptying: bool = True,
) -> Masks:
    """Choose the heads and neurons to keep, within several limits at once.

    Args:
        limits: one or more; each at least the fixed part of its cost.
        align: neurons are kept in multiples of this (or all of a layer's).
        allocation: `curves`: the widths of least summed error by the error curves, the best units inside;
            `uniform`: the same number of heads and neurons in every layer, the best units inside;
            `paper`: one ranking of all heads and one of all neurons over the whole model.
        curves: of this model and these scores; needed by `curves` alone.
        emptying: whether `curves` may leave a branch without any unit.
    The last two try every number of kept heads, fill the rest of the budgets with neurons, and keep the pair of the
    largest total score (Khaki & Plataniotis, ICLR 2024, algorithm 1).
    Raises: BadInput. InfeasibleBudget: a limit below what no plan can cut.
    """
    check_search(align, allocation)
    scores.check(layout)
    room = np.array([limit - cost.fixed for cost, limit in limits])
    if (room < 0).any():
        asked = ", ".join(f"{limit} of at least {cost.fixed}" for cost, limit in limits)
        raise InfeasibleBudget(f"a limit is below what no plan can cut: {asked}. Allow more.")
    costs = [cost for cost, _ in limits]
    heads, neurons = [], []
    for index, (of_heads, of_neurons) in enumerate(zip(scores.heads, scores.neurons, strict=True)):
        widths = len(of_heads), len(of_neurons)
        heads.append(_Ranked(of_heads.numpy(), 1, [cost.of_heads(index, widths[0]) for cost in costs]))
        neurons.append(_Ranked(of_neurons.numpy(), align, [cost.of_neurons(index, widths[1]) for cost in costs]))
    if allocation == "curves":
        if curves is None:
            raise BadInput("--allocation curves needs error curves: measure them with `error_curves`.")
        curves.check(layout)
        groups = _least_error((*heads, *neurons), (*curves.heads, *curves.neurons), room, emptying=emptying)
    else:
        order = _by_depth if allocation == "uniform" else partial(_by_score, room=room)
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
    if whole(align, "--align") < 1:
        raise BadInput(f"--align {align}: give a positive number of neurons, for example 16.")


def check_align(align: int, layout: ModelLayout) -> None:
    """Refuse a multiple that no layer holds: each FFN would be kept whole or lost.

    Raises: BadInput: names the largest possible.
    """
    widest = max((layer.neurons for layer in layout.layers), default=0)
    if align > widest > 0:
        raise BadInput(
            f"--align {align}: the widest FFN of this model has {widest} neurons, so that every FFN would be kept "
            f"whole or lost. Give --align {widest} or less; 16 suits CPUs, 64 GPUs."
        )


def default_align(layout: ModelLayout, preferred: int = 16) -> int:
    """Neurons in multiples of this if the user says nothing: what kernels like, or all where there are fewer."""
    return min(preferred, max(layer.neurons for layer in layout.layers))


def check_units(limits: Sequence[Limit], layout: ModelLayout, macs: MacCost, *, align: int, allocation: str) -> None:
    """Refuse, before the long work, limits under which nothing that computes would be left of the model.

    A model without fixed MACs (an encoder alone) needs room for at least one unit; any other has them.
    Raises: InfeasibleBudget: says the least that is possible.
    """
    if macs.fixed:
        return
    for cost, limit in limits:
        heads = [int(cost.of_heads(i, x.heads)[1]) for i, x in enumerate(layout.layers)]
        neurons = [int(cost.of_neurons(i, x.neurons)[min(align, x.neurons)]) for i, x in enumerate(layout.layers)]
        every_layer = allocation == "uniform"
        least = cost.fixed + min((sum(heads), sum(neurons)) if every_layer else (*heads, *neurons))
        if limit < least:
            where = "every layer" if every_layer else "one layer"
            option = "--flops" if cost is macs else "--params or --size"
            raise InfeasibleBudget(
                f"{option}: {limit / cost.dense:.2g} of the dense model leaves no room for a head, or {align} neurons, "
                f"in {where}: nothing that computes would be left. Allow "
                f"{-(-(10**6) * least // cost.dense) / 10**6:g} or more."
            )


class _Ranked:
    """A layer's units, best first, in groups of `align` that are kept together; the last group may be smaller."""

    def __init__(self, scores: np.ndarray, align: int, costs: Sequence[np.ndarray]) -> None:
        """Args: costs: of 0, 1, ... all kept units, in every budget."""
        self.order = np.argsort(-scores, kind="stable")
        bounds = [*range(0, len(scores), align), len(scores)]
        self.ends = bounds[1:]
        self.values = np.add.reduceat(scores[self.order], bounds[:-1])
        self.costs = np.diff(np.array(costs, dtype=np.int64)[:, bounds])  # (budgets, groups)

    def keep(self, groups: int) -> tuple[bool, ...]:
        kept = np.zeros(len(self.order), dtype=bool)
        kept[self.order[: self.ends[groups - 1] if groups else 0]] = True
        return tuple(kept.tolist())


def _least_error(
    branches: Sequence[_Ranked], curves: Sequence[Curve], room: np.ndarray, *, emptying: bool
) -> list[int]:
    """Kept groups of each branch."""
    options, least = [], 0 if emptying else 1
    for ranked, curve in zip(branches, curves, strict=True):
        counts = np.array([0, *ranked.ends])
        costs = np.pad(np.cumsum(ranked.costs, axis=1), ((0, 0), (1, 0)))
        groups = np.arange(least, len(counts))
        options.append(Options(groups, curve.at(counts[groups]), costs[:, groups]))
    found = least_error(options, room.tolist())
    if found is None:  # keeping nothing is always within the room
        raise InfeasibleBudget("the limits leave no room for a unit in every branch. Allow more.")
    return found


Step = tuple[list[int], float, np.ndarray]
"""Layers that get one more group, the score this adds, and its costs (budgets,)."""


def _by_score(layers: Sequence[_Ranked], room: np.ndarray) -> list[Step]:
    """One group at a time, best score per cost first, over all layers (inside a layer always best first).

    Of several budgets, the cost of a group is the sum of its shares of them.
    """
    groups = []
    for index, layer in enumerate(layers):
        # Best first inside a layer holds for sums too, but for rounding: a later group must not come before.
        shares = (layer.costs / np.maximum(room, 1)[:, None]).sum(0).clip(min=LEAST_SHARE)
        worth = np.minimum.accumulate(layer.values / shares)
        for position, rank in enumerate(worth):
            groups.append((-rank, index, position, layer.values[position], layer.costs[:, position]))
    return [([index], float(value), costs) for _, index, _, value, costs in sorted(groups, key=lambda g: g[:3])]


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
        steps.append(([i for i, _ in picked], value, np.sum([layers[i].costs[:, p] for i, p in picked], axis=0)))
    return steps


def _best_pair(heads: list[Step], neurons: list[Step], room: np.ndarray) -> tuple[list[int], list[int]]:
    """Layer indices of the kept head groups and neuron groups, within the room of every budget."""
    head_value, head_costs = _running(heads)
    neuron_value, neuron_costs = _running(neurons)
    left = room[:, None] - head_costs
    # Neuron steps that fit beside h head steps, by the tightest budget.
    fitting = [np.searchsorted(costs, some, side="right") - 1 for costs, some in zip(neuron_costs, left, strict=True)]
    affordable = np.min(fitting, axis=0)
    total = np.where((left >= 0).all(0), head_value + neuron_value[np.maximum(affordable, 0)], -np.inf)
    best = len(total) - 1 - int(total[::-1].argmax())  # of equal totals the one with most heads: they cost nothing more
    return (
        [layer for step in heads[:best] for layer in step[0]],
        [layer for step in neurons[: affordable[best]] for layer in step[0]],
    )


def _running(steps: list[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Value (steps + 1,) and costs (budgets, steps + 1) of the first 0, 1, 2, ... steps."""
    costs = np.cumsum([step[2] for step in steps], axis=0).T
    return np.cumsum([0.0, *(step[1] for step in steps)]), np.pad(costs, ((0, 0), (1, 0)))


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


def check_plan(plan: PruningPlan) -> PruningPlan:
    """The plan, if anything that computes is left of the model.

    Raises: InfeasibleBudget.
    """
    if plan.macs_pruned == 0:
        raise InfeasibleBudget("the plan keeps no unit, and the rest of this model computes nothing. Allow more.")
    return plan
