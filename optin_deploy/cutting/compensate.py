"""Re-solve the weights that stay in closed form, so that the masked network follows the dense one.

Product by product in the order of work, each on the stream that is repaired already before it. What a product reads
has changed: the linear map that brings it nearest to what the dense network reads there is folded into its weight,

    minimise over A, c    || z' + A z' + c  -  z ||^2  +  ridge * || A ||^2

and a product that leads to a residual Add, or that loses inputs itself, makes up for them and for what the stream has
lost so far:

    minimise over W', b' of the kept columns

        || x' + s * (W' a' + b')  -  (x + s * (W a + b)) ||^2  +  ridge * || W' - W_kept ||^2

z, a, x: what the product reads and the residual that its result is added to, dense; z', a', x': the same in the masked
network; s: what multiplies the result on its way, such as a LayerScale or a BatchNorm. Where no Add follows there is no
x. In the norms, a sample's tokens count by how much they move the output (see scoring/hearing.py). No gradient step, no
labels. Each ridge is chosen by the error on samples that the solution has not seen; where none is better there than no
change, nothing is changed.

What a ConvTranspose reads is brought back by what stays of it, without an offset, whose sums differ at the borders.
Groups of a convolution, and channels of a BatchNorm behind no product, are small problems of their own, with their own
judgement. A matrix that several products read is one problem, of the sums over all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.common.regression import Ridge, Solution
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.repairs import Arrival, InputRepair, OutputRepair, Repair, Skipped, repairs
from optin_deploy.cutting.tying import ROWS as TYING
from optin_deploy.cutting.tying import Ties
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.spans import Stream
from optin_deploy.network.weights import with_weights
from optin_deploy.scoring.hearing import Counts, TokenWeights
from optin_deploy.scoring.memory import SHARE, free_bytes, micro_batches
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.linear import Linear, rows_of_value, without
from optin_deploy.structure.solvable import Solvable
from optin_deploy.structure.solving import Changes, apart, drawn, pulled, reach, scales

ROWS = 32
"""Samples at once."""
LEAST = 1e-8
"""A scale below this cannot be made up for."""
STEPS = 4
"""Most times that a matrix is solved for which several products read."""


@dataclass(frozen=True)
class Repaired:
    """What one repair did: mean squared errors on samples that the solution has not seen."""

    node: str
    side: str
    """`input` or `output`."""
    before: float
    after: float
    """The same as before where nothing was changed."""
    ridge: float | None
    """Relative to the mean variance of the inputs; None: nothing was changed."""


@dataclass(frozen=True, eq=False)
class Compensation:
    """A network with repaired weights, of the shape of the dense one."""

    network: Network
    repaired: tuple[Repaired, ...]
    skipped: tuple[Skipped, ...]


def compensated(
    subject: Subject,
    keep: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    *,
    token_weights: TokenWeights | None = None,
    ties: Ties | None = None,
    budget_bytes: int | None = None,
    progress: Progress = silent,
) -> Compensation:
    """Return the network with the weights that stay repaired for a plan; entries of cut units are as they were.

    Of every batch the values are kept that are live at one node, dense and masked; where that is more than
    `budget_bytes`, those of an earlier node, from which the others are computed each time.
    Args:
        keep: kept units by name of group; a group that is not named stays whole.
        batches: unlabeled inputs by name; padding is left out of the fit.
        token_weights: what each token's error counts, of these batches; None = all the same.
        ties: tokens that are merged, which is made up for too.
        budget_bytes: None = a share of what is free.
    Raises: BadInput: a group or unit is not there.
    """
    places = {place: mask.to(subject.program.device) for place, mask in masks(subject.layout, keep).items()}
    starts = {node for node, _ in places} | (set() if ties is None else ties.nodes)
    changed = subject.program.cone(starts).nodes if starts else ()
    todo, skipped = repairs(subject.layout, keep, places, changed)
    if budget_bytes is None:
        budget_bytes = int(SHARE * free_bytes(subject.program.device))
    with torch.no_grad():
        work = _Work(subject, todo, batches, token_weights, places, ties, budget_bytes)
        done = []
        for number, repair in enumerate(todo):
            done.append(work.repaired(repair))
            progress(number + 1, len(todo))
    return Compensation(with_weights(work.changes.network, work.changes.weights), tuple(done), tuple(skipped))


class _Work:
    """The dense network and the masked one side by side; solutions go into the masked one at once."""

    def __init__(
        self,
        subject: Subject,
        todo: Sequence[Repair],
        batches: Sequence[Batch],
        token_weights: TokenWeights | None,
        places: Mapping[tuple[int, int], Tensor],
        ties: Ties | None,
        budget_bytes: int,
    ) -> None:
        rows = 1 if subject.alone else ROWS
        self.subject = subject
        self.batches = micro_batches(batches, rows)
        self.samples = sum(map(rows_of, self.batches))
        self.counts = Counts(subject, self.batches, None if token_weights is None else token_weights.split(rows))
        dense = subject.program
        self.changes = Changes(apart(dense.network, [each.products for each in todo]), dense.device)
        cut = self.changes.network if ties is None else ties.tied(self.changes.network)
        pupil = Program(cut, device=dense.device, dtype=dense.dtype, own=TYING)
        self.dense = Stream(dense, self.batches, budget_bytes=budget_bytes // 2)
        self.pruned = Stream(pupil, self.batches, masks=places, budget_bytes=budget_bytes // 2)
        self.pruned.weights = self.changes.weights

    def repaired(self, repair: Repair) -> Repaired:
        """Do one repair."""
        self.dense.advance(repair.at)
        self.pruned.advance(repair.at)
        solution = self._sums(repair).solution()
        ridge, before = solution.ridge, solution.before
        after = before
        for _ in range(STEPS):
            if not bool(solution.better.any()):
                break
            kept = dict(self.changes.weights)
            self._change(repair, solution)
            if len(repair.places) == 1:
                after = solution.after
                break
            # What each place reads has changed with the others: only a look at all of them tells what it is worth.
            solution = self._sums(repair).solution()
            if not solution.before < after:
                self.changes.restore(kept)
                break
            after = solution.before
        node = str(repair.products[0].linear.node)
        return Repaired(node, repair.side, before, after, ridge if after < before else None)

    def _sums(self, repair: Repair) -> Ridge:
        """What a repair is solved from, of all its places as they are now."""
        sizes = (len(repair.inputs), repair.outputs.shape[1])
        sums = Ridge(*sizes, centred=repair.centred, groups=len(repair.outputs))
        for number in range(len(repair.places)):
            sums.samples = 0  # the same samples judge at every place
            rows = self._given(repair, number) if isinstance(repair, OutputRepair) else self._read(repair, number)
            for found, wanted, counts in rows:
                sums.add(found, wanted, counts)
        return sums

    def _given(self, repair: OutputRepair, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each batch what a product multiplies, the wanted change (groups, samples, rows, ..), and each row's
        weight.

        Unknowns and targets are in the scale of what arrives; rows of W' are independent, so that dividing by the scale
        afterwards gives the same product as dividing the targets.
        """
        place = repair.places[number]
        linear, end = place.product.linear, place.end
        cone = self.pruned.spans.cone(linear.node.index + 1, {end})
        compared = [end, *([] if place.residual is None else [place.residual])]
        scale = self._scale(place)
        inverse, loud = _inverse(scale), int(scale.abs().argmax())
        groups = repair.outputs[:, 0] // (linear.outputs // linear.groups)
        for batch, rows in enumerate(self.batches):
            count = rows_of(rows)
            teacher = self._look(self.dense, batch, linear, compared)
            pupil = self._look(self.pruned, batch, linear, {linear.reads, linear.gives, *compared, *cone.needs})
            arrived, given = pupil[end], pupil[linear.gives]
            gap = torch.stack([teacher[name] - pupil[name] for name in compared]).sum(0)
            counts = self.counts.places(batch, end, arrived, linear.node.index, behind=True).to(arrived)
            chosen = drawn(linear.places(given, count), len(repair.inputs), self.samples)
            gaps, counted = (
                linear.rows_out(each, count, chosen)
                for each in pulled(
                    self.pruned.program,
                    cone,
                    {**self.changes.weights, **pupil},
                    linear.gives,
                    [(end, gap), (end, counts.expand(arrived.shape))],
                )
            )
            found = linear.rows_in(pupil[linear.reads], count, chosen)
            found = found.reshape(*found.shape[:2], linear.groups, linear.inputs)
            wanted = (gaps * inverse.to(gaps))[..., repair.outputs]
            yield (
                found[..., groups, :][..., repair.inputs].movedim(-2, 0),
                wanted.movedim(-2, 0),
                counted[..., loud] * float(inverse[loud]),
            )

    def _read(self, repair: InputRepair, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same for what several products read, and what it lacks."""
        place = repair.places[number]
        linear, value = place.products[0].linear, place.value
        for batch, rows in enumerate(self.batches):
            count = rows_of(rows)
            found = self.pruned.look(batch, [value])[value]
            wanted = self.dense.look(batch, [value])[value]
            counts = self.counts.places(batch, value, found, linear.node.index, behind=False).to(found.device)
            chosen = drawn(found.numel() // (count * linear.channels), len(repair.inputs), self.samples)
            before, after, counted = (
                rows_of_value(each, linear.features, linear.samples[0], count, chosen)
                for each in (found, wanted, counts.expand(found.shape))
            )
            read = before[..., repair.inputs]
            yield read[None], after.index_add(-1, repair.inputs, read, alpha=-1)[None], counted[..., 0]

    def _change(self, repair: Repair, solution: Solution) -> None:
        """Write what was found into the weights, once for all places that read them."""
        change = torch.where(solution.better[:, None, None], solution.change, 0)  # (groups, inputs, outputs)
        offset = torch.where(solution.better[:, None], solution.offset, 0)
        vectors = {self.changes.vector(product): product for product in repair.products} if repair.centred else {}
        if isinstance(repair, OutputRepair):
            back = _inverse(self._scale(repair.places[0]))[repair.outputs]
            for product in vectors.values():
                self._shift(product, repair.outputs.flatten(), (offset * back).flatten())
            self.changes.add(repair.products[0], repair.outputs, repair.inputs, (change * back[:, None]).mT)
            return
        for product in vectors.values():
            every = torch.arange(product.linear.outputs)
            self._shift(product, every, self._taps(product).sum(2) @ offset[0])
        for product in {product.linear.stored.name: product for product in repair.products}.values():
            linear, moved = product.linear, torch.einsum("oct,dc->odt", self._taps(product), change[0])
            columns = repair.inputs[:, None] * linear.taps + torch.arange(linear.taps)
            self.changes.add(product, torch.arange(linear.outputs), columns.flatten(), moved.flatten(1))

    def _taps(self, product: Solvable) -> Tensor:
        """The matrix as (outputs, channels, taps)."""
        linear = product.linear
        return self.changes.matrix(product).reshape(linear.outputs, linear.channels, linear.taps)

    def _shift(self, product: Solvable, outputs: Tensor, offset: Tensor) -> None:
        """Add to the vector behind a product what its outputs are to have more."""
        reached = reach(self.pruned, product, rows_of(self.batches[0]))
        self.changes.shift(product, outputs, offset * reached[outputs])

    def _scale(self, place: Arrival) -> Tensor:
        """Factor of each output of a product from there to where it arrives."""
        return scales(self.pruned, place.product, place.end, rows_of(self.batches[0]))

    def _look(self, stream: Stream, batch: int, linear: Linear, wanted: Collection[str]) -> dict[str, Tensor]:
        """Values of a batch; of a product with an activation in the same node what there is before it."""
        return stream.look(batch, wanted, without(stream.program.network.nodes[linear.node.index]))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > LEAST, 1 / scale, 0)
