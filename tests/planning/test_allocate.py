"""The integer program finds what trying every combination finds, and never exceeds a budget."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from optin_deploy.planning.allocate import Options, least_error


def brute_force(branches: list[Options], limits: list[int]) -> float | None:
    """The least error of all combinations within the limits."""
    best = None
    for chosen in itertools.product(*(range(len(x.counts)) for x in branches)):
        spent = sum(x.costs[:, c] for x, c in zip(branches, chosen, strict=True))
        if all(a <= b for a, b in zip(spent, limits, strict=True)):
            error = sum(float(x.errors[c]) for x, c in zip(branches, chosen, strict=True))
            best = error if best is None else min(best, error)
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Options], list[int]]:
    """Up to four branches with widths of their own, one or two resources, costs as large as MACs are."""
    budgets = draw(st.integers(1, 2))
    unit = draw(st.sampled_from([1, 3_145_728, 27_262_976_001]))
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        options = draw(st.integers(2, 5))
        errors = draw(st.lists(st.floats(0, 10), min_size=options, max_size=options))
        costs = draw(st.lists(st.integers(1, 9), min_size=budgets, max_size=budgets))
        counts = np.arange(options) * draw(st.integers(1, 16))
        branches.append(Options(counts, np.array(errors), np.outer(costs, counts) * unit))
    most = sum(x.costs[:, -1] for x in branches)
    return branches, [int(top * draw(st.floats(0, 1))) for top in most]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_equals_brute_force(problem: tuple[list[Options], list[int]]) -> None:
    branches, limits = problem
    counts = least_error(branches, limits)
    assert counts is not None, "keeping nothing costs nothing"
    places = [x.counts.tolist().index(count) for x, count in zip(branches, counts, strict=True)]
    spent = sum(x.costs[:, p] for x, p in zip(branches, places, strict=True))
    assert all(a <= b for a, b in zip(spent, limits, strict=True))
    error = sum(float(x.errors[p]) for x, p in zip(branches, places, strict=True))
    best = brute_force(branches, limits)
    assert best is not None
    scale = max(float(x.errors.max()) for x in branches)
    assert error <= best + 1e-5 * scale, (error, best)


def test_what_cannot_be_kept_within_the_limit_is_told() -> None:
    branch = Options(np.array([4, 8]), np.array([1.0, 0.0]), np.array([[4, 8]]))
    assert least_error([branch], [3]) is None
    assert least_error([branch], [4]) == [4]


def test_a_limit_that_is_met_exactly_is_within() -> None:
    """Costs near 1e11, where the solver's relative tolerance is many units."""
    cost = 98_765_432_101
    branch = Options(np.array([0, 1]), np.array([1.0, 0.0]), np.array([[0, cost]]))
    assert least_error([branch], [cost]) == [1]
    assert least_error([branch], [cost - 1]) == [0]


PRINTED = r"""
import os, sys
import numpy as np
from optin_deploy.planning.allocate import Options, least_error
from optin_deploy.planning.stray_lines import STRAY, without_stray_lines
rng = np.random.default_rng(14)
units = np.arange(38)
errors = [np.sort(rng.random(38) ** 3)[::-1] for _ in range(23)]
branches = [Options(units, each, units[None] * rng.integers(1000, 10**7)) for each in errors]
least_error(branches, [int(sum(each.costs[0, -1] for each in branches) * 0.6)])
print("planned", flush=True)
with without_stray_lines():
    os.write(1, b"of another thread\n" + STRAY + b"\n")
"""


def test_the_solver_prints_nothing_and_what_others_print_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["planned", "of another thread"]
