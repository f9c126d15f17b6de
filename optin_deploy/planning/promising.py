"""Bound a multiple-choice knapsack by its linear programme: a good choice at once, and what no better one can have.

The prices of what is spent and of each branch (the dual solution) tell how much more an option costs than its branch
must cost at least. If that is more than a known choice lies above the bound, no better choice has this option
(Sinha & Zoltners, The multiple-choice knapsack problem, Operations Research, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag

from optin_deploy.planning.allocate import Options

SLACK = 1e-9
"""Allowance for rounding, as a part of the largest error."""


@dataclass(frozen=True, eq=False)
class Bound:
    """The linear programme of a knapsack, solved."""

    rounded: list[int]
    """Kept units of each branch: of the options that the programme mixes, the cheaper one; mostly within the limits."""
    least: float
    """No choice has a smaller sum of errors."""
    excess: tuple[np.ndarray, ...]
    """Least amount by which any choice with an option lies above this sum, for each option."""

    def promising(self, branches: Sequence[Options], error: float, known: Sequence[int]) -> list[Options]:
        """Return the options that a choice of a smaller sum of errors than a known one may have, and the known ones."""
        found = []
        for options, excess, count in zip(branches, self.excess, known, strict=True):
            here = (self.least + excess < error) | (options.counts == count)
            found.append(Options(options.counts[here], options.errors[here], options.costs[:, here]))
        return found


def bound(branches: Sequence[Options], limits: Sequence[int]) -> Bound | None:
    """Solve the programme; None: nothing fits.

    Args: branches: their counts ascend, and so do costs. limits: one a budget.
    """
    errors = np.concatenate([options.errors for options in branches])
    largest = max(float(errors.max()), np.finfo(float).tiny)
    scale = np.maximum(np.array(limits, dtype=float), 1)[:, None]
    costs = np.hstack([options.costs for options in branches]) / scale  # (budgets, all options)
    sizes = [len(options.counts) for options in branches]
    found = linprog(
        errors / largest,
        A_ub=costs,
        b_ub=np.ones(len(limits)),
        A_eq=block_diag([np.ones((1, size)) for size in sizes]),
        b_eq=np.ones(len(branches)),
        method="highs",
    )
    if found.x is None:
        return None
    splits = np.cumsum(sizes)[:-1]
    mixed = [np.flatnonzero(part > SLACK) for part in np.split(found.x, splits)]
    reduced = errors / largest - found.ineqlin.marginals @ costs - np.repeat(found.eqlin.marginals, sizes) - SLACK
    return Bound(
        [int(options.counts[part[0]]) for options, part in zip(branches, mixed, strict=True)],
        float(found.fun) * largest,
        tuple(np.split(reduced * largest, splits)),
    )
