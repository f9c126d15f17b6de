"""The two terms of the score, summed over samples, joined by a weighting, with their standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from optin_deploy.structure.groups import UnitGroup

KL_SHARE = 0.1
"""lambda makes the output term a tenth of the trajectory term on average (the authors' code: about 1/10 a unit)."""
TRAJECTORY, OUTPUT, VARIANCE, ROWS = 0, 1, 2, 5
"""Rows of `Terms.sums`: the two terms, from VARIANCE on their second moments and the one between them."""


@dataclass
class Terms:
    """Running sums over samples, in float64; those of disjoint samples or units add up."""

    sums: dict[UnitGroup, Tensor]
    """Sums by group, (5, units): of trajectory terms D, of output terms O, then DD, OO and DO for the standard error.
    Exact: the sums of D^2, O^2, D O over samples. Sketch: the variances of the first two rows, and 0; all summed over
    the probes too."""
    samples: int = 0
    probes: int = 1
    """Projections of the trajectory in the sums."""
    output_probes: int = 1
    """Projections of the output in the sums; 1 if they are exact."""
    forward_seconds: float = 0.0
    """Time of the dense forwards among the work: one over these samples."""
    seconds: float = 0.0
    """Time of the work."""
    peak_bytes: int = 0
    """Most memory that the process had held when the work was done."""

    @classmethod
    def zeros(cls, groups: Iterable[UnitGroup]) -> Terms:
        """Empty sums for these groups."""
        return cls({group: torch.zeros(ROWS, group.units, dtype=torch.float64) for group in groups})


def combined(rounds: Sequence[Sequence[Terms]]) -> Terms:
    """Sums over all samples, averaged over all probes.

    Args: rounds: each covers the same samples, with further probes.
    """
    results = list(chain(*rounds))
    probes, output_probes = (sum(getattr(each[0], name) for each in rounds) for name in ("probes", "output_probes"))
    scale = torch.tensor([1 / max(probes, 1), 1 / max(output_probes, 1)], dtype=torch.float64)
    scale = torch.cat([scale, scale.square(), torch.ones(1)]).unsqueeze(1)
    branches = {branch for terms in results for branch in terms.sums}
    return Terms(
        {b: scale * torch.stack([t.sums[b] for t in results if b in t.sums]).sum(0) for b in branches},
        samples=sum(terms.samples for terms in rounds[0]),
        probes=probes,
        output_probes=output_probes,
        forward_seconds=sum(terms.forward_seconds for terms in rounds[0]),
        seconds=sum(terms.seconds for terms in results),
        peak_bytes=max(terms.peak_bytes for terms in results),
    )


def balanced(terms: Terms, shares: Iterable[tuple[UnitGroup, float]]) -> float:
    """The lambda at which the mean output term is `KL_SHARE` of the mean trajectory term.

    It is 0 where no output moves, and 1 where there is no trajectory, so that the output counts alone.

    Args: shares: what the trajectory terms count.
    """
    pairs = [(share, terms.sums[group]) for group, share in shares]
    trajectory = float(torch.cat([share * sums[TRAJECTORY] for share, sums in pairs]).mean())
    output = float(torch.cat([sums[OUTPUT] for _, sums in pairs]).mean())
    if trajectory == 0 or output == 0:
        return float(output > 0)
    return KL_SHARE * trajectory / output


def mean_scores(terms: Terms, group: UnitGroup, share: float, weight: float) -> Tensor:
    """Scores of units, share * D + weight * O: mean over samples, (units,).

    Args: share: what the trajectory term counts. weight: lambda, of the output term.
    """
    sums = terms.sums[group]
    scores: Tensor = (share * sums[TRAJECTORY] + weight * sums[OUTPUT]) / terms.samples
    return scores


def sketch_errors(terms: Terms, group: UnitGroup, share: float, weight: float) -> Tensor:
    """Standard errors of sketched scores, (units,), against the curvature on these very samples."""
    dd, oo, _ = terms.sums[group][VARIANCE:]
    errors: Tensor = (share**2 * dd + weight**2 * oo).sqrt() / terms.samples
    return errors


def sampling_errors(terms: Terms, group: UnitGroup, share: float, weight: float, population: int) -> Tensor:
    """Standard errors of scores from some of `population` samples, drawn without replacement, (units,)."""
    n = terms.samples
    if n >= population or n < 2:
        return torch.zeros(group.units, dtype=torch.float64)
    dd, oo, do = terms.sums[group][VARIANCE:]
    squares = share**2 * dd + weight**2 * oo + 2 * share * weight * do
    variance = (squares - n * mean_scores(terms, group, share, weight).square()).clamp(min=0) / (n - 1)
    errors: Tensor = (variance / n * (1 - n / population)).sqrt()
    return errors
