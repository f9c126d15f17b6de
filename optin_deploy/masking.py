"""Masks, recordings and partial runs by hooks: what is put on a model is taken off, also after an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import NonFiniteActivation
from optin_deploy.guard import alone
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.plan import Masks

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model, batch first."""


def rows_of(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(next(iter(batch.values())))


HIDDEN = "hidden_states"
"""What transformers calls the first argument of a block."""


@dataclass
class Recording:
    """First argument and output of the watched modules, by path, of the last forward."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward early; never leaves this module."""


SWITCHES = {
    "use_cache": False,
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "_output_attentions": False,  # where transformers keeps it; its own property refuses some values
}
"""Entries of a config that change what a forward returns, and what they are while we work."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, parameters without gradients, outputs by name, no cache of keys and values; all restored.

    Meanwhile other threads wait: see `guard.alone`.
    """
    with alone(model), ExitStack() as stack:
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            stack.callback(_switched, config, _switched(config, SWITCHES))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield


def _switched(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set those of these entries that the config has; returns what they were."""
    entries = getattr(config, "__dict__", {})
    before = {name: entries[name] for name in values if name in entries and entries[name] is not values[name]}
    entries.update({name: values[name] for name in before})
    return before


@contextmanager
def masked(model: nn.Module, masks: Mapping[Branch, Tensor]) -> Iterator[None]:
    """Multiply units by masks at the input of the output projections.

    Args: masks: per branch (batch or 1, 1, units); 1 keeps a unit, 0 removes it; may require gradients.
    """
    with ExitStack() as stack:
        for branch, mask in masks.items():
            hook = _multiplier(branch, mask)
            stack.callback(model.get_submodule(branch.output).register_forward_pre_hook(hook).remove)
        yield


def _multiplier(branch: Branch, mask: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        units, *rest = args
        wide = mask.to(units).repeat_interleave(branch.unit_width, dim=-1)  # (B or 1, 1, units * width)
        return (units * wide, *rest)

    return hook


def branch_masks(layout: ModelLayout, masks: Masks) -> dict[Branch, Tensor]:
    """Keep-masks in the form that `masked` takes: (1, 1, units) each."""
    found: dict[Branch, Tensor] = {}
    for layer, heads, neurons in zip(layout.layers, masks.heads, masks.neurons, strict=True):
        found[layer.attention] = torch.tensor(heads, dtype=torch.float32).view(1, 1, -1)
        found[layer.ffn] = torch.tensor(neurons, dtype=torch.float32).view(1, 1, -1)
    return found


@contextmanager
def recorded(model: nn.Module, *, inputs: Iterable[str] = (), outputs: Iterable[str] = ()) -> Iterator[Recording]:
    """Keep the first argument (`inputs`) and the output (`outputs`) of modules given by path."""
    recording = Recording()
    with ExitStack() as stack:
        for path in inputs:
            hook = _input_recorder(recording, path)
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for path in outputs:
            stack.callback(model.get_submodule(path).register_forward_hook(_output_recorder(recording, path)).remove)
        yield recording


def _input_recorder(recording: Recording, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.inputs[path] = args[0] if args else kwargs[HIDDEN]

    return hook


def _output_recorder(recording: Recording, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.outputs[path] = _tensor(output)

    return hook


def run_blocks(
    model: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    stop: str | None = None,
) -> Any:
    """Run the model from block `start` to its end, or only up to module `stop`.

    Blocks before `start` hand on `hidden` at once, so that only the embeddings are computed again: cheap, and
    every argument that the model prepares for its blocks (attention masks, positions) is right by construction.

    Args:
        start: first block that computes; 0 runs all.
        hidden: input of block `start`, (batch, tokens, hidden); needed if start > 0. Block 0 takes its own if None.
        stop: path of the module after which the forward ends.
    Returns: the model's output, or the output of module `stop`.
    """
    with ExitStack() as stack:
        for layer in layout.layers[:start]:
            stack.enter_context(_bypassed(model.get_submodule(layer.path), hidden))
        if hidden is not None and start == 0:
            hook = _replacer(hidden)
            first = model.get_submodule(layout.layers[0].path)
            stack.callback(first.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if stop is None:
            return model(**batch)
        recording = stack.enter_context(recorded(model, outputs=[stop]))
        stack.callback(model.get_submodule(stop).register_forward_hook(_stop).remove)
        with suppress(_Stop):
            model(**batch)
        return recording.outputs[stop]


@contextmanager
def _bypassed(block: nn.Module, hidden: Tensor | None) -> Iterator[None]:
    block.forward = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        del block.forward  # the class's own forward shows again


def _replacer(hidden: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, HIDDEN: hidden})

    return hook


def _stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise _Stop


def _tensor(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def check_finite(model: nn.Module, batch: Batch, values: Iterable[Tensor]) -> None:
    """Refuse values that hold NaN or infinity; `values` came from this model on this batch.

    Raises: NonFiniteActivation: names the first module that puts one out.
    """
    if all(bool(torch.isfinite(value).all()) for value in values):
        return
    leaves = [path for path, module in model.named_modules() if not list(module.children())]
    with recorded(model, outputs=leaves) as recording:
        model(**batch)
    # Outputs are kept in the order in which the modules ran.
    first = next(
        (path for path, value in recording.outputs.items() if not bool(torch.isfinite(value).all())), "a layer"
    )
    raise NonFiniteActivation(
        f"{first} put out NaN or infinity on the calibration data. Check the weights and the data; a model "
        "stored in half precision may overflow: load it in float32."
    )
