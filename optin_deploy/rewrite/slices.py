"""Shared arithmetic of cuts: which rows and columns of a weight belong to the kept units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_columns(kept: Sequence[int], unit_width: int) -> Tensor:
    """Indices of the columns of kept units: heads of width h own h neighbours each."""
    first = torch.tensor(kept, dtype=torch.long).view(-1, 1) * unit_width
    return (first + torch.arange(unit_width)).flatten()  # (len(kept) * unit_width,)
