"""Whether labels rank rows as the dense network does: where a random order does as well, no loss can be measured.

The mean and the spread of a figure over all orders of the rows are exact, and the bounds are those of a normal
distribution, so that a few rows of a weak network prove nothing. Classes are judged alike in `data.label_order`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from statistics import NormalDist

from optin_deploy.data.label_order import ENOUGH_ROWS, LEAST_SKILL, LIKELY, SURE
from optin_deploy.errors import BadInput

log = logging.getLogger(__name__)

SURELY, LIKELIER = NormalDist().inv_cdf(1 - SURE), NormalDist().inv_cdf(1 - LIKELY)
"""Standard deviations above guessing at which a figure is surely, or likely, no accident."""
SPREAD = 1.06
"""Variance of Fisher's z of a Spearman correlation, times rows - 3 (Fieller, Hartley & Pearson, 1957)."""


@dataclass(frozen=True)
class Skill:
    """A figure of the dense network by labels, beside that of a random order."""

    title: str
    found: float
    guessed: float
    """Its mean over all orders."""
    spread: float
    """Its standard deviation over all orders."""
    upper: float
    """The greatest figure on endless rows that these ones do not surely exclude."""
    rows: int
    what: str = "rows"
    """What is counted."""

    @property
    def verdict(self) -> str:
        """`fine`; `refused`: no better than guessing; `unclear`: perhaps so."""
        above = self.found - self.guessed
        if above > LIKELIER * self.spread:
            return "fine"
        useless = self.upper < self.guessed + LEAST_SKILL * (1 - self.guessed)
        if useless or above < -SURELY * self.spread:
            return "refused"
        return "unclear" if above <= 0 or self.rows >= ENOUGH_ROWS else "fine"


def spearman_skill(value: float, rows: int) -> Skill:
    """Put a Spearman correlation beside that of a random order, whose variance is 1 / (rows - 1)."""
    spread = 1 / math.sqrt(rows - 1)
    return Skill("Spearman's correlation with the labels", value, 0.0, spread, value + SURELY * spread, rows)


def check_skill(skill: Skill, origin: str) -> None:
    """Refuse labels by which a random order does as well as the dense network; warn where the rows do not tell.

    Raises: BadInput.
    """
    message = (
        f"{origin}: {skill.title} is {skill.found:.3f} for the dense network on {skill.rows} {skill.what}, and "
        f"{skill.guessed:.3f} for a random order."
    )
    if skill.verdict == "refused":
        raise BadInput(
            f"{message} No loss can be measured there. Give labels that are greater where the network should put out "
            "more (not distances or ranks), and rows of its own task; without labels, agreement with the dense "
            "network counts."
        )
    if skill.verdict == "unclear":
        log.warning("%s Do these labels fit the model?", message)


def surely_more(before: float, after: float, rows: int) -> bool:
    """Whether a Spearman correlation is above another by more than the noise of so many rows.

    Both are drawn towards 0 as by two rows more that tell nothing, so that a perfect one is not taken for certain.
    """
    gained = math.atanh(after * rows / (rows + 2)) - math.atanh(before * rows / (rows + 2))
    return gained * math.sqrt(max(0, rows - 3) / SPREAD) > SURELY
