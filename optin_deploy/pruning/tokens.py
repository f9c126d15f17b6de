"""Tokens and widths under one budget: how many tokens each block merges, and what widths that leaves room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.planning.budget import Limits, check_tokens
from optin_deploy.planning.costs import CostLimit, limits_within
from optin_deploy.planning.plan import describe_merges, plan_of
from optin_deploy.planning.tokens import Growth, growth, schedule, tried
from optin_deploy.planning.widths import Choice, Keep, check_choice
from optin_deploy.pruning.pruning import Curves, pick
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.trial import error_of, unseen_error
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.labels import TOKENS
from optin_deploy.structure.tokens import TokenStream

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
"""Mean shares of the tokens that are tried."""
TRIED = 3
"""Merges that are made and measured, with the widths beside them."""


def merging(ready: Ready, choice: Choice, share: float | None) -> Choice:
    """Return the choice with merges that leave a share of the tokens in the mean of all blocks; None: with none.

    Raises: BadInput: the network has no tokens that can be merged.
    """
    if share is None:
        if choice.drops and TOKENS not in choice.kinds:
            raise BadInput("--drop-tokens says how tokens go: give --tokens 0.7, or --units heads,neurons,tokens.")
        return choice
    check_tokens(share)
    schedule(ready.stream, share)  # before anything is measured
    merges = schedule(ready.stream, share, growths(ready, drops=choice.drops))
    return replace(choice, merges=_dropped(merges) if choice.drops else merges)


def check(ready: Ready, limits: Limits, choice: Choice) -> None:
    """Make sure that something can be cut, and enough of it.

    Raises: BadInput, InfeasibleBudget.
    """
    merges = choice.merges
    if set(choice.kinds) == {TOKENS}:
        raise BadInput(
            "--units tokens needs widths beside it, such as heads,neurons,tokens. To cut none of them, leave out "
            "--units and give --tokens 0.7 --flops 1."
        )
    if TOKENS in choice.kinds and not merges:
        if choice.allocation != "curves":
            raise BadInput(f"--units tokens needs error curves: leave out --allocation {choice.allocation}.")
        merges = _reachable(ready.stream, SHARES)[-1]
        merges = _dropped(merges) if choice.drops else merges
    costs = ready.costs_with(merges)
    most = costs.macs.total(costs.macs.whole)
    if most > costs.macs.dense:
        if choice.merges:
            merged = describe_merges(merges, of_text=ready.stream.of_text)
            raise BadInput(
                f"that {merged}, takes more multiply-accumulates than it saves: {most:,} instead of "
                f"{costs.macs.dense:,}. Give a lower --tokens, or leave it out."
            )
        costs = ready.costs
    check_choice(ready.layout, limits_within(costs, limits), choice)


def schedules(ready: Ready, shares: Iterable[float] = SHARES, *, drops: bool = False) -> list[tuple[int, ...]]:
    """Return merges for each share of the tokens, falling, that a network can be brought to.

    Args: drops: tokens are dropped, not merged.
    """
    found = _reachable(ready.stream, shares, growths(ready, drops=drops))
    return [_dropped(merges) for merges in found] if drops else found


def _reachable(
    stream: TokenStream, shares: Iterable[float], errors: Sequence[Growth] | None = None
) -> list[tuple[int, ...]]:
    found = []
    for share in shares:
        try:
            found.append(schedule(stream, share, errors))
        except BadInput:
            break
    return found


def growths(ready: Ready, *, drops: bool) -> list[Growth]:
    """Return what it costs if tokens go in each block alone, measured with all widths; in the first none go.

    Args: drops: tokens are dropped, not merged.
    """
    return ready.kept(("growths", drops), lambda: _growths(ready, drops))


def _growths(ready: Ready, drops: bool) -> list[Growth]:
    stream = ready.stream
    found, (less, more) = [Growth()], tried(stream)
    one = tuple(int(at > 0) for at in range(len(stream.blocks)))
    with suppress(BadInput):  # too few tokens: each block is proven alone
        ready.merging(_dropped(one) if drops else one)
    for block in range(1, len(stream.blocks)):
        few, many = (tuple(count * (at == block) for at in range(len(stream.blocks))) for count in (less, more))
        errors = [merge_error(ready, _dropped(merges) if drops else merges) for merges in (few, many)]
        found.append(growth((less, more), (errors[0], errors[1])))
    return found


def _dropped(merges: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-count for count in merges)


def least_error(
    ready: Ready,
    scores: UnitScores,
    choice: Choice,
    curves: Curves,
    limits: Callable[[tuple[int, ...]], Sequence[CostLimit]],
    merges: Sequence[tuple[int, ...]],
) -> tuple[tuple[int, ...], Keep]:
    """Return the merges and the kept units of least error.

    What is expected is a sum: of the widths by their curves, and of the merges as measured with all widths. The few of
    the least are made and measured as a whole, on samples that their repair has not seen.
    Args: limits: of the widths beside given merges. merges: those that are tried.
    Raises: InfeasibleBudget: nothing fits.
    """
    found: list[tuple[float, tuple[int, ...], Keep]] = []
    problem: InfeasibleBudget | None = None
    for some in merges:
        try:
            keep = pick(ready, scores, limits(some), choice, curves, emptying=not any(some))
        except InfeasibleBudget as err:
            problem = err
            continue
        widths = sum(float(curves[name].error([len(units)])[0]) for name, units in keep.items())
        found.append((widths + merge_error(ready, some), some, keep))
    if not found:
        assert problem is not None
        raise problem
    best = sorted(found, key=lambda each: each[0])[:TRIED]
    if len(best) == 1:
        return best[0][1:]
    errors = [unseen_error(ready, plan_of(ready.layout, keep, merges=some)) for _, some, keep in best]
    return best[int(np.argmin(errors))][1:]


def merge_error(ready: Ready, merges: tuple[int, ...]) -> float:
    """Mean distance of the outputs to the dense ones if nothing but tokens is merged, as error curves measure it."""
    if not any(merges):
        return 0.0
    return ready.kept(("merge error", merges), lambda: error_of(ready, ready.merging(merges)))
