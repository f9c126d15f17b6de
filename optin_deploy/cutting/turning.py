"""Turn the widths of heads before they are cut, so that a few entries hold most of what passes through them.

Queries q and keys k meet in q k^T, what attention brings in c W^T. For any invertible P, P q and P^-T k give the same
products, and so do P c and P^-T W^T. With A and B the second moments of both sides, A = R R^T, B = S S^T, and
S^T R = U D V^T,

    P = D^-1/2 U^T S^T,   P^-1 = R V D^-1/2

both sides have the moments D: the last entries are those that matter least, and what is lost by leaving them out is
the least that any choice of so few entries can lose. Softmax does not hear what is added to all scores of a query, so
that keys count from their mean; what attention brings on average is made up for by a bias, and counts from its mean.

Source: balanced truncation, Moore 1981; of attention, by singular values of both sides on data: Lin et al., MoDeGPT
(arXiv 2408.09632).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optin_deploy.cutting.proof import NotProven, difference
from optin_deploy.data.rows import Batch, rows_of
from optin_deploy.network.graph import Network
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Program
from optin_deploy.network.weights import with_weights
from optin_deploy.scoring.hearing import Counts
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.linear import rows_of_value
from optin_deploy.structure.solvable import Solvable
from optin_deploy.structure.solving import Changes, apart
from optin_deploy.structure.turning import Side, Turnable, turnable

SAMPLES, ROWS = 512, 8
"""Samples that are looked at, at most, and at once."""
FLOOR = 1e-8
"""Least moment of a direction, relative to the largest: the matrices stay invertible."""
TOLERANCE = 1e-3
"""Largest change of an output, as a part of the largest, that is still rounding of the new weights."""


@dataclass(frozen=True, eq=False)
class Turned:
    """A network that computes the same, its widths turned."""

    network: Network
    groups: tuple[str, ...]
    """Names of those that are turned."""
    skipped: Mapping[str, str]
    """Why others are not, by name."""


def turned(
    subject: Subject, batches: Sequence[Batch], kinds: Collection[str], probes: Sequence[Mapping[str, Tensor]]
) -> Turned:
    """Return the network with all widths of these kinds turned that may be.

    Args: batches: inputs; the first `SAMPLES` are looked at. probes: on which the result is compared.
    Raises: NotProven: the result computes something else, which is our fault.
    """
    found, skipped = list[Turnable](), dict[str, str]()
    for group in subject.layout.groups:
        if group.kind in kinds:
            try:
                found.append(turnable(subject.structure, group))
            except Unsupported as err:
                skipped[group.name] = str(err)
    if not found:
        return Turned(subject.structure.network, (), skipped)
    sides = [side for each in found for side in (*each.makers, *each.others)]
    changes = Changes(apart(subject.structure.network, [[side.product] for side in sides]), torch.device("cpu"))
    with torch.no_grad():
        sums = _sums(subject, found, batches)
        for each in found:
            one, other = _moments(each, sums, changes)
            if one.isfinite().all() and other.isfinite().all():  # scoring names what holds no numbers
                _turn(each, changes, *balanced(one, other))
        network = with_weights(changes.network, changes.weights)
        _prove(subject.structure.network, network, probes)
    return Turned(network, tuple(each.group.name for each in found), skipped)


@dataclass(eq=False)
class _Sums:
    """Of rows with so many heads and entries."""

    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    first: Tensor | float = 0.0
    """(heads, width)."""
    second: Tensor | float = 0.0
    """(heads, width, width)."""

    def add(self, rows: Tensor, counts: Tensor) -> None:
        """Take rows (rows, heads, width, again) that count so much, (rows,)."""
        rows, counts = rows.double().cpu(), counts.double().cpu()
        weighted = rows * counts.view(-1, 1, 1, 1)
        self.count = self.count + counts.sum() * rows.shape[-1]
        self.first = self.first + weighted.sum((0, -1))
        self.second = self.second + torch.einsum("rhda,rhea->hde", weighted, rows)

    def moments(self, centred: bool) -> Tensor:
        """Second moments, (heads, width, width)."""
        count, first, second = self.count.clamp(min=1), torch.as_tensor(self.first), torch.as_tensor(self.second)
        mean = first / count
        return second / count - (mean[..., None] * mean[..., None, :] if centred else 0)


def _sums(subject: Subject, found: Sequence[Turnable], batches: Sequence[Batch]) -> dict[Side, _Sums]:
    """Of what a side gives, or of what it reads where it uses the entries."""
    looked = {
        side: (each.used, side.product.linear.reads if each.used else _given(side.product))
        for each in found
        for side in ((*each.others,) if each.used else (*each.makers, *each.others))
    }
    sums = {side: _Sums() for side in looked}
    parts, samples = micro_batches(batches, 1 if subject.alone else ROWS), 0
    counts = Counts(subject, parts, None)
    for number, batch in enumerate(parts):
        if samples >= SAMPLES:
            break
        rows = rows_of(batch)
        wanted = {value for _, value in looked.values()} | {side.product.linear.reads for side in looked}
        watched = subject.run(batch, watch=wanted).watched
        for side, (used, value) in looked.items():
            linear = side.product.linear
            read = watched[linear.reads]
            count = counts.at(number, linear.reads, read, linear.node.index, behind=False).to(read)
            weights = rows_of_value(count.expand(read.shape), linear.features, linear.samples[0], rows)[..., 0]
            found_rows = linear.rows_in(read, rows) if used else linear.rows_out(watched[value], rows)
            entries = torch.as_tensor(side.entries)
            sums[side].add(found_rows.flatten(0, 1)[:, entries], weights.flatten())
        samples += rows
    return sums


def _given(product: Solvable) -> str:
    """What a product gives with the vector behind it."""
    return product.linear.gives if product.shift is None else product.shift.value


def _moments(each: Turnable, sums: Mapping[Side, _Sums], changes: Changes) -> tuple[Tensor, Tensor]:
    """Of both sides, (heads, width, width)."""
    if not each.used:
        return sums[each.makers[0]].moments(centred=False), sums[each.others[0]].moments(centred=True)
    user = each.others[0]
    columns = changes.matrix(user.product)[:, torch.as_tensor(user.entries)]  # (outputs, heads, width, again)
    brought = sums[user].moments(centred=user.product.shift is not None)
    return brought, torch.einsum("ohda,ohea->hde", columns, columns)


def balanced(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """P and P^-1 for the moments of both sides, (heads, width, width)."""
    root, sides = _root(one), _root(other)
    left, size, right = torch.linalg.svd(sides.mT @ root)
    scale = size.clamp(min=torch.finfo(size.dtype).tiny).rsqrt()
    return scale[..., None] * (left.mT @ sides.mT), (root @ right.mT) * scale[..., None, :]


def _root(moments: Tensor) -> Tensor:
    """R with R R^T the moments, each direction with a least one."""
    values, vectors = torch.linalg.eigh(moments)
    most = values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    root: Tensor = vectors * torch.maximum(values, FLOOR * most).sqrt()[..., None, :]
    return root


def _turn(each: Turnable, changes: Changes, forward: Tensor, back: Tensor) -> None:
    """Write the turned weights: makers are multiplied by P, the others by P^-T."""
    for side in each.makers:
        _multiply(side, changes, forward, columns=False)
    for side in each.others:
        _multiply(side, changes, back.mT, columns=each.used)


def _multiply(side: Side, changes: Changes, by: Tensor, *, columns: bool) -> None:
    product, entries = side.product, torch.as_tensor(side.entries)
    matrix = changes.matrix(product)
    change = by - torch.eye(by.shape[-1], dtype=by.dtype)
    if columns:
        moved = torch.einsum("hpd,ohda->ohpa", change, matrix[:, entries])
        changes.add(product, torch.arange(len(matrix)), entries.flatten(), moved.flatten(1))
        return
    moved = torch.einsum("hpd,hdai->hpai", change, matrix[entries])
    changes.add(product, entries, torch.arange(matrix.shape[1]), moved)
    if product.shift is not None:
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
