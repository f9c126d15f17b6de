"""Shared arithmetic of cuts: which rows and columns of a weight belong to the kept units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def unit_columns(kept: Sequence[int], unit_width: int) -> Tensor:
    """Indices of the columns of kept units: heads of width h own h neighbours each."""
    first = torch.tensor(kept, dtype=torch.long).view(-1, 1) * unit_width
    return (first + torch.arange(unit_width)).flatten()  # (len(kept) * unit_width,)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The Linear at a path that `resolve` has checked."""
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} was a Linear when the layout was made"
    return module
