"""Prove on two samples, before the long work, that a layout says where a model's units are and how its blocks run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput, ParityFailure
from optin_deploy.layout import LayerSpec, ModelLayout
from optin_deploy.masking import Batch, branch_masks, check_finite, inference, masked, recorded, run_blocks
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.rewrite.verify import main_output, masked_vs_rewritten, relative_error

ROWS = 2
"""Samples."""
RESUMED = 1e-3
"""Relative difference that a run from the middle may have: the same operations, so none but on some devices."""
ROW_HINT = "The architecture row does not fit this model; optin_deploy/arch/spec.py says what each field is."


def prove(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch]) -> None:
    """Run the model a few times, and two random cuts of it, masked and rewritten.

    Args: batches: checked already; two samples of the longest are taken.
    Raises: BadInput: names the architecture row, the layer, and what does not fit. NonFiniteActivation.
    """
    longest = max(batches, key=lambda batch: max(value[0].numel() for value in batch.values()))
    few = {name: value[:ROWS] for name, value in longest.items()}
    with inference(model), torch.no_grad():
        _check_runs(model, layout, few)
        emptied = _plan(layout, share=0)
        dense = main_output(model(**few))
        with masked(model, branch_masks(layout, emptied.masks(layout))):
            if torch.equal(main_output(model(**few)), dense):
                raise BadInput(
                    f"the outputs of this {type(model).__name__} stay the same when all its heads and neurons are "
                    "removed, so that no calibration can tell which to keep. Are the trained weights loaded?"
                )
        for plan in (_plan(layout, share=0.5), emptied):
            _check_cut(model, layout, plan, few)


def _check_runs(model: nn.Module, layout: ModelLayout, few: Batch) -> None:
    """Every module of the layout runs once a forward; inputs of a branch read one tensor; blocks can be resumed."""
    counts: Counter[str] = Counter()
    paths = list(dict.fromkeys(path for layer in layout.layers for path in _paths(layer)))
    inputs = [path for layer in layout.layers for branch in layer.branches for path in branch.inputs]
    last = layout.layers[-1].path
    with ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_pre_hook(_counter(counts, path))
            stack.callback(hook.remove)
        seen = stack.enter_context(recorded(model, inputs=[*inputs, last]))
        whole = main_output(model(**few))
    for path in paths:
        if counts[path] != 1:
            raise BadInput(
                f"row {layout.arch!r}: {path} runs {counts[path]} times in a forward; only what runs once can be "
                f"scored and cut. {ROW_HINT}"
            )
    check_finite(model, few, (whole, *seen.inputs.values()))
    for layer in layout.layers:
        for branch in layer.branches:
            first = seen.inputs[branch.inputs[0]]
            for path in branch.inputs[1:]:
                if not _same(first, seen.inputs[path]):
                    raise BadInput(
                        f"row {layout.arch!r}: {path} reads another tensor than {branch.inputs[0]}. {ROW_HINT}"
                    )
    start = len(layout.layers) - 1
    resumed = main_output(run_blocks(model, layout, few, start=start, hidden=seen.inputs[last] if start else None))
    if relative_error(whole.cpu().double().numpy(), resumed.cpu().double().numpy()) > RESUMED:
        raise BadInput(
            f"row {layout.arch!r}: {last} gives something else when the blocks before it are skipped: it needs more of "
            f"them than their output. {ROW_HINT}"
        )


def _paths(layer: LayerSpec) -> list[str]:
    """Of the modules that must run once a forward."""
    branches = [(*branch.inputs, branch.output, branch.residual) for branch in layer.branches]
    return [layer.path, layer.core, *(path for paths in branches for path in paths)]


def _counter(counts: Counter[str], path: str) -> Any:
    def hook(module: nn.Module, args: object) -> None:
        counts[path] += 1

    return hook


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _check_cut(model: nn.Module, layout: ModelLayout, plan: PruningPlan, few: Batch) -> None:
    try:
        _error(model, layout, plan, few)
    except ParityFailure as failure:
        for index, layer in enumerate(layout.layers):
            try:
                _error(model, layout, _only(layout, plan, index), few)
            except ParityFailure as err:
                raise BadInput(f"row {layout.arch!r}: {layer.path} cannot be cut: {err} {ROW_HINT}") from err
        raise BadInput(f"row {layout.arch!r}: the model cannot be cut: {failure} {ROW_HINT}") from failure


def _error(model: nn.Module, layout: ModelLayout, plan: PruningPlan, few: Batch) -> float:
    smaller = rewrite_torch(model, layout, plan)
    try:
        return masked_vs_rewritten(model, smaller, layout, plan, few)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as err:
        if isinstance(err, ParityFailure):
            raise
        said = " ".join(str(err).split())[:300]
        raise ParityFailure(f"the cut model does not run ({type(err).__name__}: {said}).") from err


def _plan(layout: ModelLayout, *, share: float) -> PruningPlan:
    """A random part of every branch's units; at least one if there shall be any."""
    generator = torch.Generator().manual_seed(0)

    def some(units: int) -> tuple[int, ...]:
        count = max(1, int(share * units)) if share else 0
        return tuple(sorted(torch.randperm(units, generator=generator)[:count].tolist()))

    heads, neurons = zip(*[(some(layer.heads), some(layer.neurons)) for layer in layout.layers], strict=True)
    # The cost does not matter here.
    return PruningPlan(heads, neurons, layout.hash, macs_dense=2, macs_pruned=1, macs_fixed=0, tokens=1)


def _only(layout: ModelLayout, plan: PruningPlan, index: int) -> PruningPlan:
    """The same cut in one layer alone."""
    everything = Masks.all_kept(layout)
    heads, neurons = (
        tuple(some if i == index else tuple(range(len(all_of[i]))) for i, some in enumerate(kept))
        for kept, all_of in ((plan.heads, everything.heads), (plan.neurons, everything.neurons))
    )
    return PruningPlan(heads, neurons, layout.hash, macs_dense=2, macs_pruned=1, macs_fixed=0, tokens=1)
