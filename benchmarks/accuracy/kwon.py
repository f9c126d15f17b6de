"""What Kwon et al. do after the Fisher scores: rearrange masks inside a layer, then tune them by least squares.

Source: A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022 (arXiv 2204.09656), sections 4.2 and 4.3;
details that the paper leaves open as in the released code (WoosukKwon/retraining-free-pruning), none of which is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from benchmarks.scoring.rivals import groups_of
from optin_deploy.cutting.masks import masks
from optin_deploy.feeds.rows import MASK, Batch, rows_of
from optin_deploy.network.axes import units_along
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.spans import Stream
from optin_deploy.network.weights import with_weights
from optin_deploy.planning.widths import Keep
from optin_deploy.scoring.memory import SHARE, free_bytes
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.groups import UnitGroup
from optin_deploy.structure.solvable import Solvable, solvable
from optin_deploy.structure.solving import Changes, scales
from optin_deploy.structure.structure import Contraction

DAMPING = 1.0
"""Damping of the least squares, which are solved for the normal equations."""
LARGEST = 10.0
"""Beyond a factor of [-10, 10] nothing more is tuned."""
FAILED = 3
"""LSMR's reasons from this one on mean that it stopped without a solution."""


def rearranged(keep: Keep, gradients: Mapping[str, Tensor]) -> Keep:
    """The same counts a group, other units: greedily the removed set of least joint loss, |sum of gradients|^2."""
    return {name: _rearranged(units, gradients[name]) for name, units in keep.items()}


def _rearranged(kept: Sequence[int], gradients: Tensor) -> tuple[int, ...]:
    """Every other unit is offered in turn for removal; the member of the set that the set is cheapest without stays."""
    units = gradients.shape[1]
    order = gradients.square().sum(0).argsort().tolist()
    count = units - len(kept)
    removed = order[:count]
    total = gradients[:, removed].sum(1)  # (samples,)
    for unit in order[count:] if count else ():
        removed.append(unit)
        total = total + gradients[:, unit]
        without = (total.unsqueeze(1) - gradients[:, removed]).square().sum(0)
        spared = removed.pop(int(without.argmin()))
        total = total - gradients[:, spared]
    gone = set(removed)
    return tuple(unit for unit in range(units) if unit not in gone)


def tuned(subject: Subject, keep: Keep, batches: Sequence[Batch], *, teacher: Keep, first_token: bool) -> Network:
    """The network with factors on kept units that bring each branch's sum with its residual nearest to the teacher's.

    In the order of work. As released: the heads of the first layer are not tuned, and all tuning ends at the first
    factor beyond 10.
    Args:
        teacher: of the network to come near to, which is pruned half as much.
        first_token: let the last block look at the first token alone, which a text classifier reads.
    Returns: the whole network with the factors folded into the output projections.
    """
    work = _Streams(subject, keep, teacher, batches)
    todo = [group for group in groups_of(subject) if group.name in bypassed(subject.layout)]
    with torch.no_grad():
        for group in todo:
            kept = keep.get(group.name, tuple(range(group.units)))
            if not kept or (group is todo[0] and group.kind == "heads"):
                continue
            product = solvable(subject.structure, _site(group).node)
            factors = work.factors(
                group, product, kept, offset=group.kind == "heads", first_token=first_token and group is todo[-1]
            )
            if factors is None:
                break
            every = torch.arange(product.linear.outputs)
            columns = torch.arange(product.linear.inputs)
            matrix = work.changes.matrix(product)
            work.changes.add(product, every, columns, matrix * (factors[work.along(group)] - 1))
    return with_weights(subject.program.network, work.changes.weights)


def _site(group: UnitGroup) -> Contraction:
    return next(site for site in group.sites if site.with_weight)


