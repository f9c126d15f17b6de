"""The fast scorer on any network: the curvature of the OPTIN score by random projections, all units at once.

At mask m = 1 the score and its gradient vanish, and its Gauss-Newton curvature is a squared Jacobian norm:
D_k(u) ~ ||dG_k / dm_u||^2. With R of independent signs, E[(d<R, G>/dm_u)^2] is exactly that norm, so one backward
pass of s = sum of <R_k, G_k> estimates it for every unit of every group: ds/dm_u of a sample is the sum, over all
places where the unit is masked, of the gradient of a multiplier that stands there. Signs depend on sample, feature and
probe: batching changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.masking import Batch, rows_of
from optin_deploy.network.run import Place
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.features import ALL_TOKENS, Features
from optin_deploy.scoring.losses import exact_directions, random_direction
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.noise import sample_keys, signs, stream
from optin_deploy.scoring.sketch import GAUSSIAN_SQUARES
from optin_deploy.scoring.subject import Dense, Subject, dense_run, masks_of
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY, VARIANCE, Terms

SitePlace = tuple[Place, int]
"""Where a mask stands: a node's input, and which of its axes."""


def slope_terms(
    subject: Subject,
    batches: Sequence[Batch],
    *,
    probes: range,
    output_probes: range,
    seed: int,
    features: Features = ALL_TOKENS,
    progress: Progress = silent,
) -> Terms:
    """Estimate both terms for every unit; unbiased for the curvature, error ~ 1/sqrt(samples * probes).

    Args:
        batches: each is in memory as a whole; see `memory.micro_batches`.
        probes: which random projections of the trajectory are taken.
        output_probes: the same for the output. Where a few directions are exact, they are taken with probe 0.
    Returns: sums over samples and probes.
    """
    terms = Terms.zeros(subject.layout.groups)
    terms.probes = len(probes)
    batches = micro_batches(batches, 1) if subject.alone else batches
    for number, batch in enumerate(batches):
        _add_batch(subject, batch, terms, probes, output_probes, seed, features)
        progress(number + 1, len(batches))
    return terms


def _add_batch(
    subject: Subject, batch: Batch, terms: Terms, probes: range, output_probes: range, seed: int, features: Features
) -> None:
    keys = sample_keys(batch)
    terms.samples += rows_of(batch)
    with torch.enable_grad():
        dense, multipliers = _recorded(subject, batch, features, seed)
    terms.forward_seconds += dense.seconds
    slopes = _Slopes(subject, multipliers, terms)
    grams = [dense.grams[feature.value] for feature in subject.features]
    live = [place for place, gram in enumerate(grams) if gram.requires_grad]
    for probe in probes if live else ():
        noise = [
            signs(keys, stream(seed, f"feature {place}", probe), *grams[place].shape[1:], like=grams[place])
            for place in live
        ]
        slopes.add([grams[place] for place in live], noise, TRAJECTORY)
    values = dense.readout.values
    directions = exact_directions(dense.readout) if values.requires_grad else []
    exact = directions is not None
    if directions is None:
        streams = (stream(seed, "output", probe) for probe in output_probes)
        directions = [random_direction(dense.readout, keys, each) for each in streams]
    elif 0 not in output_probes:
        directions = []
    terms.output_probes = int(0 in output_probes) if exact else len(output_probes)
    for direction in directions:
        slopes.add([values], [direction.detach()], OUTPUT, certain=exact)


def _recorded(subject: Subject, batch: Batch, features: Features, seed: int) -> tuple[Dense, dict[SitePlace, Tensor]]:
    """A dense run with a multiplier of ones at every place where units are masked, (samples, entries) each."""
    sites = {(site.place, site.position): site for each in subject.sites.values() for site in each}
    ones = {
        key: torch.ones(rows_of(batch), len(site.units), device=subject.program.device, requires_grad=True)
        for key, site in sites.items()
    }
    dense = dense_run(subject, batch, features, seed, masks=masks_of((sites[key], each) for key, each in ones.items()))
    return dense, ones


class _Slopes:
    """Backward passes, and where their slopes are summed."""

    def __init__(self, subject: Subject, multipliers: Mapping[SitePlace, Tensor], terms: Terms) -> None:
        self._subject = subject
        self._multipliers = multipliers
        self._terms = terms

    def add(self, roots: Sequence[Tensor], weights: Sequence[Tensor], row: int, *, certain: bool = False) -> None:
        """One pass: add every unit's squared slope to a row of the sums, and to another its variance.

        Args: weights: of the sums of the roots' entries. certain: the direction is not random.
        """
        wanted = list(self._multipliers.values())
        found = torch.autograd.grad(roots, wanted, weights, retain_graph=True, allow_unused=True)
        entries = {key: slopes for key, slopes in zip(self._multipliers, found, strict=True) if slopes is not None}
        for group in self._subject.layout.groups:
            slopes: Tensor | None = None
            for site in self._subject.sites[group.name]:
                along = entries.get((site.place, site.position))
                if along is None:
                    continue
                units = along.new_zeros(len(along), group.units + 1, dtype=torch.float64)
                units.index_add_(1, site.units.to(along.device), along.double())
                slopes = units if slopes is None else slopes + units
            if slopes is None:
                continue
            squares = slopes[:, : group.units].square()
            sums = self._terms.sums[group]
            sums[row] += squares.sum(0).cpu()
            if not certain:
                sums[VARIANCE + row] += GAUSSIAN_SQUARES * squares.square().sum(0).cpu()
