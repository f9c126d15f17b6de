"""How units are scored: everything that changes a score but model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optin_deploy.arguments import checked, number, whole
from optin_deploy.errors import BadInput
from optin_deploy.scoring.features import ALL_TOKENS, Features
from optin_deploy.scoring.terms import WEIGHTINGS, Weighting

SCORERS = ("sketch", "exact")


@dataclass(frozen=True)
class ScoreSettings:
    """Options of `score`."""

    scorer: str = "sketch"
    """`exact` masks each unit alone, one partial forward a unit; `sketch` estimates neurons from a few backward passes
    and masks only heads."""
    weighting: Weighting = "paper"
    """What of the trajectory counts: see `terms.weights_of`."""
    kl_weight: float | None = None
    """lambda; None: 0.1 * mean trajectory term / mean output term."""
    features: Features = ALL_TOKENS
    probes: int | None = None
    """Random projections a sample of the sketch; None: until the ranking is stable."""
    head_samples: int | None = None
    """Samples on which the sketch masks heads; None: until the ranking is stable."""
    seed: int = 0
    """Of random projections and of drawn tokens."""

    def __post_init__(self) -> None:
        checked(self.features, Features, "features")
        whole(self.seed, "--seed")
        if self.scorer not in SCORERS:
            raise BadInput(f"unknown --scorer {self.scorer!r}; possible: {', '.join(SCORERS)}.")
        if self.weighting not in WEIGHTINGS:
            raise BadInput(f"unknown --weighting {self.weighting!r}; possible: {', '.join(WEIGHTINGS)}.")
        if self.features.across and self.scorer != "exact":
            raise BadInput("tokens across a batch (--paper) are compared only by --scorer exact.")
        if self.kl_weight is not None and not 0 <= number(self.kl_weight, "--kl-weight") < math.inf:
            raise BadInput(f"--kl-weight {self.kl_weight}: give a number, 0 or more.")
        for name, value in (("--probes", self.probes), ("--head-samples", self.head_samples)):
            if value is not None and whole(value, name) < 1:
                raise BadInput(f"{name} {value}: give 1 or more.")
