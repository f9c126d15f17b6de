"""Other importance scores for the same heads and neurons, all with one signature: what ours is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.common.guard import inference
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.axes import units_along
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.scoring.sites import masks_of
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.groups import UnitGroup, WeightSlice

KINDS = ("heads", "neurons")
"""Kinds of the groups that are compared."""
Importance = dict[str, Tensor]
"""Importance by name of group, (units,) in float64 on the CPU, higher = keep."""
Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""(outputs by name, index of the batch) -> loss of each sample, (rows,). The labels live in the closure. What a
transformers model puts out is such a mapping too."""
Rival = Callable[[nn.Module, Subject, Sequence[Batch], Loss], Importance]
"""Scores all units of a model that the subject's network was read from; both are left as they were."""


def groups_of(subject: Subject) -> list[UnitGroup]:
    """Groups that are compared, in the order of work."""
    return [group for group in subject.layout.groups if group.kind in KINDS]


def magnitude(model: nn.Module, subject: Subject, batches: Sequence[Batch], loss: Loss) -> Importance:
    """L2 norm of all weights that leave with a unit; no data.

    These are the unit's columns of the output projection, and its rows of every input projection (q, k, v of a head;
    up, and gate if there is one, of a neuron). Both sides, as in DepGraph's group magnitude: either alone says nothing
    of a unit that the other turns off. Biases are left out, as Torch-Pruning does.
    Caveats: activations and residual stream are ignored, layers are hardly comparable, and scaling v up and o down by
    the same factor changes the norm but not the model.
    """
    weights = subject.structure.network.weights

    def norms(group: UnitGroup) -> Tensor:
        squares = torch.zeros(group.units, dtype=torch.float64)
        for part in _matrices(subject, group):
            values = torch_tensor(weights[part.weight]).double().square()
            along = values.sum([axis for axis in range(values.dim()) if axis != part.position])
            unit = torch.from_numpy(units_along(part.axis, group.leaf))
            squares.index_add_(0, unit[unit >= 0], along[unit >= 0])
        return squares.sqrt()

    return {group.name: norms(group) for group in groups_of(subject)}


