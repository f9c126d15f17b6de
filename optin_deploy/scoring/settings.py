"""How units are scored: everything that changes a score but model and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from optin_deploy.common.arguments import checked, number, whole
from optin_deploy.common.validation import INT32, seed_of, whole_number
from optin_deploy.errors import BadInput

FeatureSite = Literal["block", "ffn"]
SITES: tuple[FeatureSite, ...] = ("block", "ffn")
Weighting = Literal["paper", "normalised", "output"]
WEIGHTINGS: tuple[Weighting, ...] = ("paper", "normalised", "output")
Kind = Literal["logits", "probabilities", "regression", "embedding", "multi-label", "span"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCORERS = ("sketch", "exact")
MOST_WEIGHT = 1e12
"""Beyond it the other term is lost to rounding."""
MOST_PROBES = 2**16
"""Each is a backward pass over every sample; a few are enough."""


@dataclass(frozen=True)
class Features:
    """Which features are compared."""

    site: FeatureSite = "block"
    """`block`: outputs of the blocks; `ffn`: outputs of the FFN's second projection, before the residual is added."""
    tokens: int | None = None
    """Tokens drawn, seeded, from each sample's own; None = all."""
    across: bool = False
    """Draw the tokens over the whole batch, and compare tokens of different samples too, as the paper's code does.
    Such scores depend on which samples share a batch."""

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise BadInput(f"unknown --features {self.site!r}; possible: {', '.join(SITES)}.")
        if self.tokens is not None:
            whole_number(self.tokens, "--tokens", 2, hint="A single token has no relation to another.")
        if self.across and self.tokens is None:
            raise BadInput("tokens across a batch must be drawn: give their number.")


ALL_TOKENS = Features()
PAPER = Features("ffn", 768, across=True)
"""The features of the authors' code, without what has no reason there: padding, the last layer halved, a prior on the
index."""


@dataclass(frozen=True)
class ScoreSettings:
    """Options of `unit_job.score_units`."""

    scorer: str = "sketch"
    """`exact` masks each unit alone, one partial forward a unit; `sketch` estimates most from a few backward passes and
    masks only few and large ones, such as heads."""
    weighting: Weighting = "paper"
    """What of the trajectory counts. `paper`: the plain sum over all features behind a unit. `normalised`: divided by
    their number. `output`: none, but how far the output moves."""
    kl_weight: float | None = None
    """lambda; None: 0.1 * mean trajectory term / mean output term."""
    features: Features = ALL_TOKENS
    probes: int | None = None
    """Random projections a sample of the sketch; None: until the ranking is stable."""
    head_samples: int | None = None
    """Samples on which the sketch masks few and large units; None: until the ranking is stable."""
    seed: int = 0
    """Seed of random projections and of drawn tokens."""

    def __post_init__(self) -> None:
        checked(self.features, Features, "features")
        seed_of(self.seed)
        if self.scorer not in SCORERS:
            raise BadInput(f"unknown --scorer {self.scorer!r}; possible: {', '.join(SCORERS)}.")
        if self.weighting not in WEIGHTINGS:
            raise BadInput(f"unknown --weighting {self.weighting!r}; possible: {', '.join(WEIGHTINGS)}.")
        if self.features.across and self.scorer != "exact":
            raise BadInput("tokens across a batch (--paper) are compared only by --scorer exact.")
        if self.kl_weight is not None and not 0 <= number(self.kl_weight, "--kl-weight") <= MOST_WEIGHT:
            raise BadInput(f"--kl-weight {self.kl_weight}: give a number, 0 or more and at most {MOST_WEIGHT:g}.")
        for name, value, most in (("--probes", self.probes, MOST_PROBES), ("--head-samples", self.head_samples, INT32)):
            if value is not None:
                whole_number(whole(value, name), name, 1, most)
