"""The order in which a group's units are removed: cheapest first, by how far losing one moves the output once the
others compensate.

A unit is worth little where it moves the output little, and also where the units beside it can say the same: the
products that use it are solved for anew. With H the second moments of what a product reads, W its matrix, and M those
of the gradient of the output distance where the product arrives, losing the columns j and solving for the others costs

    tr( W_j^T M W_j [H^-1]_jj^-1 )

and takes W_j [H^-1]_jj^-1 [H^-1]_j from W, and [H^-1]_j^T [H^-1]_jj^-1 [H^-1]_j from H^-1. The cheapest unit goes,
again and again.

Source: Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992; whole columns, as here: Kurtic et al., ZipLM (arXiv
2302.04089).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optin_deploy.common.regression import Moments
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.planning.curve import RIDGE
from optin_deploy.scoring.hearing import PROBES, slopes_at
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.linear import Linear

SAMPLES = 512
"""Most samples on which gradients are taken."""
ROWS = 8
"""Samples at once: a pass keeps all that it computes."""
SEED = 0
"""Seed of their random directions."""
MOST_OUTPUTS = 4096
"""What more of them count is not looked at, as of classifiers with tens of thousands of classes."""
ROUNDS = 32
"""One in so many of the remaining units is removed before the others are scored again."""


@dataclass(frozen=True, eq=False)
class Use:
    """A matrix whose columns belong to units."""

    weight: Tensor
    """(outputs, columns), float64; its rows so that the squared length of a column is what it moves the output."""
    inverse: Tensor
    """(columns, columns): of the second moments of what is multiplied, with a ridge."""
    unit: Tensor
    """(columns,): the unit that each column belongs to, -1: to none, so that it stays; all units have the same number
    of them."""

    @classmethod
    def make(cls, matrix: Tensor, metric: Tensor, moments: Moments, unit: Tensor, *, centred: bool) -> Use:
        """Put a matrix (outputs, columns) together with what its outputs count, (outputs, outputs), and what it reads.

        Raises: NonFiniteActivation: the moments hold no numbers.
        """
        values, vectors = torch.linalg.eigh(metric)
        root = (vectors * values.clamp(min=0).sqrt()).T
        return cls(root @ matrix, moments.inverse(RIDGE, centred), unit)

    def costs(self, units: Tensor) -> Tensor:
        """What the loss of each of these units costs, if the others are solved for; (units,)."""
        others = int((self.unit < 0).sum())
        columns = self.unit.argsort(stable=True)[others:].view(len(units), -1)  # ascending, as units are
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        lost = self.weight[:, columns].movedim(1, 0)  # (units, outputs, columns of a unit)
        costs: Tensor = (lost * torch.linalg.solve(blocks, lost.mT).mT).sum((1, 2))
        return costs

    def without(self, units: Tensor) -> Use:
        """What is left when these units are gone and the others solved for."""
        gone = torch.isin(self.unit, units)
        stay = ~gone
        shares = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone][:, stay])
        return Use(
            self.weight[:, stay] - self.weight[:, gone] @ shares,
            self.inverse[stay][:, stay] - self.inverse[stay][:, gone] @ shares,
            self.unit[stay],
        )


@dataclass(frozen=True)
class Removal:
    """Which units of a group stay, and what the others are expected to cost."""

    order: tuple[int, ...]
    """All units, those first that are kept longest."""
    costs: np.ndarray
    """Expected movement of the output by number of kept units, from none to all."""


def removal(uses: Sequence[Use], scores: Tensor) -> Removal:
    """Let the units of a group go one by one; of equal ones those of the lower score first.

    Args: uses: all matrices that use them. scores: (units,).
    """
    left = torch.arange(len(scores))
    gone, costs = list[int](), [0.0]
    while len(left):
        each = torch.stack([use.costs(left) for use in uses]).sum(0)
        by_score = scores[left].argsort(stable=True)
        cheapest = by_score[each[by_score].argsort(stable=True)][: max(1, len(left) // ROUNDS)]
        gone += left[cheapest].tolist()
        costs += (costs[-1] + each[cheapest].cumsum(0)).tolist()
        uses = [use.without(left[cheapest]) for use in uses]
        left = left[~torch.isin(left, left[cheapest])]
    return Removal(tuple(gone[::-1]), np.array(costs[::-1]))


def metrics(subject: Subject, batches: Sequence[Batch], products: Collection[Linear]) -> Mapping[str, Tensor]:
    """What the outputs of products count: second moments of the gradient of the output distance, summed over the rows.

    Args: batches: of which the first `SAMPLES` are looked at.
    Returns: (outputs, outputs) in float64, by name of what a product gives, of a sample on average; products with more
        than `MOST_OUTPUTS` are left out.
    """
    products = [linear for linear in products if linear.outputs <= MOST_OUTPUTS]
    found = {linear.gives: torch.zeros(linear.outputs, linear.outputs, dtype=torch.float64) for linear in products}
    samples = 0
    for batch in micro_batches(batches, 1 if subject.alone else ROWS) if products else ():
        if samples >= SAMPLES:
            break
        gradients = slopes_at(subject, batch, [*found], SEED, most=PROBES)
        for linear in products:
            for each in gradients[linear.gives]:
                rows = linear.rows_out(each, rows_of(batch)).flatten(0, 1).double().cpu()
                found[linear.gives] += rows.T @ rows
        samples += rows_of(batch)
    return {name: summed / max(1, samples) for name, summed in found.items()}
