"""The fast scorer on any network: the curvature of the OPTIN score by random projections, all units at once.

At mask m = 1 the score and its gradient vanish, and its Gauss-Newton curvature is a squared Jacobian norm:
D_k(u) ~ ||dG_k / dm_u||^2. With R of independent signs, E[(d<R, G>/dm_u)^2] is exactly that norm, so one backward
pass of s = sum of <R_k, G_k> estimates it for every unit of every group: ds/dm_u of a sample is the sum, over all
places where the unit is masked, of the gradient of a multiplier that stands there. Signs depend on sample, feature and
probe: batching changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.errors import BadInput
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
from optin_deploy.structure.groups import UnitGroup

ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
"""Operators by which activations become whole numbers; one of them is in every network that computes with these."""


@dataclass(frozen=True)
class Projections:
    """Which random projections are taken."""

    trajectory: range
    output: range
    """Where a few directions are exact, they are taken with projection 0."""
    seed: int = 0


def slope_terms(
    subject: Subject,
    batches: Sequence[Batch],
    projections: Projections,
    *,
    groups: Sequence[UnitGroup] | None = None,
    features: Features = ALL_TOKENS,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> Terms:
    """Estimate both terms for every unit; unbiased for the curvature, error ~ 1/sqrt(samples * projections).

    Args:
        batches: each is in memory as a whole; see `memory.micro_batches`.
        groups: whose units; None: all.
        dtype: in which products are computed, such as bfloat16 where the hardware multiplies it; None: as they are.
            What is compared, and all sums, stay as they are.
    Returns: sums over samples and projections.
    Raises: BadInput: an operator cannot be run in this type, or the network rounds on the way.
    """
    check_smooth(subject)
    groups = subject.layout.groups if groups is None else groups
    terms = Terms.zeros(groups)
    terms.probes = len(projections.trajectory)
    batches = micro_batches(batches, 1) if subject.alone else batches
    for number, batch in enumerate(batches):
        dense = dense_run(subject, batch, features, projections.seed)
        terms.samples += rows_of(batch)
        terms.forward_seconds += dense.seconds
        recorded = _Recorded(subject, batch, dense, groups, dtype)
        _add_trajectory(recorded, projections, terms)
        _add_output(recorded, projections, terms)
        progress(number + 1, len(batches))
    return terms


class _Recorded:
    """A run with a multiplier of ones at every place where units are masked, and backward passes through it."""

    def __init__(
        self, subject: Subject, batch: Batch, dense: Dense, groups: Sequence[UnitGroup], dtype: torch.dtype | None
    ) -> None:
        self.dense = dense
        self.keys = sample_keys(batch)
        self._subject, self._groups = subject, groups
        device = subject.program.device
        sites = {(site.place, site.position): site for group in groups for site in subject.sites[group.name]}
        with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            self._multipliers: dict[tuple[Place, int], Tensor] = {
                key: torch.ones(rows_of(batch), len(site.units), device=device, requires_grad=True)
                for key, site in sites.items()
            }
            masks = masks_of((sites[key], each) for key, each in self._multipliers.items())
            values = subject.run(batch, masks=masks, watch=[feature.value for feature in subject.features])
            self.grams = [dense.gram(feature, values.watched[feature.value]) for feature in subject.features]
            self.readout = subject.read(values.outputs, dense.valid)

    def add(self, roots: Sequence[Tensor], weights: Sequence[Tensor], terms: Terms, row: int, certain: bool) -> None:
        """One backward pass: add every unit's squared slope to a row of the sums, and to another its variance.

        Args: weights: of the sums of the roots' entries. certain: the direction is not random.
        """
        wanted = list(self._multipliers.values())
        weights = [weight.to(root.dtype) for root, weight in zip(roots, weights, strict=True)]
        found = torch.autograd.grad(roots, wanted, weights, retain_graph=True, allow_unused=True)
        entries = {key: each.double() for key, each in zip(self._multipliers, found, strict=True) if each is not None}
        for group in self._groups:
            slopes = torch.zeros(len(self.keys), group.units + 1, dtype=torch.float64, device=wanted[0].device)
            for site in self._subject.sites[group.name]:
                if (site.place, site.position) in entries:
                    slopes.index_add_(1, site.units.to(slopes.device), entries[site.place, site.position])
            squares = slopes[:, : group.units].square()
            terms.sums[group][row] += squares.sum(0).cpu()
            if not certain:
                terms.sums[group][VARIANCE + row] += GAUSSIAN_SQUARES * squares.square().sum(0).cpu()


def check_smooth(subject: Subject) -> None:
    """Refuse networks that round on the way: no slope foretells what they do.

    Raises: BadInput: names the first operator that does.
    """
    network = subject.structure.network
    for node in network.nodes:
        if node.op in ROUNDING and node.inputs[0] not in network.fixed:
            raise BadInput(
                f"{node} rounds to 8 bits, so that slopes say nothing of the units before it. Score this network with "
                "--scorer exact, or score the one that it was quantised from."
            )


def _add_trajectory(recorded: _Recorded, projections: Projections, terms: Terms) -> None:
    live = [(place, gram) for place, gram in enumerate(recorded.grams) if gram.requires_grad]
    for probe in projections.trajectory if live else ():
        noise = [
            signs(recorded.keys, stream(projections.seed, f"feature {place}", probe), *gram.shape[1:], like=gram)
            for place, gram in live
        ]
        recorded.add([gram for _, gram in live], noise, terms, TRAJECTORY, certain=False)


def _add_output(recorded: _Recorded, projections: Projections, terms: Terms) -> None:
    dense, values = recorded.dense.readout, recorded.readout.values
    directions = exact_directions(dense)
    exact = directions is not None
    if directions is None:
        streams = (stream(projections.seed, "output", probe) for probe in projections.output)
        directions = [random_direction(dense, recorded.keys, each) for each in streams]
    elif 0 not in projections.output:
        directions = []
    terms.output_probes = int(0 in projections.output) if exact else len(projections.output)
    for direction in directions if values.requires_grad else ():
        recorded.add([values], [direction], terms, OUTPUT, certain=exact)
