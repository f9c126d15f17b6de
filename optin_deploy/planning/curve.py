"""The error of a network in which one group alone gets narrower, measured at a few widths and known between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from optin_deploy.common.validation import STORED
from optin_deploy.errors import BadInput

SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Measured widths, of a group's units; with all of them the error is 0."""
FEW = (0, 1 / 8, 3 / 8, 3 / 4)
"""The same where it is known how the error falls between them."""
TINY = 1e-12
"""Errors and ratios of them below this are rounding."""
GRID = 64
"""Steps between no and all units in which such a curve is kept, at most."""
RIDGE = 1e-2
"""Relative to the mean variance of the kept inputs: the middle of what compensation chooses from."""


@dataclass(frozen=True)
class Curve:
    """The error of one group at some widths."""

    __pydantic_config__ = STORED

    counts: tuple[int, ...]
    """Kept units, ascending from 0 to all."""
    errors: tuple[float, ...]
    """Mean distance of the outputs to the dense ones; never rises, 0 at the end."""
    order: tuple[int, ...]
    """All units: those that stay first. A group of some width keeps so many from the front."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        falling = all(a >= b for a, b in zip(self.errors, self.errors[1:], strict=False))
        if len(self.counts) < 2 or len(self.counts) != len(self.errors) or self.counts[0] != 0:
            raise BadInput(f"curve: give an error for 0 to all units: {self.counts}, {self.errors}.")
        if not (ascending and falling and self.errors[-1] == 0 and np.isfinite(self.errors).all()):
            raise BadInput(f"curve: counts must rise, and errors fall to 0: {self.counts}, {self.errors}.")
        if sorted(self.order) != list(range(self.counts[-1])):
            raise BadInput(f"curve: the order must name each of {self.counts[-1]} units once: {self.order[:8]}, ..")

    def error(self, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Interpolated errors, monotone between the measured widths."""
        found: np.ndarray = PchipInterpolator(self.counts, self.errors)(np.asarray(counts)).clip(min=0)
        return found


def fitted_curve(counts: Sequence[int], errors: Sequence[float], expected: np.ndarray, order: Sequence[int]) -> Curve:
    """Return the curve that falls as expected, and lies where it was measured.

    A measured error is that of a hundred samples or so, of which few count: an exact search picks what errs downwards.
    What is expected comes of all samples but for small changes alone. So the errors are a power of it, by least squares
    of the logarithms; without any unit the error is as measured.
    Args: counts: from 0 on, without all units. expected: errors by number of kept units, falling to 0.
    """
    units = len(expected) - 1
    grid = np.unique(np.linspace(0, units - 1, min(units, GRID)).round().astype(int))
    measured = np.array([(count, error) for count, error in zip(counts, errors, strict=True) if count])
    known, found = expected[grid], np.full(len(grid), errors[0])
    if len(measured):
        some = np.maximum(expected[measured[:, 0].astype(int)], TINY)
        ratios = np.log(np.maximum(measured[:, 1] / some, TINY))
        x = np.log(some)
        power, scale = np.polyfit(x, ratios, 1) if np.ptp(x) else (0.0, ratios.mean())
        found = known * np.exp(scale + max(power, -1) * np.log(np.maximum(known, TINY)))
        found[0] = max(errors[0], *found[1:2])
    return Curve((*grid.tolist(), units), (*np.minimum.accumulate(found).tolist(), 0.0), tuple(order))
