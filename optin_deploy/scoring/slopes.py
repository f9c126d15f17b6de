"""The fast scorer on any network: the curvature of the OPTIN score by random projections, all units at once.

At mask m = 1 the score and its gradient vanish, and its Gauss-Newton curvature is a squared Jacobian norm:
D_k(u) ~ ||dG_k / dm_u||^2. With R of independent signs, E[(d<R, G>/dm_u)^2] is exactly that norm, so one backward
pass of s = sum of <R_k, G_k> estimates it for every unit of every group: ds/dm_u of a sample is the sum, over all
places where the unit is masked, of the gradient of a multiplier that stands there. Signs depend on sample, feature and
probe: batching changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Batch
from optin_deploy.network.graph import Network, Node
from optin_deploy.scoring.dense_run import check_finite, chosen_tokens
from optin_deploy.scoring.losses import exact_directions, random_direction
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.noise import sample_keys, signs, stream
from optin_deploy.scoring.passes import Gradients, Passes, spans_of
from optin_deploy.scoring.settings import ALL_TOKENS, Features
from optin_deploy.scoring.sites import Key
from optin_deploy.scoring.subject import Subject, read_tokens, tokens_of, value_of
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY, VARIANCE, Terms
from optin_deploy.structure.groups import UnitGroup

GAUSSIAN_SQUARES = 2 / 3
"""E x^4 = 3 s^4 and Var x^2 = 2 s^4 for Gaussian x, which projections on many signs are: 2/3 x^4 estimates Var x^2."""
ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
"""Operators by which activations become whole numbers; one of them is in every network that computes with these."""


@dataclass(frozen=True)
class Projections:
    """Which random projections are taken."""

    trajectory: range
    output: range
    """Projections of the output; if a few directions are exact, they are taken with projection 0."""
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
            What is compared of them, and all sums, stay as they are.
    Returns: sums over samples and projections.
    Raises: BadInput: an operator cannot be run in this type, or the network rounds on the way.
    """
    check_smooth(subject)
    groups = subject.layout.groups if groups is None else groups
    terms = Terms.zeros(groups)
    terms.probes = len(projections.trajectory)
    batches = micro_batches(batches, 1) if subject.alone else batches
    watched = [*subject.reading.outputs, *(feature.value for feature in subject.features)]
    spans = spans_of(subject, watched, [site for group in groups for site in subject.sites[group.name]])
    for number, batch in enumerate(batches):
        with torch.no_grad(), torch.autocast(subject.program.device.type, dtype, enabled=dtype is not None):
            passes = Passes.make(subject, batch, spans)
            terms.forward_seconds += passes.seconds
            terms.samples += passes.samples
            directions, exact = _directions(passes, batch, projections)
            terms.output_probes = int(0 in projections.output) if exact else len(projections.output)
            projected = _Projected(subject, batch, features, projections)
            many = len(projections.trajectory)
            found = passes.down([*({} for _ in range(many)), *directions], projected.at)
            for place, entries in enumerate(found):
                row = TRAJECTORY if place < many else OUTPUT
                _add(terms, subject, entries, row, certain=exact and row == OUTPUT)
        progress(number + 1, len(batches))
    return terms


def check_smooth(subject: Subject) -> None:
    """Refuse networks that round on the way: no slope foretells what they do.

    Raises: BadInput: names the first operator that does.
    """
    node = rounding(subject.structure.network)
    if node is not None:
        raise BadInput(
            f"{node} rounds to 8 bits, so that slopes say nothing of the units before it. Score this network with "
            "--scorer exact, or score the one that it was quantised from."
        )


def rounding(network: Network) -> Node | None:
    """Return the first node that rounds activations to whole numbers."""
    return next((node for node in network.nodes if node.op in ROUNDING and node.inputs[0] not in network.fixed), None)


def _directions(passes: Passes, batch: Batch, projections: Projections) -> tuple[list[Gradients], bool]:
    """Gradient at the compared value for each projection of the output; and whether the projections are not random.

    Raises: NonFiniteActivation: the network puts out NaN or infinity.
    """
    subject = passes.subject
    kept = {name: passes.kept[name].detach() for name in subject.reading.outputs}
    leaves = {name: value.requires_grad_() for name, value in kept.items() if value.is_floating_point()}
    with torch.enable_grad():
        readout = subject.read({**kept, **leaves}, read_tokens(batch))
    check_finite(subject, batch, [readout.values])
    wide = torch.promote_types(readout.values.dtype, torch.float32)
    dense = replace(readout, values=readout.values.detach().to(wide))
    directions = exact_directions(dense)
    exact = directions is not None
    if directions is None:
        keys, streams = sample_keys(batch), (stream(projections.seed, "output", n) for n in projections.output)
        directions = [random_direction(dense, keys, each) for each in streams]
    elif 0 not in projections.output:
        directions = []
    if not leaves:
        return [{} for _ in directions], exact
    values, below = readout.values, [*leaves.values()]
    slopes = [torch.autograd.grad(values, below, each.to(values.dtype), retain_graph=True) for each in directions]
    return [dict(zip(leaves, some, strict=True)) for some in slopes], exact


class _Projected:
    """Projections of the trajectory of one batch: their gradients at its features."""

    def __init__(self, subject: Subject, batch: Batch, features: Features, projections: Projections) -> None:
        self._subject, self._batch, self._features, self._projections = subject, batch, features, projections
        self._places = {feature.value: place for place, feature in enumerate(subject.features)}
        self._keys = sample_keys(batch)

    def at(self, name: str, value: Tensor) -> list[Tensor]:
        """One gradient a projection; nothing where the trajectory does not look."""
        probes, seed = self._projections.trajectory, self._projections.seed
        if name not in self._places or not probes:
            return []
        place = self._places[name]
        feature = self._subject.features[place]
        tokens = chosen_tokens(self._subject, feature, value, self._batch, self._features, seed)
        many = tokens.valid.shape[1]
        numbers = (stream(seed, f"feature {place}", probe) for probe in probes)
        noise = [signs(self._keys, number, many, many, like=tokens.valid) for number in numbers]
        flat = tokens_of(feature, value, tokens.batch).to(tokens.valid.dtype)
        return [value_of(feature, each, value) for each in tokens.pulled(flat, noise)]


def _add(terms: Terms, subject: Subject, entries: dict[Key, Tensor], row: int, *, certain: bool) -> None:
    """Add every unit's squared slope of one pass to a row of the sums, and to another its variance.

    Args: entries: gradients of multipliers. certain: the direction is not random.
    """
    for group, sums in terms.sums.items():
        found = [(site, entries[site.key]) for site in subject.sites[group.name] if site.key in entries]
        if not found:
            continue
        slopes = torch.zeros(len(found[0][1]), group.units + 1, dtype=torch.float64, device=found[0][1].device)
        for site, each in found:
            slopes.index_add_(1, site.units.to(slopes.device), each.double())
        squares = slopes[:, : group.units].square()
        sums[row] += squares.sum(0).cpu()
        if not certain:
            sums[VARIANCE + row] += GAUSSIAN_SQUARES * squares.square().sum(0).cpu()
