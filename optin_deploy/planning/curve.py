"""The error of a network in which one group alone gets narrower, measured at a few widths and interpolated between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from optin_deploy.errors import BadInput
from optin_deploy.validation import STORED

SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Measured widths, of a group's units; with all of them the error is 0."""
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

    def at(self, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Interpolated errors, monotone between the measured widths."""
        found: np.ndarray = PchipInterpolator(self.counts, self.errors)(np.asarray(counts)).clip(min=0)
        return found
