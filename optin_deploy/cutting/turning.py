"""Turn the widths of heads before they are cut, so that a few entries hold most of what passes through them.

Queries q and keys k meet in q k^T, what attention brings in c W^T. For any invertible P, P q and P^-T k give the same
products, and so do P c and P^-T W^T. With A and B the second moments of both sides, A = R R^T, B = S S^T, and
S^T R = U D V^T,

    P = D^-1/2 U^T S^T,   P^-1 = R V D^-1/2

both sides have the moments D: the last entries are those that matter least. A is of what attention brings, as far as it
differs from its mean, which a bias makes up for, and B of the gradient of the output distance there: what is lost times
how far it moves the output. Scores are not what counts, but where softmax hears them. So A is of the gradients at the
keys, which are queries by how much they were heard there, and B of those at the queries, which are keys.

Source: balanced truncation, Moore 1981; of attention, by singular values of both sides on data: Lin et al., MoDeGPT
(arXiv 2408.09632).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.common.regression import Moments
from optin_deploy.cutting.proof import NotProven, difference
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.weights import with_weights
from optin_deploy.scoring.hearing import PROBES, Counts, slopes_at
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.linear import rows_of_value
from optin_deploy.structure.solving import Changes, apart
from optin_deploy.structure.turning import Turnable, WidthProduct

SAMPLES, ROWS = 512, 8
"""Samples that are looked at, at most, and at once."""
SEED = 0
"""Seed of the random directions of gradients."""
FLOOR = 1e-8
"""Least moment of a direction, relative to the largest: the matrices stay invertible."""
TOLERANCE = 1e-3
"""Largest change of an output, as a part of the largest, that is still rounding of the new weights."""


def turned(
    subject: Subject,
    batches: Sequence[Batch],
    widths: Sequence[Turnable],
    probes: Sequence[Mapping[str, Tensor]],
) -> Network:
    """Return the network with these widths turned.

    Args: batches: inputs; the first `SAMPLES` are looked at. probes: on which the result is compared.
    Raises: NotProven: the result computes something else, which is our fault.
    """
    sides = [side for each in widths for side in (*each.makers, *each.others)]
    changes = Changes(apart(subject.structure.network, [[side.product] for side in sides]), torch.device("cpu"))
    with torch.no_grad():
        sums = _sums(subject, {look for each in widths for look in _looks(each)}, batches)
        for each in widths:
            one, other = (look.moments(sums[look]) for look in _looks(each))
            if one.isfinite().all() and other.isfinite().all():  # scoring names what holds no numbers
                _turn(each, changes, *balanced(one, other))
        network = with_weights(changes.network, changes.weights)
        _prove(subject.structure.network, network, probes)
    return network


@dataclass(frozen=True)
class _Look:
    """Rows that one side of a product is judged by."""

    side: WidthProduct
    used: bool
    """Whether the side uses the entries: rows are of what it reads, else of what it gives."""
    slopes: bool
    """Whether they are gradients of the output distance there, not what is there."""

    @property
    def value(self) -> str:
        """Name of the value that holds the rows."""
        product = self.side.product
        if self.used:
            return product.linear.reads
        return product.linear.gives if product.shift is None else product.shift.value

    @property
    def centred(self) -> bool:
        """Whether only what differs from the mean counts."""
        return not self.slopes and self.side.product.shift is not None

    def add(self, sums: Moments, tensor: Tensor, samples: int, counts: Tensor | None = None) -> None:
        """Take the rows of a value of so many samples, which count so much, (rows,)."""
        linear, (heads, width, again) = self.side.product.linear, self.side.entries.shape
        rows = linear.rows_in(tensor, samples) if self.used else linear.rows_out(tensor, samples)
        found = rows.flatten(0, 1)[:, torch.as_tensor(self.side.entries)]  # (rows, heads, width, again)
        found = found.permute(1, 0, 3, 2).reshape(heads, -1, width)
        sums.add(found, found[..., :0], None if counts is None else counts.repeat_interleave(again))

    def moments(self, sums: Moments) -> Tensor:
        """(heads, width, width)."""
        count = sums.count or 1.0
        mean = sums.x / count if self.centred else torch.zeros_like(sums.x)
        return sums.xx / count - mean[..., None] * mean[..., None, :]


def _looks(each: Turnable) -> tuple[_Look, _Look]:
    """What both sides' moments are of."""
    one, other = each.makers[0], each.others[0]
    if each.used:
        return _Look(other, used=True, slopes=False), _Look(other, used=True, slopes=True)
    return _Look(other, used=False, slopes=True), _Look(one, used=False, slopes=True)


