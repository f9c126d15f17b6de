"""What cells share on one device: dense models, their cost, their pruned variants; each made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.models import MODELS, PRUNED, Costs, Plan, build, costs, cut, model_inputs, pruning_plan

SEED = 0
"""Seed of weights, plans, inputs and orders; written into each result."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A pruned model in float32 on the device."""

    model: nn.Module
    plan: Plan
    kept: float
    """Pruned MACs / dense MACs at the length that is measured."""


class Workbench:
    """Makes models when they are first asked for, and keeps them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dense: dict[str, nn.Module] = {}
        self._variants: dict[tuple[str, float | None, int | None], dict[str, Variant]] = {}

    def dense(self, name: str) -> nn.Module:
        """A model of the table, in float32 on the device."""
        if name not in self._dense:
            self._dense[name] = build(name, self.device, seed=SEED)
        return self._dense[name]

    def cost(self, name: str, seq: int | None) -> Costs:
        """MACs of a model and its units at a length."""
        return costs(name, seq)

    def cut(self, name: str, plan: Plan) -> nn.Module:
        """A model of the table with the units of a plan."""
        return cut(self.dense(name), MODELS[name], plan)

    def variants(self, cell: Cell) -> dict[str, Variant]:
        """The pruned variants of a cell's model, at its budget and length."""
        key = (cell.model, cell.keep, cell.seq)
        if key not in self._variants:
            assert cell.keep is not None, "cells of these kinds have a budget"
            cost = self.cost(cell.model, cell.seq)
            plans = {name: pruning_plan(cost, name, cell.keep, seed=SEED) for name in PRUNED}
            self._variants[key] = {
                name: Variant(self.cut(cell.model, plan), plan, cost.of(plan) / cost.dense)
                for name, plan in plans.items()
            }
        return self._variants[key]

    def inputs(self, cell: Cell, *, seed: int = SEED) -> dict[str, Tensor]:
        """Random inputs of a cell, on the device."""
        model = self.dense(cell.model)
        padded = cell.inputs == "padded"
        return model_inputs(model, self.device, batch=cell.batch, seq=cell.seq, padded=padded, seed=seed)

    def synchronize(self) -> None:
        """Return when the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
