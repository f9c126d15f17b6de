"""Linear regression from sums over rows: the memory does not grow with the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.errors import NonFiniteActivation


class Moments:
    """Sums that determine a linear regression of y on x, or one for each of several groups; float64 on the CPU."""

    def __init__(self, inputs: int, outputs: int, groups: int | None = None) -> None:
        """Args: groups: all tensors, given and kept, have one more axis in front; None: they have not."""
        lead = () if groups is None else (groups,)
        self.count = 0.0
        self.x, self.y = (torch.zeros(*lead, size, dtype=torch.float64) for size in (inputs, outputs))
        self.xx, self.xy = (torch.zeros(*lead, inputs, size, dtype=torch.float64) for size in (inputs, outputs))
        self.yy = torch.zeros(lead, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take rows x (rows, inputs), y (rows, outputs); a row of weight 2, of weights (rows,), counts twice."""
        x, y = x.double().cpu(), y.double().cpu()
        rows = torch.ones(x.shape[-2], dtype=torch.float64) if weights is None else weights.double().cpu()
        weighted = x * rows.unsqueeze(1)
        self.count += float(rows.sum())
        self.x += weighted.sum(-2)
        self.y += rows @ y
        self.xx += x.mT @ weighted
        self.xy += weighted.mT @ y
        self.yy += y.square().sum(-1) @ rows

    def __add__(self, other: Moments) -> Moments:
        both = Moments(0, 0)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def narrowed(self, kept: Tensor, weight: Tensor) -> Moments:
        """The sums of another regression on the same rows: of what the inputs left out gave, on those kept.

        Args: kept: indices of inputs. weight: (outputs, inputs), of the projection whose other columns go.
        """
        cut = torch.ones(len(self.x), dtype=torch.bool)
        cut[kept] = False
        lost = weight.double().cpu().T[cut]  # (inputs left out, outputs)
        products = self.xx[:, cut] @ lost  # of all inputs with what is lost
        part = Moments(len(kept), len(weight))
        part.count, part.x, part.y = self.count, self.x[kept], self.x[cut] @ lost
        part.xx, part.xy = self.xx[kept][:, kept], products[kept]
        part.yy = (lost * products[cut]).sum()
        return part

    def solve(self, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
        """Coefficients (inputs, outputs) and offset (outputs,) of y ~ x @ coefficients + offset."""
        count, mean_x, mean_y = self._means(centred)
        if not self.x.shape[-1]:
            return self.xy, mean_y
        cross = self.xy / count - mean_x.unsqueeze(-1) * mean_y.unsqueeze(-2)
        coefficients = torch.cholesky_solve(cross, self._root(ridge, centred))
        return coefficients, mean_y - (mean_x.unsqueeze(-2) @ coefficients).squeeze(-2)

    def inverse(self, ridge: float, centred: bool) -> Tensor:
        """The inverse of what `solve` divides by, (inputs, inputs)."""
        return torch.cholesky_inverse(self._root(ridge, centred))

    def _means(self, centred: bool) -> tuple[float, Tensor, Tensor]:
        """The count of rows, and what is subtracted of x and y."""
        count = self.count or 1.0
        return count, *((self.x / count, self.y / count) if centred else (self.x * 0, self.y * 0))

    def _root(self, ridge: float, centred: bool) -> Tensor:
        """Cholesky root of the second moments of x with a ridge.

        Raises: NonFiniteActivation.
        """
        count, mean, _ = self._means(centred)
        covariance = self.xx / count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        # Inputs that hardly vary leave rounding noise alone; the ridge stays well above it.
        noise = 1e-8 * _diagonal(self.xx).mean(-1) / count
        spread = _diagonal(covariance).mean(-1).clamp(min=noise.clamp(min=1e-30))
        _diagonal(covariance).add_((ridge * spread).unsqueeze(-1))
        try:
            root: Tensor = torch.linalg.cholesky(covariance)
        except RuntimeError as err:  # not positive, which a ridge makes every finite covariance
            raise NonFiniteActivation(
                "what a projection reads on the calibration data holds NaN or infinity, or numbers too large to be "
                "fitted. Check the weights and the data."
            ) from err
        return root

    def error(self, coefficients: Tensor, offset: Tensor) -> Tensor:
        """Sum of squared errors of a solution on these rows, of each group."""
        fitted = (coefficients * (self.xx @ coefficients)).sum((-2, -1))
        fitted += 2 * (offset * (self.x.unsqueeze(-2) @ coefficients).squeeze(-2)).sum(-1)
        fitted += self.count * offset.square().sum(-1)
        return self.yy - 2 * (coefficients * self.xy).sum((-2, -1)) - 2 * (offset * self.y).sum(-1) + fitted


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of a regression's inputs."""
HELD_OUT_EVERY = 5
"""Every fifth sample judges a ridge; the final solution uses all."""
MOST_INPUTS = 8192
"""Unknowns of a regression for each output; the sums of one of so many take half a GiB."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a regression found."""

    change: Tensor
    """Coefficients, (inputs, outputs), of each group."""
    offset: Tensor
    """(outputs,), of each group."""
    better: Tensor
    """Whether that is better than nothing, for each group."""
    ridge: float
    """Relative to the mean variance of the inputs."""
    before: float
    """Mean squared error of doing nothing, on the samples that judge."""
    after: float
    """The same where what is better is done."""


class Ridge:
    """Linear regression, or one a group, whose ridge is chosen by the error on every fifth sample."""

    def __init__(self, inputs: int, outputs: int, *, centred: bool, groups: int | None = None) -> None:
        self.centred = centred
        self.fit, self.judge = (Moments(inputs, outputs, groups) for _ in range(2))
        self.samples = 0

    def add(self, x: Tensor, y: Tensor, counts: Tensor) -> None:
        """Take samples x (batch, rows, inputs), y (batch, rows, outputs).

        Args: counts: (batch, rows), what the error at each row counts; rows that count 0 are left out.
        """
        judged = (torch.arange(len(counts)) + self.samples) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        real, judged = counts > 0, judged.to(counts.device).unsqueeze(1)
        for moments, part in ((self.fit, real & ~judged), (self.judge, real & judged)):
            moments.add(x[..., part, :], y[..., part, :], counts[part])
        self.samples += len(counts)

    def solution(self) -> Solution:
        """Solve with the ridge of least error on the samples that judge, from all samples; without any that judge with
        the middle ridge."""
        both = self.fit + self.judge
        if not (self.fit.count and self.judge.count):
            ridge, judge = RIDGES[len(RIDGES) // 2], self.fit
            found = both.solve(ridge, self.centred)
            errors = judge.error(*found)
        else:
            judge = self.judge
            tried = [(judge.error(*self.fit.solve(ridge, self.centred)), ridge) for ridge in RIDGES]
            errors, ridge = min(tried, key=lambda each: float(torch.minimum(each[0], judge.yy).sum()))
            found = both.solve(ridge, self.centred)
        before, after = (float(each.sum()) / (judge.count or 1.0) for each in (judge.yy, errors.minimum(judge.yy)))
        return Solution(*found, errors < judge.yy, ridge, before, after)