def _sums(subject: Subject, looks: Collection[_Look], batches: Sequence[Batch]) -> dict[_Look, Moments]:
    """Sum the moments of all rows that are looked at; padding has none."""
    sums = {look: Moments(look.side.entries.shape[1], 0, look.side.entries.shape[0]) for look in looks}
    parts, samples = micro_batches(batches, 1 if subject.alone else ROWS), 0
    counts = Counts(subject, parts, None)
    for number, batch in enumerate(parts):
        if samples >= SAMPLES:
            break
        rows = rows_of(batch)
        values = subject.run(batch, watch={look.value for look in looks if not look.slopes}).watched
        gradients = slopes_at(subject, batch, [look.value for look in looks if look.slopes], SEED, most=PROBES)
        for look in looks:
            if look.slopes:
                for gradient in gradients[look.value]:
                    look.add(sums[look], gradient, rows)
                continue
            linear, value = look.side.product.linear, values[look.value]
            count = counts.places(number, look.value, value, linear.node.index, behind=False).to(value)
            weights = rows_of_value(count.expand(value.shape), linear.features, linear.samples[0], rows)[..., 0]
            look.add(sums[look], value, rows, weights.flatten())
        samples += rows
    return sums


def balanced(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """P and P^-1 for the moments of both sides, (heads, width, width)."""
    root, sides = _root(one), _root(other)
    left, size, right = torch.linalg.svd(sides.mT @ root)
    scale = size.rsqrt()
    return scale[..., None] * (left.mT @ sides.mT), (root @ right.mT) * scale[..., None, :]


def _root(moments: Tensor) -> Tensor:
    """R with R R^T the moments as a part of their sum, each direction with a least one; of none all are alike."""
    size = moments.shape[-1]
    whole = moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    moments = torch.where(whole > 0, moments / whole, torch.eye(size, dtype=moments.dtype) / size)
    values, vectors = torch.linalg.eigh(moments)
    root: Tensor = vectors * torch.maximum(values, FLOOR * values[..., -1:]).sqrt()[..., None, :]
    return root


def _turn(each: Turnable, changes: Changes, forward: Tensor, back: Tensor) -> None:
    """Write the turned weights: makers are multiplied by P, the others by P^-T."""
    for side in each.makers:
        _multiply(side, changes, forward, columns=False)
    for side in each.others:
        _multiply(side, changes, back.mT, columns=each.used)


def _multiply(side: WidthProduct, changes: Changes, by: Tensor, *, columns: bool) -> None:
    product, entries = side.product, torch.as_tensor(side.entries)
    matrix = changes.matrix(product)
    change = by - torch.eye(by.shape[-1], dtype=by.dtype)
    if columns:
        moved = torch.einsum("hpd,ohda->ohpa", change, matrix[:, entries])
        changes.add(product, torch.arange(len(matrix)), entries.flatten(), moved.flatten(1))
        return
    moved = torch.einsum("hpd,hdai->hpai", change, matrix[entries])
    changes.add(product, entries, torch.arange(matrix.shape[1]), moved)
    vector = changes.offset(product)[entries]  # (heads, width, again)
    changes.shift(product, entries, torch.einsum("hpd,hda->hpa", change, vector))


def _prove(before: Network, after: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises: NotProven."""
    programs = [Program(network, dtype=torch.float64) for network in (before, after)]
    for feeds in probes:
        dense, other = (program(feeds).outputs for program in programs)
        apart = max(difference(other[name], value) for name, value in dense.items())
        if not apart <= TOLERANCE:
            raise NotProven(
                f"a network whose heads are turned differs by {apart:.1e} of the largest output (at most "
                f"{TOLERANCE:.0e} is rounding). This is a fault of ours: please report it, or leave qk-width and "
                "v-width out of --units."
            )
