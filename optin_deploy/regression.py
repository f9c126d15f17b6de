"""Linear regression from sums over rows: the memory does not grow with the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.errors import NonFiniteActivation


class Moments:
    """Sums that determine a linear regression of y on x, in float64 on the CPU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0.0
        self.x, self.y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.yy = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take rows x (rows, inputs), y (rows, outputs); a row of weight 2, of weights (rows,), counts twice."""
        x, y = x.double().cpu(), y.double().cpu()
        rows = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double().cpu()
        weighted = x * rows.unsqueeze(1)
        self.count += float(rows.sum())
        self.x += weighted.sum(0)
        self.y += rows @ y
        self.xx += x.T @ weighted
        self.xy += weighted.T @ y
        self.yy += float(rows @ y.square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        both = Moments(len(self.x), len(self.y))
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
        part.yy = float((lost * products[cut]).sum())
        return part

    def solve(self, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
        """Coefficients (inputs, outputs) and offset (outputs,) of y ~ x @ coefficients + offset."""
        count = self.count or 1.0
        mean_x, mean_y = (self.x / count, self.y / count) if centred else (self.x * 0, self.y * 0)
        if not len(self.x):
            return self.xy, mean_y
        covariance = self.xx / count - torch.outer(mean_x, mean_x)
        cross = self.xy / count - torch.outer(mean_x, mean_y)
        # Inputs that hardly vary leave rounding noise alone; the ridge stays well above it.
        noise = 1e-8 * self.xx.diagonal().mean() / count
        spread = covariance.diagonal().mean().clamp(min=max(float(noise), 1e-30))
        covariance.diagonal().add_(ridge * spread)
        try:
            coefficients = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance))
        except RuntimeError as err:  # not positive, which a ridge makes every finite covariance
            raise NonFiniteActivation(
                "what a projection reads on the calibration data holds NaN or infinity, or numbers too large to be "
                "fitted. Check the weights and the data."
            ) from err
        return coefficients, mean_y - mean_x @ coefficients

    def error(self, coefficients: Tensor, offset: Tensor) -> float:
        """Sum of squared errors of a solution on these rows."""
        fitted = (coefficients * (self.xx @ coefficients)).sum() + 2 * offset @ (self.x @ coefficients)
        fitted = fitted + self.count * offset @ offset
        return float(self.yy - 2 * (coefficients * self.xy).sum() - 2 * offset @ self.y + fitted)


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of a regression's inputs."""
HELD_OUT_EVERY = 5
"""Every fifth sample judges a ridge; the final solution uses all."""
MOST_INPUTS = 8192
"""Unknowns of a regression for each output; the sums of one of so many take half a GiB."""


class Ridge:
    """Linear regression whose ridge is chosen by the error on every fifth sample."""

    def __init__(self, inputs: int, outputs: int, *, centred: bool, ridges: Sequence[float] = RIDGES) -> None:
        self.centred, self.ridges = centred, ridges
        self.fit, self.judge = (Moments(inputs, outputs) for _ in range(2))
        self.samples = 0

    def add(self, x: Tensor, y: Tensor, counts: Tensor) -> None:
        """Take samples x (batch, rows, inputs), y (batch, rows, outputs).

        Args: counts: (batch, rows), what the error at each row counts; rows that count 0 are left out.
        """
        judged = (torch.arange(len(counts)) + self.samples) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        real, judged = counts > 0, judged.to(counts.device).unsqueeze(1)
        for moments, part in ((self.fit, real & ~judged), (self.judge, real & judged)):
            moments.add(x[part], y[part], counts[part])
        self.samples += len(counts)

    def chosen(self) -> tuple[float, float | None]:
        """The ridge of least error on the samples that judge, and that error; without any the middle ridge."""
        if not (self.fit.count and self.judge.count):
            return self.ridges[len(self.ridges) // 2], None
        errors = [(self.judge.error(*self.fit.solve(ridge, self.centred)), ridge) for ridge in self.ridges]
        error, ridge = min(errors, key=lambda each: each[0])
        return ridge, error

    def solve(self, ridge: float | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients (inputs, outputs) and offset (outputs,) from all samples, in float64 on the CPU."""
        return (self.fit + self.judge).solve(self.chosen()[0] if ridge is None else ridge, self.centred)