class _Streams:
    """Teacher and student side by side; factors go into the student at once."""

    def __init__(self, subject: Subject, keep: Keep, teacher: Keep, batches: Sequence[Batch]) -> None:
        self.subject, self.batches = subject, batches
        program: Program = subject.program
        self.changes = Changes(program.network, program.device)
        budget = int(SHARE * free_bytes(program.device)) // 2
        self.wanted, self.pruned = (
            Stream(program, batches, masks=masks(subject.layout, some), budget_bytes=budget) for some in (teacher, keep)
        )
        self.pruned.weights = self.changes.weights

    def along(self, group: UnitGroup) -> Tensor:
        """The unit of each column of the group's output projection."""
        site = _site(group)
        return torch.from_numpy(units_along(site.axis, group.leaf))

    def factors(
        self, group: UnitGroup, product: Solvable, kept: Sequence[int], *, offset: bool, first_token: bool
    ) -> Tensor | None:
        """One factor a unit, (units,), 1 where it is cut; None if the fit fails.

        Args: offset: fit also one number that is added everywhere, and dropped.
        """
        at = product.linear.node.index
        self.wanted.advance(at)
        self.pruned.advance(at)
        scale = scales(self.pruned, product, product.way.value, rows_of(self.batches[0])).to(self.subject.dtype)
        along = self.along(group)
        chosen = torch.tensor(kept)
        columns = torch.isin(along, chosen).nonzero()[:, 0]
        place = torch.searchsorted(chosen, along[columns])  # which of the kept units
        weight = (self.changes.matrix(product).to(scale) * scale[:, None])[:, columns]  # (hidden, columns)
        products = torch.zeros(len(columns), len(columns), dtype=torch.float64)
        right, sums = torch.zeros(2, len(columns), dtype=torch.float64)
        total, count = 0.0, 0
        for gap, inputs in self._rows(product, first_token):
            inputs = inputs[:, columns]
            products += (inputs.T @ inputs).double()
            right += (inputs * (gap @ weight)).sum(0).double()
            sums += inputs.sum(0).double()
            total, count = total + float(gap.sum()), count + gap.numel()
        # Column c adds a_c w_c to the output; a unit is the sum of its columns.
        one = torch.nn.functional.one_hot(place, len(kept)).double()  # (columns, units)
        normal = one.T @ (products * (weight.T @ weight).double()) @ one
        right = one.T @ right
        if offset:
            added = one.T @ (sums * weight.sum(0))  # of each unit over all outputs
            normal = torch.cat(
                (torch.cat((normal, added[:, None]), 1), torch.cat((added, torch.tensor([float(count)])))[None])
            )
            right = torch.cat((right, torch.tensor([total])))
            right = right - normal[:, -1]  # the released code starts the offset at 1, as the factors
        change, reason, *_ = lsmr(normal.numpy(), right.numpy(), damp=DAMPING)
        factors = torch.ones(group.units, dtype=torch.float64)
        factors[chosen] += torch.tensor(change[: len(kept)])
        return factors if reason < FAILED and bool((factors.abs() <= LARGEST).all()) else None

    def _rows(self, product: Solvable, first_token: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch (rows, hidden) that the sum with the residual lacks, and (rows, inputs) that are
        read."""
        linear, way = product.linear, product.way
        assert way.residual is not None, "a bypassed group's way ends at a residual Add"
        for number, batch in enumerate(self.batches):
            wanted = self.wanted.look(number, [way.value, way.residual])
            found = self.pruned.look(number, [way.value, way.residual, linear.reads])
            gap = sum(wanted[name] - found[name] for name in (way.value, way.residual))
            assert isinstance(gap, Tensor)
            inputs = linear.rows_in(found[linear.reads], rows_of(batch))
            gap = gap.reshape(*inputs.shape[:2], -1)
            if first_token:
                yield gap[:, 0], inputs[:, 0]
                continue
            real = batch[MASK].bool() if MASK in batch else torch.ones(inputs.shape[:2], dtype=torch.bool)
            yield gap[real], inputs[real]
