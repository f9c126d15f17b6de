"""Re-solve the kept output projections in closed form, so that the pruned stream follows the dense one.

Layer by layer on the already pruned stream, minimise over W', b' of the kept columns

    || x' + s * (W' a' + b')  -  (x + s * (W a + b)) ||^2  +  ridge * || W' - W_kept ||^2

a, x: input of the projection and the residual it is added to, dense; a', x': the same in the pruned model; s:
LayerScale. In the norm, a sample's tokens count by how much they move the output (see token_weights.py). No gradient
step, no labels. The ridge is chosen by the error on samples that the solution has not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, inference, recorded, run_blocks
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.regression import Moments
from optin_deploy.rewrite.slices import linear_at, unit_columns
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring.features import valid_tokens
from optin_deploy.token_weights import TokenWeights

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of the kept inputs."""
HELD_OUT_EVERY = 5
"""Every fifth sample judges the ridge; the final solution uses all."""

Weights = dict[str, Tensor]
"""State-dict entries of the dense shape; columns of cut units are untouched."""


def compensate(
    model: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> Weights:
    """New weights and biases of the output projections, dense-shaped; the model itself is untouched.

    Args:
        batches: unlabeled calibration inputs; padding is left out of the fit.
        token_weights: what each token's error counts, of these batches; None = all the same.
    """
    student = rewrite_torch(model, layout, plan)
    weights: Weights = {}
    with inference(model), inference(student), torch.no_grad():
        dense: list[Tensor | None] = [None] * len(batches)
        pruned: list[Tensor | None] = [None] * len(batches)
        for index, layer in enumerate(layout.layers):
            for branch, kept in ((layer.attention, plan.heads[index]), (layer.ffn, plan.neurons[index])):
                problem = _Problem(model, branch, unit_columns(kept, branch.unit_width))
                # The dense model's last look at a block also gives the input of its next one.
                last = layer.path if branch is layer.ffn else branch.output
                for i, batch in enumerate(batches):
                    teacher, ahead = _view(model, layout, branch, batch, index, dense[i], last)
                    pupil, _ = _view(student, layout, branch, batch, index, pruned[i], branch.output)
                    valid = valid_tokens(batch, pupil.residual)
                    problem.add(teacher, pupil, valid, valid if token_weights is None else token_weights[index][i])
                    dense[i] = ahead if branch is layer.ffn else dense[i]
                weights |= problem.solve_into(student)
            for i, batch in enumerate(batches):
                pruned[i] = run_blocks(student, layout, batch, start=index, hidden=pruned[i], stop=layer.path)
            progress(index + 1, len(layout.layers))
    return weights


def apply_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the model with these entries of its state dict replaced."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(weights, strict=False)
    return changed


@dataclass(frozen=True)
class _View:
    """What one model shows at one branch, for one batch."""

    units: Tensor
    """Input of the output projection, (batch, tokens, units * unit_width); of an emptied branch, something else."""
    output: Tensor
    """Output of the projection, (batch, tokens, hidden); of an emptied branch (1, 1, hidden)."""
    residual: Tensor
    """The tensor that the branch is added to, (batch, tokens, hidden)."""


def _view(
    model: nn.Module, layout: ModelLayout, branch: Branch, batch: Batch, index: int, hidden: Tensor | None, stop: str
) -> tuple[_View, Tensor]:
    """Run block `index` up to module `stop`; returns what the branch shows, and the output of `stop`."""
    with recorded(model, inputs=(branch.output, branch.residual), outputs=(branch.output,)) as seen:
        stopped = run_blocks(model, layout, batch, start=index, hidden=hidden, stop=stop)
    inputs, output = seen.inputs, seen.outputs[branch.output]
    return _View(inputs[branch.output], output, inputs[branch.residual]), stopped


class _Problem:
    """Ridge regression of one branch: find the change of the kept columns and of the bias.

    Unknowns and targets are in the residual stream's scale (LayerScale applied); rows are independent, so dividing
    by the scale afterwards gives the same projection as dividing the targets.
    """

    def __init__(self, dense: nn.Module, branch: Branch, columns: Tensor) -> None:
        self.branch, self.columns = branch, columns
        self.start = linear_at(dense, branch.output)
        self.scale: Tensor | None = None if branch.scale is None else dense.get_parameter(branch.scale)
        self.centred = self.start.bias is not None
        hidden = len(self.start.weight)
        self.fit, self.judge = (Moments(len(columns), hidden) for _ in range(2))
        self.samples = 0

    def add(self, dense: _View, pruned: _View, valid: Tensor, weights: Tensor) -> None:
        gap = dense.output - pruned.output  # the start: cut units gone, the others' columns as they were
        if self.scale is not None:
            gap = gap * self.scale
        gap = gap + dense.residual - pruned.residual
        kept = pruned.units[..., : len(self.columns)]  # an emptied branch shows its input instead
        judged = (torch.arange(len(valid)) + self.samples) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        real, judged = valid.bool(), judged.to(valid.device).unsqueeze(1)
        for moments, part in ((self.fit, real & ~judged), (self.judge, real & judged)):
            moments.add(kept[part], gap[part], weights[part])
        self.samples += len(valid)

    def solve_into(self, student: nn.Module) -> Weights:
        """Write the solution into the student; returns the new state-dict entries."""
        ridge = RIDGES[len(RIDGES) // 2]
        if self.fit.count and self.judge.count:
            ridge = min(RIDGES, key=lambda r: self.judge.error(*self.fit.solve(r, self.centred)))
        change, offset = (self.fit + self.judge).solve(ridge, self.centred)
        if self.scale is not None:
            inverse = torch.where(self.scale.abs() > 1e-8, 1 / self.scale, 0).double().cpu()
            change, offset = change * inverse, offset * inverse
        weight = self.start.weight.detach().clone()
        weight[:, self.columns] += change.T.to(weight)
        entries = {f"{self.branch.output}.weight": weight}
        if self.centred:
            entries[f"{self.branch.output}.bias"] = self.start.bias.detach() + offset.to(weight)
        narrow = {name: value[:, self.columns] if value.dim() > 1 else value for name, value in entries.items()}
        student.load_state_dict(narrow, strict=False)
        return entries
