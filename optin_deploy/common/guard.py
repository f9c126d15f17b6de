"""What holds while a model is worked on: one thread at a time, ordinary tensors, and a model that can be worked on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from optin_deploy.errors import BadInput

_LOCKS: Any = WeakIdKeyDictionary()
_REGISTRY = threading.Lock()
WRAPPED = ("_orig_mod", "module")
"""Attributes in which torch.compile, DataParallel and similar wrappers keep the model."""
SWITCHES = {
    "use_cache": False,
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "_output_attentions": False,  # where transformers keeps it; its own property refuses some values
}
"""Entries of a config that change what a forward returns, and what they are while we work."""


@contextmanager
def working(model: nn.Module) -> Iterator[None]:
    """Check the model and keep other threads from it; inference mode, autocast and device around it end here.

    Raises: BadInput: the model has no weights to work with.
    """
    check_module(model)
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", next(model.parameters()).device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread works on this model: hooks, masks and modes of two would be mixed.

    A model is known by its first parameter, which it shares with its own base model, and by its config, which models
    may share too. A thread that has it may take it again.
    """
    locks: dict[int, Any] = {}
    with _REGISTRY:
        for key in (next(model.parameters(), None), getattr(model, "config", None)):
            with suppress(TypeError):  # None, and what stands in for a config, cannot be held weakly
                locks[id(key)] = _LOCKS.setdefault(key, threading.RLock())
    with ExitStack() as stack:
        for lock in sorted(locks.values(), key=id):  # in one order, so that no two threads wait for each other
            stack.enter_context(lock)
        yield


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


def check_module(model: Any) -> None:
    """Refuse what is no module with weights that can be worked on.

    Raises: BadInput: no module, a wrapper around a transformers model, or weights without values.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"the model is a {type(model).__name__}: give a loaded transformers model, such as "
            "AutoModel.from_pretrained(folder) makes."
        )
    inner = next((name for name in WRAPPED if hasattr(getattr(model, name, None), "config")), None)
    if inner is not None:
        raise BadInput(f"the model is a {type(model).__name__} around another one: give that one, its .{inner}.")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(isinstance(tensor, nn.Parameter) for _, tensor in tensors):
        raise BadInput(f"{type(model).__name__} has no parameters: there is nothing to prune.")
    for name, tensor in tensors:
        if tensor.is_meta:
            raise BadInput(f"{name} lies on the meta device: it has no values. Load the weights first.")
        if tensor.is_inference():
            raise BadInput(
                f"{name} was made under torch.inference_mode, so that no gradient passes through it. Load the model "
                "outside of that block."
            )
