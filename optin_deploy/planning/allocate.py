"""The exact choice of a width for every branch: least summed error within all budgets (a multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from optin_deploy.planning.stray_lines import without_stray_lines

GAP = 1e-6
"""Relative distance to the best sum at which the solver may stop."""


@dataclass(frozen=True, eq=False)
class Options:
    """The widths that one branch may have."""

    counts: np.ndarray
    """Kept units, (options,)."""
    errors: np.ndarray
    """What each width costs in quality, (options,)."""
    costs: np.ndarray
    """What it costs in every budgeted resource, integers, (budgets, options)."""


def least_error(branches: Sequence[Options], limits: Sequence[int]) -> list[int] | None:
    """One width a branch, with the least summed error of all choices whose costs stay within the limits.

    Args: limits: one a budget.
    Returns: kept units a branch; None if nothing fits.
    """
    errors = np.concatenate([options.errors for options in branches])
    costs = np.hstack([options.costs for options in branches]).astype(float)  # (budgets, all options)
    sizes = [len(options.counts) for options in branches]
    one_each = block_diag([np.ones((1, size)) for size in sizes])  # (branches, all options)
    scale = np.maximum(np.array(limits, dtype=float), 1)[:, None]
    room = np.ones(len(limits))
    while True:
        with without_stray_lines():
            found = milp(
                errors / max(float(errors.max()), np.finfo(float).tiny),
                integrality=np.ones(len(errors)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs / scale, -np.inf, room)],
                options={"mip_rel_gap": GAP},
            )
        if found.x is None:
            return None
        chosen = [int(part.argmax()) for part in np.split(found.x, np.cumsum(sizes)[:-1])]
        # The solver calculates in floating point with tolerances; costs are whole numbers and never above the limit.
        spent = [sum(int(x.costs[k, c]) for x, c in zip(branches, chosen, strict=True)) for k in range(len(limits))]
        if all(cost <= limit for cost, limit in zip(spent, limits, strict=True)):
            return [int(x.counts[c]) for x, c in zip(branches, chosen, strict=True)]
        room = room - 1e-7 * (np.array(spent) > np.array(limits))
