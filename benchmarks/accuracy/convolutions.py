"""Torch-Pruning's own pruner on convolutional networks, at a share of the MACs and at its best settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy.case import OUTPUT, Case
from benchmarks.accuracy.outputs import divergence
from optin_deploy.common.guard import inference
from optin_deploy.errors import MissingDependency
from optin_deploy.network.graph import Network
from optin_deploy.pruning.networks import find_in

STEPS = 8
"""Halvings of the interval of its pruning ratio."""
BatchNorm = nn.modules.batchnorm._BatchNorm


def torch_pruning(name: str, case: Case, flops: float) -> Network:
    """Cut by an importance: `l1`, norms of weights, or `taylor`, gradients of the labels' loss times weights.

    With one ratio for all layers and with one ranking of all, whichever is nearer to the dense outputs on the
    calibration rows. BatchNorm's statistics are estimated again on these rows, without which little is left.
    """
    dense = _outputs(case.model, case.batches)
    found = [within(name, case, flops, everywhere=everywhere) for everywhere in (False, True)]
    best = min(found, key=lambda model: divergence(dense, _outputs(model, case.batches)))
    return find_in(best, {name: value[:2] for name, value in case.batches[0].items()}).network


def within(name: str, case: Case, flops: float, *, everywhere: bool) -> nn.Module:
    """The least that is cut at which no more than this share of the MACs is left."""
    most, low, high = flops * macs(case.model, case.batches), 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        smaller = cut(name, case, middle, everywhere=everywhere)
        low, high = (low, middle) if macs(smaller, case.batches) <= most else (middle, high)
    smaller = cut(name, case, high, everywhere=everywhere)
    estimate_again(smaller, case.batches)
    return smaller


def cut(name: str, case: Case, ratio: float, *, everywhere: bool) -> nn.Module:
    """A copy without this part of its channels; all but the classes may go, and no layer loses all."""
    try:
        import torch_pruning
    except ImportError as err:
        raise MissingDependency("torch-pruning is not installed. Run: pip install 'optin-deploy[peers]'") from err
    importance: Any = torch_pruning.importance
    work: nn.Module = copy.deepcopy(case.model).eval().requires_grad_(True)
    with torch.enable_grad():
        if name == "taylor":
            gradients = case.shared("gradients of weights", lambda: weight_gradients(work, case))
            for path, parameter in work.named_parameters():
                parameter.grad = gradients[path].clone()
        last = [each for each in work.modules() if isinstance(each, nn.Linear)][-1]
        pruner = torch_pruning.pruner.BasePruner(
            work,
            {"pixel_values": case.batches[0]["pixel_values"][:1]},
            importance=importance.GroupTaylorImportance()
            if name == "taylor"
            else importance.GroupMagnitudeImportance(p=1),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=[last],
            output_transform=lambda outputs: outputs[OUTPUT],
        )
        pruner.step()
    return work.requires_grad_(False).eval()


def weight_gradients(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Gradients of the labels' loss, summed over the calibration rows, by path."""
    for index, batch in enumerate(case.batches):
        case.loss(model(**batch), index).sum().backward()  # type: ignore[no-untyped-call]
    found = {path: parameter.grad for path, parameter in model.named_parameters()}
    model.zero_grad()
    return {path: gradient for path, gradient in found.items() if gradient is not None}


def estimate_again(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Means and variances of BatchNorm layers, over these rows."""
    layers = [each for each in model.modules() if isinstance(each, BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    _outputs(model, batches)
    for layer in layers:
        layer.eval()


def macs(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Multiply-accumulates of an image, as PyTorch counts them."""
    with inference(model), FlopCounterMode(display=False) as counter:
        model(pixel_values=batches[0]["pixel_values"][:1])
    return float(counter.get_total_flops()) / 2


def _outputs(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch)[OUTPUT] for batch in batches])
