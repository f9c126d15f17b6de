"""Other importance scores for the same heads and neurons, all with one signature: what ours is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, inference, masked, rows_of
from optin_deploy.rewrite.slices import projection_at

Importance = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Per layer: heads, each (heads,), and neurons, each (neurons,); float64 on the CPU, higher = keep."""
Loss = Callable[[Any, int], Tensor]
"""(output of the model, index of the batch) -> loss of each sample, (rows,). The labels live in the closure."""
Rival = Callable[[nn.Module, ModelLayout, Sequence[Batch], Loss], Importance]
"""Scores all units of a model, which is left as it was."""


def magnitude(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss) -> Importance:
    """L2 norm of all weights that leave with a unit; no data.

    These are the unit's columns of the output projection, and its rows of every input projection (q, k, v of a head;
    up, and gate if there is one, of a neuron). Both sides, as in DepGraph's group magnitude: either alone says nothing
    of a unit that the other turns off. Biases are left out, as Torch-Pruning does.
    Caveats: activations and residual stream are ignored, layers are hardly comparable, and scaling v up and o down by
    the same factor changes the norm but not the model.
    """

    def norms(branch: Branch) -> Tensor:
        squares = _weight(model, branch.output).square().sum(0)  # (units * width,)
        for path in branch.inputs:
            rows = _weight(model, path).square().sum(1)
            squares = squares + rows.view(-1, branch.width).sum(0)  # a fused projection has the unit in each part
        return squares.view(branch.units, -1).sum(1).sqrt()

    return _by_layer(layout, norms)


def random(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss, *, seed: int = 0) -> Importance:
    """Uniform in [0, 1), by the seed and the layout alone: what a score must beat."""
    generator = torch.Generator().manual_seed(seed)
    return _by_layer(layout, lambda branch: torch.rand(branch.units, generator=generator, dtype=torch.float64))


def fisher(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss) -> Importance:
    """Diagonal Fisher of the masks: sum over samples of (d loss of the sample / d mask of the unit)^2, at mask 1.

    Masks of shape (rows, 1, units) keep the samples of a batch apart, so one backward pass a batch is enough.
    Source: Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022 (arXiv 2204.09656),
    section 4.1: the score alone, without their mask rearrangement and tuning.
    Caveats: needs labels; small where the model fits its data well. Their released code squares the gradient of a
    batch's mean loss, in which samples cancel; here, as in the paper, each sample's own is squared.
    """
    return squared(layout, mask_gradients(model, layout, batches, loss))


def squared(layout: ModelLayout, gradients: Mapping[Branch, Tensor]) -> Importance:
    """The diagonal Fisher of gradients that `mask_gradients` gave."""
    return _by_layer(layout, lambda branch: gradients[branch].square().sum(0))


def mask_gradients(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss) -> dict[Branch, Tensor]:
    """d loss / d mask of every sample and unit at mask 1: (samples, units) a branch, float64 on the CPU."""
    branches = [branch for layer in layout.layers for branch in layer.branches]
    found: dict[Branch, list[Tensor]] = {branch: [] for branch in branches}
    weight = next(model.parameters()).detach()
    with inference(model), torch.enable_grad():
        for index, batch in enumerate(batches):
            masks = {b: weight.new_ones(rows_of(batch), 1, b.units, requires_grad=True) for b in branches}
            with masked(model, masks):
                total = loss(model(**batch), index).sum()
            for branch, gradient in zip(branches, torch.autograd.grad(total, list(masks.values())), strict=True):
                found[branch].append(gradient.double().squeeze(1).cpu())
    return {branch: torch.cat(parts) for branch, parts in found.items()}


def torch_pruning_taylor(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss) -> Importance:
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
    sample = {name: value[:1] for name, value in batches[0].items()}
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(work, sample, output_transform=lambda output: output[0], verbose=False)
        for index, batch in enumerate(batches):
            loss(work(**batch), index).sum().backward()  # type: ignore[no-untyped-call]
    taylor = torch_pruning.importance.GroupTaylorImportance()

    def scores(branch: Branch) -> Tensor:
        root = work.get_submodule(branch.output)
        channels = list(range(branch.width))
        group = graph.get_pruning_group(root, torch_pruning.prune_linear_in_channels, channels)
        _check_group(work, branch, [dependency.target.module for dependency, _ in group])
        importance: Tensor = taylor(group)  # (units * width,)
        return importance.double().cpu().view(branch.units, -1).mean(1)

    return _by_layer(layout, scores)


def _check_group(model: nn.Module, branch: Branch, members: Sequence[object]) -> None:
    expected = {model.get_submodule(path) for path in (*branch.inputs, branch.output)}
    found = {member for member in members if isinstance(member, (nn.Linear, nn.LayerNorm))}
    if found != expected:
        raise BadInput(
            f"Torch-Pruning's group of {branch.output} has {len(found)} layers with weights where the layout has "
            f"{len(expected)}, or others: its scores are of other units. Leave this rival out for this model."
        )


def _by_layer(layout: ModelLayout, scores: Callable[[Branch], Tensor]) -> Importance:
    pairs = [(scores(layer.attention), scores(layer.ffn)) for layer in layout.layers]
    return tuple(heads for heads, _ in pairs), tuple(neurons for _, neurons in pairs)


def _weight(model: nn.Module, path: str) -> Tensor:
    """(outputs, inputs)."""
    return projection_at(model, path).weight.detach().double().cpu()


RIVALS: dict[str, Rival] = {
    "magnitude": magnitude,
    "random": random,
    "fisher": fisher,
    "torch_pruning_taylor": torch_pruning_taylor,
}
