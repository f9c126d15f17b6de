"""Error curves by group: how far the outputs move when one group alone gets narrower, compensated, at a few widths.

Every group keeps the units that the others make up for least, or its best by score where not all that uses them can be
solved for; the products that use them are solved for anew from what they read in the dense network. Between the
measured widths the error falls as it is expected to, or is interpolated. No labels: the error is the scores' own
distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.common.regression import MOST_INPUTS, Moments
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.axes import kept, units_along
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Cone, Program
from optin_deploy.network.spans import Stream
from optin_deploy.planning.curve import FEW, RIDGE, SHARES, Curve, fitted_curve
from optin_deploy.planning.removal import Use, metrics, removal
from optin_deploy.quality.held_out import joined, judged_samples, samples_of
from optin_deploy.scoring.hearing import ROWS, Counts, TokenWeights
from optin_deploy.scoring.losses import Readout, output_distance
from optin_deploy.scoring.memory import SHARE, free_bytes, micro_batches
from optin_deploy.scoring.slopes import rounding
from optin_deploy.scoring.subject import Subject, read_tokens
from optin_deploy.structure.groups import UnitGroup
from optin_deploy.structure.labels import DEFAULT_KINDS
from optin_deploy.structure.solvable import Solvable, solvable
from optin_deploy.structure.solving import Changes, apart, drawn, reach
from optin_deploy.structure.structure import Contraction, Structure

MOST_HELD = 2**30
"""Bytes of dense outputs that are kept; where they are more, as of large pictures, fewer samples judge."""


def unit_curves(
    subject: Subject,
    scores: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    kinds: Collection[str] = DEFAULT_KINDS,
    token_weights: TokenWeights | None = None,
    budget_bytes: int | None = None,
    progress: Progress = silent,
) -> Mapping[str, Curve]:
    """Measure groups at a few widths; each costs runs of the judging samples through what lies behind the group.

    Args:
        scores: by name of group, one a unit, higher = keep; groups without scores have no curve.
        batches: unlabeled inputs by name; every fourth sample, at most 128 of them, judge what the others fitted.
        kinds: of the groups that are measured.
        token_weights: what each token of these batches counts in the fit; None = all the same.
        budget_bytes: most that is kept of all samples between two groups; None = a share of what is free.
    Raises: BadInput: too few samples.
    """
    groups = [group for group in subject.layout.groups if group.kind in kinds and group.name in scores]
    if budget_bytes is None:
        budget_bytes = int(SHARE * free_bytes(subject.program.device))
    with torch.no_grad():
        bench = _Bench(subject, groups, batches, token_weights, budget_bytes)
        found = {}
        for number, group in enumerate(groups):
            found[group.name] = bench.curve(group, scores[group.name])
            progress(number + 1, len(groups))
    return found


@dataclass(frozen=True, eq=False)
class _Use:
    """A matrix that uses units of a group."""

    site: Contraction
    products: tuple[Solvable, ...]
    """One, or all that read the same matrix."""
    moments: Moments
    """Moments of what the products read."""
    reach: Tensor

    @property
    def centred(self) -> bool:
        """Whether an offset can be taken in: all have a vector that is added."""
        return all(each.shift is not None for each in self.products)


class _Bench:
    """The samples that fit and those that judge, both on their way through the dense network."""

    def __init__(
        self,
        subject: Subject,
        groups: Sequence[UnitGroup],
        batches: Sequence[Batch],
        token_weights: TokenWeights | None,
        budget_bytes: int,
    ) -> None:
        rows = 1 if subject.alone else ROWS
        marks = judged_samples(batches)
        rest = [~mark for mark in marks]
        self.fitted = micro_batches(
            [samples_of(batch, mark) for batch, mark in zip(batches, rest, strict=True) if mark.any()], rows
        )
        self.judged = micro_batches(joined(batches, marks), rows)
        self.samples = sum(map(rows_of, self.fitted))
        weights = None if token_weights is None else token_weights.chosen(rest).split(rows)
        self.subject, self.counts = subject, Counts(subject, self.fitted, weights)
        self.products = {group.name: list(_products(subject.structure, group)) for group in groups}
        network = apart(subject.structure.network, [alike for uses in self.products.values() for _, alike in uses])
        self.program = Program(network, device=subject.program.device, dtype=subject.program.dtype)
        self.dense: list[Readout] = []
        self.beside: list[Mapping[str, Tensor]] = []
        """Outputs that are read together: a group may change one of them alone."""
        held = 0
        for batch in self.judged:
            found, read = self.program(subject.fed(batch)).outputs, subject.reading.outputs
            self.dense.append(replace(subject.read(found, read_tokens(batch)), pictures=None))
            self.beside.append({name: found[name] for name in read} if len(read) > 1 else {})
            held += sum(value.nbytes for value in (self.dense[-1].values, *self.beside[-1].values()))
            if held > MOST_HELD:
                break
        self.judged = self.judged[: len(self.dense)]
        solved = {
            each.linear.gives: each.linear for uses in self.products.values() for _, alike in uses for each in alike
        }
        smooth = rounding(subject.structure.network) is None
        self.metrics = metrics(subject, self.fitted, solved.values()) if smooth else {}
        self.fit = Stream(self.program, self.fitted, budget_bytes=budget_bytes // 2)
        self.judge = Stream(self.program, self.judged, spans=self.fit.spans, budget_bytes=budget_bytes // 2)

    def curve(self, group: UnitGroup, scores: Tensor) -> Curve:
        """The errors of a group, and the order in which its units stay."""
        by_score = tuple(scores.argsort(descending=True, stable=True).tolist())
        inside = self.program.cone({site.node for site in group.sites}).nodes
        made = {name for index in inside for name in self.program.network.nodes[index].outputs}
        outputs = [name for name in self.subject.reading.outputs if name in made]
        if not outputs:
            return Curve((0, group.units), (0.0, 0.0), by_score)
        self.fit.advance(group.depth)
        self.judge.advance(group.depth)
        uses = [_Use(site, alike, *self._moments(alike)) for site, alike in self.products[group.name]]
        found = removal([self._use(group, use) for use in uses], scores) if self._whole(group, uses) else None
        order = by_score if found is None else found.order
        cone = self.judge.spans.cone(group.depth, outputs, inside)
        starts = [self.judge.look(number, cone.needs) for number in range(len(self.judged))]
        counts = sorted({round(share * group.units) for share in (SHARES if found is None else FEW)} - {group.units})
        errors = []
        for count in counts:
            units = torch.tensor(sorted(order[:count]), dtype=torch.long)
            changes = self._narrowed(group, uses, units)
            errors.append(self._error(group, units, cone, changes, starts))
        if found is not None:
            return fitted_curve(counts, errors, found.costs, order)
        # A wider group can do what a narrower one does: where it measures worse, that is noise.
        falling = np.minimum.accumulate(errors).tolist()
        return Curve((*counts, group.units), (*falling, 0.0), order)

    def _whole(self, group: UnitGroup, uses: Sequence[_Use]) -> bool:
        """Whether all that uses units of a group can be solved for, and what it moves is known."""
        solved = {product.linear.node.index: product.linear for use in uses for product in use.products}
        known = all(linear.gives in self.metrics for linear in solved.values())
        return known and solved.keys() == {site.node for site in group.sites}

    def _use(self, group: UnitGroup, use: _Use) -> Use:
        """The same as the order of removal looks at it."""
        product = use.products[0]
        metric = torch.stack([self.metrics[each.linear.gives] for each in use.products]).sum(0)
        units = torch.from_numpy(units_along(use.site.axis, group.leaf))
        matrix = Changes(self.program.network, self.program.device).matrix(product)
        return Use.make(matrix, metric, use.moments, units.repeat_interleave(product.linear.taps), centred=use.centred)

    def _moments(self, products: Sequence[Solvable]) -> tuple[Moments, Tensor]:
        """Sums of what products with one matrix read in the dense network, and see `solving.reach`."""
        sums = Moments(products[0].linear.inputs, 0)
        for product, (number, batch) in itertools.product(products, enumerate(self.fitted)):
            linear = product.linear
            samples = rows_of(batch)
            values = self.fit.look(number, [linear.reads, linear.gives])
            given = values[linear.gives]
            counts = self.counts.places(number, linear.gives, given, linear.node.index, behind=True).to(given.device)
            chosen = drawn(linear.places(given, samples), linear.inputs, self.samples)
            rows = linear.rows_out(counts.expand(given.shape), samples, chosen)[..., 0]
            read = linear.rows_in(values[linear.reads], samples, chosen)[rows > 0]
            sums.add(read, read[:, :0], rows[rows > 0])
        return sums, reach(self.fit, products[0], rows_of(self.fitted[0]))

    def _narrowed(self, group: UnitGroup, uses: Sequence[_Use], units: Tensor) -> Changes:
        """Weights with which the group does with these units."""
        changes = Changes(self.program.network, self.program.device)
        for use in uses:
            product = use.products[0]
            linear = product.linear
            channels = torch.from_numpy(kept(use.site.axis, {group.leaf.root: units.numpy()}))
            columns = (channels[:, None] * linear.taps + torch.arange(linear.taps)).flatten()
            change, offset = use.moments.narrowed(columns, changes.matrix(product)).solve(RIDGE, use.centred)
            every = torch.arange(linear.outputs)
            changes.add(product, every, columns, change.T)
            for each in {changes.vector(each): each for each in use.products}.values() if use.centred else ():
                changes.shift(each, every, offset * use.reach)
        return changes

    def _error(
        self, group: UnitGroup, units: Tensor, cone: Cone, changes: Changes, starts: Sequence[Mapping[str, Tensor]]
    ) -> float:
        """Mean distance of the outputs to the dense ones."""
        marks = torch.zeros(1, group.units, device=self.program.device)
        marks[0, units] = 1
        masks = self.subject.masks(group, marks)
        total = 0.0
        for batch, start, dense, beside in zip(self.judged, starts, self.dense, self.beside, strict=True):
            run = self.program({**start, **changes.weights}, masks=masks, cone=cone)
            found = self.subject.read({**beside, **run.outputs}, read_tokens(batch))
            total += float(output_distance(dense, found.values).sum())
        return total / sum(map(rows_of, self.judged))


def _products(structure: Structure, group: UnitGroup) -> Iterator[tuple[Contraction, tuple[Solvable, ...]]]:
    """Products that use units of a group and can be solved for, by their matrix; the others are masked alone."""
    found: dict[str, list[tuple[Contraction, Solvable]]] = {}
    for site in {site.node: site for site in group.sites if site.with_weight}.values():
        try:
            product = solvable(structure, site.node, shared=True)
        except Unsupported:
            continue
        if product.linear.seen and product.linear.groups == 1 and product.linear.inputs <= MOST_INPUTS:
            found.setdefault(product.linear.stored.name, []).append((site, product))
    for alike in found.values():
        if len(alike) == len(alike[0][1].linear.stored.places):
            yield alike[0][0], tuple(product for _, product in alike)
