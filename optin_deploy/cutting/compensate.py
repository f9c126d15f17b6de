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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.repairs import InputRepair, OutputRepair, Repair, Skipped, repairs
from optin_deploy.masking import Batch, rows_of
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.run import Program
from optin_deploy.network.spans import Stream
from optin_deploy.network.weights import with_weights
from optin_deploy.progress import Progress, silent
from optin_deploy.regression import Ridge
from optin_deploy.scoring.hearing import Counts, TokenWeights
from optin_deploy.scoring.memory import SHARE, free_bytes, micro_batches
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.linear import rows_of_value
from optin_deploy.structure.solvable import Solvable
from optin_deploy.structure.solving import Changes, apart, drawn, pulled, reach, scales

ROWS = 32
"""Samples at once."""
LEAST = 1e-8
"""A scale below this cannot be made up for."""


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
        budget_bytes: None = a share of what is free.
    Raises: BadInput: a group or unit is not there.
    """
    places = {place: mask.to(subject.program.device) for place, mask in masks(subject.layout, keep).items()}
    changed = subject.program.cone({node for node, _ in places}).nodes if places else ()
    todo, skipped = repairs(subject.layout, keep, places, changed)
    if budget_bytes is None:
        budget_bytes = int(SHARE * free_bytes(subject.program.device))
    with torch.no_grad():
        work = _Work(subject, todo, batches, token_weights, places, budget_bytes)
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
        budget_bytes: int,
    ) -> None:
        rows = 1 if subject.alone else ROWS
        self.subject = subject
        self.batches = micro_batches(batches, rows)
        self.counts = Counts(subject, self.batches, None if token_weights is None else token_weights.split(rows))
        dense = subject.program
        self.changes = Changes(
            apart(dense.network, [product for each in todo for product in _products(each)]), dense.device
        )
        pupil = Program(self.changes.network, device=dense.device, dtype=dense.dtype)
        self.dense = Stream(dense, self.batches, budget_bytes=budget_bytes // 2)
        self.pruned = Stream(pupil, self.batches, masks=places, budget_bytes=budget_bytes // 2)
        self.pruned.weights = self.changes.weights

    def repaired(self, repair: Repair) -> Repaired:
        """Do one repair."""
        self.dense.advance(repair.at)
        self.pruned.advance(repair.at)
        return self._output(repair) if isinstance(repair, OutputRepair) else self._inputs(repair)

    def _output(self, repair: OutputRepair) -> Repaired:
        """Unknowns and targets are in the scale of what arrives; rows of W' are independent, so that dividing by the
        scale afterwards gives the same product as dividing the targets."""
        linear, shift = repair.product.linear, repair.product.shift
        ridge = Ridge(len(repair.inputs), len(repair.outputs), centred=shift is not None)
        cone = self.pruned.spans.cone(repair.at + 1, {repair.end} if shift is None else {repair.end, shift.value})
        compared = [repair.end, *([] if repair.residual is None else [repair.residual])]
        scale = scales(self.pruned, repair.product, repair.end, rows_of(self.batches[0]))
        reached = reach(self.pruned, repair.product, rows_of(self.batches[0]))
        inverse = torch.where(scale.abs() > LEAST, 1 / scale, 0)
        loud = int(scale.abs().argmax())
        for number, batch in enumerate(self.batches):
            count = rows_of(batch)
            teacher = self.dense.look(number, compared)
            pupil = self.pruned.look(number, {linear.reads, linear.gives, *compared, *cone.needs})
            end, given = pupil[repair.end], pupil[linear.gives]
            gap = torch.stack([teacher[name] - pupil[name] for name in compared]).sum(0)
            counts = self.counts.at(number, repair.end, end, repair.at, behind=True).to(end)
            chosen = drawn(linear.places(given, count))
            gaps, counted = (
                linear.rows_out(each, count, chosen)
                for each in pulled(
                    self.pruned.program,
                    cone,
                    {**self.changes.weights, **pupil},
                    linear.gives,
                    [(repair.end, gap), (repair.end, counts.expand(end.shape))],
                )
            )
            found = linear.rows_in(pupil[linear.reads], count, chosen)[..., repair.inputs]
            wanted = (gaps * inverse.to(gaps))[..., repair.outputs]
            ridge.add(found, wanted, counted[..., loud] * float(inverse[loud]))
        change, offset, told = _solved(ridge, linear.node, "output")
        if told.ridge is not None:
            back = inverse[repair.outputs]
            self.changes.add(repair.product, repair.outputs, repair.inputs, (change * back).T)
            self.changes.shift(repair.product, repair.outputs, offset * back * reached[repair.outputs])
        return told

    def _inputs(self, repair: InputRepair) -> Repaired:
        first = repair.products[0].linear
        ridge = Ridge(first.channels, first.channels, centred=repair.centred)
        for number, batch in enumerate(self.batches):
            count = rows_of(batch)
            found = self.pruned.look(number, [repair.value])[repair.value]
            wanted = self.dense.look(number, [repair.value])[repair.value]
            counts = self.counts.at(number, repair.value, found, repair.at, behind=False).to(found.device)
            chosen = drawn(found.numel() // (count * first.channels))
            before, after, rows = (
                rows_of_value(each, first.features, first.samples[0], count, chosen)
                for each in (found, wanted, counts.expand(found.shape))
            )
            ridge.add(before, after - before, rows[..., 0])
        change, offset, told = _solved(ridge, first.node, "input")
        if told.ridge is None:
            return told
        for product in repair.products:
            linear = product.linear
            matrix = self.changes.matrix(product)
            taps = matrix.reshape(linear.outputs, linear.channels, linear.taps)
            moved = torch.einsum("oct,dc->odt", taps, change).flatten(1)
            every = torch.arange(linear.outputs)
            if repair.centred:
                grown = reach(self.pruned, product, rows_of(self.batches[0]))
                self.changes.shift(product, every, (taps.sum(2) @ offset) * grown)
            self.changes.add(product, every, torch.arange(linear.inputs), moved)
        return told


def _products(repair: Repair) -> tuple[Solvable, ...]:
    return (repair.product,) if isinstance(repair, OutputRepair) else repair.products


def _solved(ridge: Ridge, node: Node, side: str) -> tuple[Tensor, Tensor, Repaired]:
    """The change of a weight, (inputs, outputs), the offset, and what is told of them."""
    best, after = ridge.chosen()
    judge = ridge.judge if after is not None else ridge.fit
    count, before = judge.count or 1.0, judge.yy
    change, offset = ridge.solve(best)
    if after is None:
        after = judge.error(change, offset)
    better = after < before
    told = Repaired(str(node), side, before / count, (after if better else before) / count, best if better else None)
    return change, offset, told
