"""Whether a classifier and the labels of its rows number the classes in the same way.

With labels in another order than the model's, accuracy is at or below guessing, and pruning seems to raise it. Guessing
here keeps the shares: a row is right by chance with the probability (share of its label) x (share of that prediction),
summed over classes. All bounds are exact binomial ones, so that a few rows of a weak model prove nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optin_deploy.errors import BadInput

log = logging.getLogger(__name__)

SURE = 0.01
"""Probability at which something is no accident."""
LIKELY = 0.05
"""Probability at which a model is believed to be better than guessing."""
LEAST_SKILL = 0.15
"""Share of the way from guessing to always right; a model that may be guessing, and surely has less, is refused."""
ENOUGH_ROWS = 30
"""Rows of which a useful model gets surely more right than by guessing; with fewer a warning would often be false."""
LISTED = 10
"""Classes of another order that a message names."""

Indices = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class LabelOrder:
    """How labels and predictions of the same rows go together."""

    rows: int
    right: int
    """Rows whose prediction is their label."""
    guessed: float
    """Rows that guessing gets right; one in `classes` where all labels are the same."""
    classes: int
    other: Mapping[int, int] | None
    """Prediction by label, if another order fits rows that it was not found by, beyond chance and better than this."""
    fitting: int
    """Rows that are right in the other order."""

    @property
    def verdict(self) -> str:
        """`fine`; `refused`: no better than guessing; `unclear`: perhaps so."""
        share = self.guessed / self.rows
        if at_least(self.right, self.rows, share) < LIKELY:
            return "fine" if self.other is None else "unclear"
        # A model that gives each row the most frequent class is often right, and may be a good one.
        share = min(share, 1 / self.classes)
        below = 1 - at_least(self.right + 1, self.rows, share) < SURE
        useless = at_least(self.right, self.rows, share) >= LIKELY and (
            upper_bound(self.right, self.rows) < share + LEAST_SKILL * (1 - share)
        )
        if self.other is not None or below or useless:
            return "refused"
        return "unclear" if self.right <= self.guessed or self.rows >= ENOUGH_ROWS else "fine"


def check_order(
    labels: Indices,
    predicted: Indices,
    names: Sequence[str],
    origin: str,
    *,
    what: str = "rows",
    shares: Shares | None = None,
) -> None:
    """Refuse a classifier that is no better than guessing on labelled rows; warn where the rows do not tell.

    Args:
        labels, predicted: class indices, one a row.
        names: of all classes.
        origin: the file of the labels.
        what: what has a label, such as rows or tokens.
        shares: see `compared`.

    Raises: BadInput: names the order that would fit, if there is one.
    """
    found = compared(labels, predicted, len(names), shares)
    message = (
        f"{origin}: the dense model is right on {found.right} of {found.rows} labelled {what}, and guessing on "
        f"{found.guessed:.1f}."
    )
    if found.other is not None:
        moved = [f"{names[i]!r} -> {names[j]!r}" for i, j in sorted(found.other.items()) if i != j]
        more = f" and {len(moved) - LISTED} more" if len(moved) > LISTED else ""
        message += (
            " The labels seem to stand in another order than the model's:"
            f" {found.fitting} {what} are right with {', '.join(moved[:LISTED])}{more} (label in the data -> class of"
            " the model)."
        )
    if found.verdict == "refused":
        raise BadInput(
            f"{message} No loss of accuracy can be measured there. Correct the labels, or id2label in the model's"
            " config.json, or give rows of the model's own task; without labels, agreement with the dense model counts."
        )
    if found.verdict == "unclear":
        log.warning("%s Do these labels fit the model?", message)


def compared(labels: Indices, predicted: Indices, classes: int, shares: Shares | None = None) -> LabelOrder:
    """Count what is right, what guessing gets right, and whether another order of the labels fits.

    Args: shares: of all predictions, (classes,), where rows of some labels alone are given; None: these are all rows.
    """
    rows, right = len(labels), labels == predicted
    present = np.union1d(labels, predicted)  # the other classes tell nothing
    wanted, given = np.searchsorted(present, labels), np.searchsorted(present, predicted)
    some = shares is not None
    shares = np.bincount(given, minlength=len(present)) / rows if shares is None else shares[present]
    # Where all rows are of one class, the predictions' shares are no guess: they are what is judged.
    guessed = float(shares[wanted].sum()) if some or len(np.unique(wanted)) > 1 else rows / classes
    fits = np.zeros(rows, bool)  # each half in the order that the other half shows
    by_chance = 0.0
    halves = np.random.default_rng(0).permutation(rows) % 2  # rows may alternate between classes
    for part in (0, 1):
        here = halves == part
        order = _best_order(wanted[~here], given[~here], len(present))
        fits[here] = order[wanted[here]] == given[here]
        by_chance += float(shares[order[wanted[here]]].sum())
    gains, losses = int((fits & ~right).sum()), int((right & ~fits).sum())
    surely = at_least(int(fits.sum()), rows, by_chance / rows) < SURE and at_least(gains, gains + losses, 0.5) < SURE
    order = _best_order(wanted, given, len(present))
    other = {int(present[i]): int(present[order[i]]) for i in np.unique(wanted)} if surely else None
    return LabelOrder(rows, int(right.sum()), guessed, classes, other, int((order[wanted] == given).sum()))


def _best_order(labels: Indices, predicted: Indices, classes: int) -> Indices:
    """The prediction that each label should have so that most rows are right (an assignment problem); (classes,)."""
    from scipy.optimize import linear_sum_assignment

    together = np.zeros((classes, classes))
    np.add.at(together, (labels, predicted), 1)
    together += np.eye(classes) / (classes + 1)  # among equally good orders the one that moves least
    order: Indices = linear_sum_assignment(together, maximize=True)[1]
    return order


def at_least(right: int, rows: int, share: float) -> float:
    """Probability that at least so many of the rows are right if each is with the probability `share`."""
    from scipy.special import betainc

    return 1.0 if right <= 0 else 0.0 if right > rows else float(betainc(right, rows - right + 1, share))


def upper_bound(right: float, rows: int) -> float:
    """The greatest probability of being right that so few right rows do not surely exclude (Clopper-Pearson)."""
    from scipy.special import betaincinv

    return 1.0 if right >= rows else float(betaincinv(right + 1, rows - right, 1 - SURE))
