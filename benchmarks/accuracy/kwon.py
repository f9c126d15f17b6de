"""What Kwon et al. do after the Fisher scores: rearrange masks inside a layer, then tune them by least squares.

Source: A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022 (arXiv 2204.09656), sections 4.2 and 4.3;
details that the paper leaves open as in the released code (WoosukKwon/retraining-free-pruning), none of which is here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from optin_deploy.compensate import Weights
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, branch_masks, inference, masked, recorded, run_blocks
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.rewrite.slices import unit_columns
from optin_deploy.scoring.features import valid_tokens

DAMPING = 1.0
"""Of the least squares, which are solved for the normal equations."""
LARGEST = 10.0
"""Beyond a factor of [-10, 10] nothing more is tuned."""
FAILED = 3
"""From this reason on, LSMR stopped without a solution."""


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


def tuned(
    model: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    teacher: Masks,
    first_token: bool,
) -> Weights:
    """Factors on kept units that bring each branch's sum with its residual nearest to the teacher's, first layer first.

    As released: the heads of the first layer are not tuned, and all tuning ends at the first factor beyond 10.
    Args:
        teacher: of the model to come near to, which is pruned half as much.
        first_token: let the last block look at the first token alone, which a text classifier reads.
    Returns: the output projections with the factors folded in.
    """
    model, student = copy.deepcopy(model), copy.deepcopy(model)
    weights: Weights = {}
    with (
        inference(model),
        inference(student),
        torch.no_grad(),
        masked(model, branch_masks(layout, teacher)),
        masked(student, branch_masks(layout, plan.masks(layout))),
    ):
        for index, layer in enumerate(layout.layers):
            for branch, kept in ((layer.attention, plan.heads[index]), (layer.ffn, plan.neurons[index])):
                if not kept or (index == 0 and branch is layer.attention):
                    continue
                alone = first_token and branch is layout.layers[-1].ffn
                units = torch.tensor(kept)
                factors = _factors(
                    model, student, layout, branch, units, batches, offset=branch is layer.attention, first_token=alone
                )
                if factors is None:
                    return weights
                projection = student.get_submodule(branch.output)
                assert isinstance(projection, nn.Linear)
                weight = projection.weight.detach() * factors.repeat_interleave(branch.unit_width).to(projection.weight)
                weights[f"{branch.output}.weight"] = weight
                projection.load_state_dict({"weight": weight}, strict=False)
    return weights


def _factors(
    teacher: nn.Module,
    student: nn.Module,
    layout: ModelLayout,
    branch: Branch,
    kept: Tensor,
    batches: Sequence[Batch],
    *,
    offset: bool,
    first_token: bool,
) -> Tensor | None:
    """One factor a unit, (units,), 1 where it is cut; None if the fit fails.

    Args: offset: fit also one number that is added everywhere, and dropped.
    """
    columns = unit_columns(kept.tolist(), branch.unit_width)
    weight = student.get_parameter(f"{branch.output}.weight").detach()[:, columns]  # (hidden, kept * width)
    products = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    right = torch.zeros(len(columns), dtype=torch.float64)
    sums, total, count = torch.zeros(len(columns), dtype=torch.float64), 0.0, 0
    for batch in batches:
        with recorded(teacher, inputs=[branch.residual], outputs=[branch.output]) as wanted:
            run_blocks(teacher, layout, batch, stop=branch.output)
        with recorded(student, inputs=[branch.residual, branch.output], outputs=[branch.output]) as pruned:
            run_blocks(student, layout, batch, stop=branch.output)
        gap = wanted.outputs[branch.output] + wanted.inputs[branch.residual]
        gap = gap - pruned.outputs[branch.output] - pruned.inputs[branch.residual]
        inputs = pruned.inputs[branch.output][..., columns]
        if first_token:
            gap, inputs = gap[:, 0], inputs[:, 0]
        else:
            real = valid_tokens(batch, gap).bool()
            gap, inputs = gap[real], inputs[real]  # (rows, hidden), (rows, kept * width)
        products += (inputs.T @ inputs).double()
        right += (inputs * (gap @ weight)).sum(0).double()
        sums += inputs.sum(0).double()
        total, count = total + float(gap.sum()), count + gap.numel()
    # Column c adds a_c w_c to the output; a unit is the sum of its columns.
    normal = (products * (weight.T @ weight).double()).view(len(kept), branch.unit_width, len(kept), -1).sum((1, 3))
    right = right.view(len(kept), branch.unit_width).sum(1)
    if offset:
        added = (sums * weight.sum(0)).view(len(kept), branch.unit_width).sum(1)  # of each unit over all outputs
        normal = torch.cat(
            (torch.cat((normal, added[:, None]), 1), torch.cat((added, torch.tensor([float(count)])))[None])
        )
        right = torch.cat((right, torch.tensor([total])))
        right = right - normal[:, -1]  # the released code starts the offset at 1, as the factors
    change, reason, *_ = lsmr(normal.numpy(), right.numpy(), damp=DAMPING)
    factors = torch.ones(branch.units, dtype=torch.float64)
    factors[kept] += torch.tensor(change[: len(kept)])
    solved = reason < FAILED
    return factors if solved and bool((factors.abs() <= LARGEST).all()) else None
