"""What cells share on one device: dense models, their cost, their pruned variants; each made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.models import PRUNED, build, model_inputs, pruning_plan
from optin_deploy.arch.resolve import resolve
from optin_deploy.cost.macs import MacCost, ideal_speedup, mac_cost
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.torch import rewrite_torch

SEED = 0
"""Of weights, scores, inputs and orders; written into each result."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense model in float32 on the device."""

    model: nn.Module
    layout: ModelLayout


@dataclass(frozen=True, eq=False)
class Variant:
    """A pruned model in float32 on the device."""

    model: nn.Module
    plan: PruningPlan
    ideal: float
    """Dense MACs / pruned MACs at the length that is measured."""


class Workbench:
    """Makes models when they are first asked for, and keeps them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dense: dict[str, Dense] = {}
        self._costs: dict[tuple[str, int | None], MacCost] = {}
        self._variants: dict[tuple[str, float | None, int | None], dict[str, Variant]] = {}

    def dense(self, name: str) -> Dense:
        """A model of the table."""
        if name not in self._dense:
            model = build(name, self.device, seed=SEED)
            self._dense[name] = Dense(model, resolve(model))
        return self._dense[name]

    def cost(self, name: str, seq: int | None) -> MacCost:
        """MACs of a model and its units at a length."""
        key = (name, seq)
        if key not in self._costs:
            dense = self.dense(name)
            self._costs[key] = mac_cost(dense.model, dense.layout, seq_len=seq or 1)
        return self._costs[key]

    def variants(self, cell: Cell) -> dict[str, Variant]:
        """The pruned variants of a cell's model, at its budget and length."""
        key = (cell.model, cell.keep, cell.seq)
        if key not in self._variants:
            assert cell.keep is not None, "cells of these kinds have a budget"
            dense, cost = self.dense(cell.model), self.cost(cell.model, cell.seq)
            plans = {name: pruning_plan(dense.layout, cost, name, cell.keep, seed=SEED) for name in PRUNED}
            self._variants[key] = {name: self._cut(dense, plan, cell.seq) for name, plan in plans.items()}
        return self._variants[key]

    def _cut(self, dense: Dense, plan: PruningPlan, seq: int | None) -> Variant:
        model = rewrite_torch(dense.model, dense.layout, plan)
        return Variant(model, plan, ideal_speedup(model, dense.layout, plan, seq_len=seq or 1))

    def inputs(self, cell: Cell, *, seed: int = SEED) -> dict[str, Tensor]:
        """Random inputs of a cell, on the device."""
        model = self.dense(cell.model).model
        padded = cell.inputs == "padded"
        return model_inputs(model, self.device, batch=cell.batch, seq=cell.seq, padded=padded, seed=seed)

    def synchronize(self) -> None:
        """Return when the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
