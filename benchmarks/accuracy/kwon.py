"""What Kwon et al. do after the Fisher scores: rearrange masks inside a layer, then tune them by least squares.

Source: A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022 (arXiv 2204.09656), sections 4.2 and 4.3.
Written from the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.compensate import Weights
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, branch_masks, inference, masked, recorded, run_blocks
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.rewrite.slices import unit_columns
from optin_deploy.scoring.features import valid_tokens

DAMPING = 1.0
"""Of the least squares, as published: it holds units near 1 that hardly put anything out."""
LARGEST = 10.0
"""A layer whose tuned mask leaves [-10, 10] keeps its binary mask, as published."""


def rearranged(masks: Masks, layout: ModelLayout, gradients: Mapping[Branch, Tensor]) -> Masks:
    """The same counts a layer, other units: greedily the removed set of least joint loss, |sum of gradients|^2."""
    heads, neurons = (
        tuple(
            _rearranged(keep, gradients[getattr(layer, kind)]) for keep, layer in zip(kept, layout.layers, strict=True)
        )
        for kind, kept in (("attention", masks.heads), ("ffn", masks.neurons))
    )
    return Masks(heads, neurons, layout.hash)


def _rearranged(keep: Sequence[bool], gradients: Tensor) -> tuple[bool, ...]:
    """Every other unit is offered in turn for removal; the member of the set that the set is cheapest without stays."""
    order = gradients.square().sum(0).argsort().tolist()
    count = len(keep) - sum(keep)
    removed = order[:count]
    total = gradients[:, removed].sum(1)  # (samples,)
    for unit in order[count:] if count else ():
        removed.append(unit)
        total = total + gradients[:, unit]
        without = (total.unsqueeze(1) - gradients[:, removed]).square().sum(0)
        spared = removed.pop(int(without.argmin()))
        total = total - gradients[:, spared]
    gone = set(removed)
    return tuple(unit not in gone for unit in range(len(keep)))


def tuned(model: nn.Module, layout: ModelLayout, plan: PruningPlan, batches: Sequence[Batch]) -> Weights:
    """Factors on kept units that bring each branch's sum with its residual nearest to the dense one, first layer first.

    Returns: the output projections with the factors folded in.
    """
    student = copy.deepcopy(model)
    weights: Weights = {}
    with (
        inference(model),
        inference(student),
        torch.no_grad(),
        masked(student, branch_masks(layout, plan.masks(layout))),
    ):
        for index, layer in enumerate(layout.layers):
            for branch, kept in ((layer.attention, plan.heads[index]), (layer.ffn, plan.neurons[index])):
                projection = student.get_submodule(branch.output)
                assert isinstance(projection, nn.Linear)
                factors = _factors(model, student, layout, branch, torch.tensor(kept, dtype=torch.long), batches)
                weight = projection.weight.detach() * factors.repeat_interleave(branch.unit_width).to(projection.weight)
                weights[f"{branch.output}.weight"] = weight
                projection.load_state_dict({"weight": weight}, strict=False)
    return weights


def _factors(
    model: nn.Module, student: nn.Module, layout: ModelLayout, branch: Branch, kept: Tensor, batches: Sequence[Batch]
) -> Tensor:
    """One factor a unit, (units,); 1 where nothing is tuned."""
    columns = unit_columns(kept.tolist(), branch.unit_width)
    weight = student.get_parameter(f"{branch.output}.weight").detach()[:, columns]  # (hidden, kept * width)
    products = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    right = torch.zeros(len(columns), dtype=torch.float64)
    for batch in batches:
        with recorded(model, inputs=[branch.residual], outputs=[branch.output]) as dense:
            run_blocks(model, layout, batch, stop=branch.output)
        with recorded(student, inputs=[branch.residual, branch.output], outputs=[branch.output]) as pruned:
            run_blocks(student, layout, batch, stop=branch.output)
        real = valid_tokens(batch, pruned.outputs[branch.output]).bool()
        gap = dense.outputs[branch.output] + dense.inputs[branch.residual]
        gap = (gap - pruned.outputs[branch.output] - pruned.inputs[branch.residual])[real]  # (rows, hidden)
        inputs = pruned.inputs[branch.output][real][:, columns]
        products += (inputs.T @ inputs).double()
        right += (inputs * (gap @ weight)).sum(0).double()
    # Column c adds a_c w_c to the output; a unit is the sum of its columns.
    normal = (products * (weight.T @ weight).double()).view(len(kept), branch.unit_width, len(kept), -1).sum((1, 3))
    right = right.view(len(kept), branch.unit_width).sum(1)
    normal.diagonal().add_(DAMPING**2)
    factors = torch.ones(branch.units, dtype=torch.float64)
    factors[kept] += torch.linalg.solve(normal, right)
    return factors if bool((factors.abs() <= LARGEST).all()) else torch.ones_like(factors)