def random(model: nn.Module, subject: Subject, batches: Sequence[Batch], loss: Loss, *, seed: int = 0) -> Importance:
    """Uniform in [0, 1), by the seed and the layout alone: what a score must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups_of(subject)
    }


def fisher(model: nn.Module, subject: Subject, batches: Sequence[Batch], loss: Loss) -> Importance:
    """Diagonal Fisher of the masks: sum over samples of (d loss of the sample / d mask of the unit)^2, at mask 1.

    Masks of shape (rows, units) keep the samples of a batch apart, so one backward pass a batch is enough.
    Source: Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022 (arXiv 2204.09656),
    section 4.1: the score alone, without their mask rearrangement and tuning.
    Caveats: needs labels; small where the model fits its data well. Their released code squares the gradient of a
    batch's mean loss, in which samples cancel; here, as in the paper, each sample's own is squared.
    """
    return squared(mask_gradients(subject, batches, loss))


def squared(gradients: Mapping[str, Tensor]) -> Importance:
    """The diagonal Fisher of gradients that `mask_gradients` gave."""
    return {name: gradient.square().sum(0) for name, gradient in gradients.items()}


def mask_gradients(subject: Subject, batches: Sequence[Batch], loss: Loss) -> dict[str, Tensor]:
    """d loss / d mask of every sample and unit at mask 1: (samples, units) a group, float64 on the CPU."""
    groups = groups_of(subject)
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with torch.enable_grad():
        for index, batch in enumerate(batches):
            ones = [torch.ones(rows_of(batch), g.units, dtype=subject.dtype, requires_grad=True) for g in groups]
            masks = masks_of(
                (site, site.of_units(each))
                for group, each in zip(groups, ones, strict=True)
                for site in subject.sites[group.name]
            )
            total = loss(subject.run(batch, masks=masks).outputs, index).sum()
            for group, gradient in zip(groups, torch.autograd.grad(total, ones), strict=True):
                found[group.name].append(gradient.double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def torch_pruning_taylor(model: nn.Module, subject: Subject, batches: Sequence[Batch], loss: Loss) -> Importance:
    """Torch-Pruning's own group Taylor importance, with its defaults, on the groups of its own dependency graph.

    Weight gradients of the loss are summed over all batches, as in its examples; over samples, not batch means, so
    that batches do not matter (the scale cancels). Its score of a channel is the mean, over the linear layers that
    share it (q, k, v and o; up, gate and down), of the sum of |w * dw| over the channel's weights. A head is the mean
    of its channels, as its pruner does with `prune_num_heads=True`; the group is taken from the output projection, as
    its pruner does for attention: the same members, whichever is the root.
    Source: Molchanov et al., CVPR 2019; Fang et al., DepGraph, CVPR 2023 (arXiv 2301.12900); torch-pruning 1.6.1.
    Caveats: needs labels. The default normalizer divides by the group's mean, so every layer has mean 1 (heads and
    neurons each), and a ranking across layers compares shares, not losses. The sum over samples stands inside the
    absolute value, so samples cancel. Rows of q and k count as much as those of v, and biases not at all. Its sums
    over a group are in float32.
    Raises: MissingDependency: no torch-pruning. BadInput: it groups other layers than the layout does.
    """
    try:
        import torch_pruning
    except ImportError as err:
        raise MissingDependency("torch-pruning is not installed. Run: pip install 'optin-deploy[peers]'") from err
    work = copy.deepcopy(model).eval().requires_grad_(True)  # its tracing follows gradients through every layer
    takes = {port.name for port in subject.structure.network.inputs}
    fed = [{name: value for name, value in batch.items() if name in takes} for batch in batches]
    sample = {name: value[:1] for name, value in fed[0].items()}
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(work, sample, output_transform=lambda output: output[0], verbose=False)
        for index, batch in enumerate(fed):
            loss(work(**batch), index).sum().backward()  # type: ignore[no-untyped-call]
    taylor = torch_pruning.importance.GroupTaylorImportance()

    def scores(group: UnitGroup) -> Tensor:
        parts = _matrices(subject, group)
        reads = next(part for part in parts if part.position == 1)  # the columns of a Linear
        root = work.get_submodule(_module(reads))
        channels = list(range(reads.axis.size))
        members = graph.get_pruning_group(root, torch_pruning.prune_linear_in_channels, channels)
        wanted = {work.get_submodule(_module(part)) for part in parts}
        _check_group(_module(reads), wanted, [dependency.target.module for dependency, _ in members])
        importance: Tensor = taylor(members)  # one a channel
        unit = torch.from_numpy(units_along(reads.axis, group.leaf))
        summed = torch.zeros(group.units, dtype=torch.float64).index_add_(0, unit, importance.double().cpu())
        return summed / group.width

    with inference(model):
        return {group.name: scores(group) for group in groups_of(subject)}


def _check_group(path: str, expected: set[nn.Module], members: Sequence[object]) -> None:
    found = {member for member in members if isinstance(member, (nn.Linear, nn.LayerNorm))}
    if found != expected:
        raise BadInput(
            f"Torch-Pruning's group of {path} has {len(found)} layers with weights where the layout has "
            f"{len(expected)}, or others: its scores are of other units. Leave this rival out for this model."
        )


def _matrices(subject: Subject, group: UnitGroup) -> list[WeightSlice]:
    """Places of units on weights of more than one axis, each once."""
    weights = subject.structure.network.weights
    parts = {(part.weight, part.position): part for part in group.slices}.values()
    return [part for part in parts if sum(size > 1 for size in weights[part.weight].shape.numpy()) > 1]


def _module(part: WeightSlice) -> str:
    return part.weight.rpartition(".")[0]


RIVALS: dict[str, Rival] = {
    "magnitude": magnitude,
    "random": random,
    "fisher": fisher,
    "torch_pruning_taylor": torch_pruning_taylor,
}
