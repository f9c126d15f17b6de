"""Shared arithmetic of cuts: which rows and columns of a weight belong to the kept units, however it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optin_deploy.layout import Branch


def unit_columns(kept: Sequence[int], unit_width: int) -> Tensor:
    """Indices of the columns of kept units: heads of width h own h neighbours each."""
    first = torch.tensor(kept, dtype=torch.long).view(-1, 1) * unit_width
    return (first + torch.arange(unit_width)).flatten()  # (len(kept) * unit_width,)


def rows_in_parts(columns: Tensor, width: int, outputs: int) -> Tensor:
    """The same units' rows of an input projection; a fused one (queries, keys, values) has them in every part.

    Args: width: of one part, all units. outputs: of the projection, a multiple of it.
    """
    return (torch.arange(0, outputs, width).view(-1, 1) + columns).flatten()


KINDS = (nn.Linear, Conv1D)
"""Modules that can be cut."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A Linear, or a Conv1D, which is a Linear with its weight transposed: read and made the same way."""

    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs), the parameter itself or a view of it."""
        return self.stored(self.module.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """(outputs,)."""
        return self.module.bias

    @property
    def inputs(self) -> int:
        """Width of what it reads."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Width of what it gives."""
        return self.weight.shape[0]

    def stored(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) -> as the module keeps it, and back."""
        return weight.T if isinstance(self.module, Conv1D) else weight

    def entries(self, path: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """State-dict entries of the module at a path. Args: weight: (outputs, inputs)."""
        found = {f"{path}.weight": self.stored(weight)}
        return found if bias is None else found | {f"{path}.bias": bias}

    def of_size(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new module of the same kind with copies of these. Args: weight: (outputs, inputs)."""
        outputs, inputs = weight.shape
        module: nn.Module
        with torch.device("meta"):  # nothing is initialised in vain; the parameters are set below
            if isinstance(self.module, Conv1D):
                module = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]  # transformers does not type it
            else:
                module = nn.Linear(inputs, outputs, bias=bias is not None)
        module.weight = nn.Parameter(self.stored(weight).detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module.train(self.module.training)


def projection_at(model: nn.Module, path: str) -> Projection:
    """The projection at a path that `resolve` has checked."""
    module = model.get_submodule(path)
    assert isinstance(module, KINDS), f"{path} was a projection when the layout was made"
    return Projection(module)


def widened(model: nn.Module, smaller: nn.Module, branch: Branch, kept: Sequence[int]) -> dict[str, Tensor]:
    """State-dict entries of a branch in the dense shape: of kept units as the smaller model has them, else as they are.

    Args: kept: units that the smaller model has.
    """
    columns = unit_columns(kept, branch.unit_width)
    entries: dict[str, Tensor] = {}
    for path in branch.inputs if kept else ():
        full, small = projection_at(model, path), projection_at(smaller, path)
        rows = rows_in_parts(columns, branch.width, full.outputs)
        weight, bias = full.weight.detach().clone(), None if full.bias is None else full.bias.detach().clone()
        weight[rows] = small.weight.detach()
        if bias is not None and small.bias is not None:
            bias[rows] = small.bias.detach()
        entries |= full.entries(path, weight, bias)
    full, module = projection_at(model, branch.output), smaller.get_submodule(branch.output)
    weight = full.weight.detach().clone()
    if kept:
        weight[:, columns] = projection_at(smaller, branch.output).weight.detach()
    # An emptied branch is its bias.
    new: Any = module.bias
    return entries | full.entries(branch.output, weight, None if full.bias is None else new.detach().clone())
