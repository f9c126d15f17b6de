"""Compare what a config describes with what the weights hold: sizes before anything is built, names after the load."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from optin_deploy.checkpoint.config import CONFIG_HINT, SWITCHES, make_config
from optin_deploy.errors import BadInput
from optin_deploy.files.wall import blamed, shown
from optin_deploy.files.weights import HeaderTensor

MODULES_PER_TENSOR, FREE_MODULES = 8, 2000
"""Modules and parameters that a class may build for each stored tensor, and besides: a bound, not a measure."""
FREE_VALUES = 2**24
"""Values (64 MiB) that a class may hold above twice what is stored: a pooler, a head, a mask."""
UNUSED = re.compile(r"(^|\.)(mask_token|attn\.masked_bias)$")
"""Weights inside of an encoder that only pretraining uses, or that were a constant of older classes (GPT-2)."""
FRAMEWORK = re.compile(r"^(TF|Flax)(?=[A-Z])")
"""Prefix of a class name in TensorFlow or Flax, which names the same model."""
COUNT = re.compile(r"(^|_)(layers?|depths?|blocks|stages)$")
"""Entries of a config that say how many blocks there are."""
BLOCK = re.compile(r"(^|\.)(\d+)\.")
"""The number of a block in the name of a weight."""


def sketch(
    path: Path,
    data: Mapping[str, Any],
    stored: Collection[HeaderTensor],
    make: Callable[[Any], nn.Module],
    *,
    ratio: int,
) -> Any:
    """The model of a config on the meta device: shapes without values, bounded by what the weights file holds.

    Args: data: the entries of a config. make: builds the model of a config. ratio: values for each stored one.
    Raises: BadInput: a config that describes no model, or one that cannot be the stored one.
    """
    _check_counts(path, make_config(path, data), len(stored))

    def build(entries: dict[str, Any]) -> nn.Module:
        with _bounded(path, MODULES_PER_TENSOR * len(stored) + FREE_MODULES), torch.device("meta"):
            return make(make_config(path, entries))

    model = blamed(path, data, build, CONFIG_HINT)
    held = ratio * sum(tensor.numel for tensor in stored) + FREE_VALUES
    if sum(map(torch.numel, (*model.parameters(), *model.buffers()))) > held:
        name, largest = max([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[1].numel())
        shape = tuple(largest.shape)
        by = _entries(model.config, (max(shape),))
        raise BadInput(
            f"{path} describes another model than the weights, which are far smaller: they have no weights for {name} "
            f"of {shape}{by}. {CONFIG_HINT}"
        )
    return model


def _check_counts(path: Path, config: Any, tensors: int) -> None:
    """Refuse more layers than tensors: classes make lists as long before they build anything.

    Raises: BadInput.
    """
    entries = config.to_dict()
    nested = [pair for each in entries.values() if isinstance(each, dict) for pair in each.items()]
    for name, value in (*entries.items(), *nested):
        counts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
        if COUNT.search(str(name)) and sum(counts) > tensors:
            raise BadInput(f"{path}: {name} = {shown(value)}, but the weights hold {tensors} tensors. {CONFIG_HINT}")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise BadInput(f"{path}: num_hidden_layers = {layers}: at least 1 is needed. {CONFIG_HINT}")


@contextmanager
def _bounded(path: Path, most: int) -> Iterator[None]:
    """Stop a class that builds without end."""
    built, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal built
        built += threading.get_ident() == thread
        if built > most:
            raise BadInput(f"{path} describes a model of more than {most} parts; the weights do not. {CONFIG_HINT}")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_mismatched(path: Path, config: Any, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Refuse weights of other shapes than the config describes.

    Raises: BadInput: names the first tensor, both shapes and the entries of the config that ask for it.
    """
    if not mismatched:
        return
    name, found, asked = min(mismatched, key=lambda each: str(each[0]))
    more = f" ({len(mismatched) - 1} more tensors differ)" if len(mismatched) > 1 else ""
    differing = [size for i, size in enumerate(asked) if list(found)[i : i + 1] != [size]]
    raise BadInput(
        f"{path}: the weights hold {name} as {tuple(found)}, but the config asks for {tuple(asked)}"
        f"{_entries(config, differing or asked)}{more}. {CONFIG_HINT}"
    )


def _entries(config: Any, sizes: Collection[int]) -> str:
    """The entries of a config that hold one of these sizes."""
    counts = ("_id", "layers", "heads", *SWITCHES)  # never the size of a weight
    entries = config.to_dict().items()
    found = [f"{k} = {v}" for k, v in entries if type(v) is int and v in sizes and not k.endswith(counts)]
    if getattr(config, "num_labels", None) in sizes:
        found.append(f"{config.num_labels} labels in id2label")
    return f" (by {' or '.join(found)})" if found else ""


def check_missing(path: Path, model: nn.Module, missing: Collection[str], task: str, tasks: Collection[str]) -> None:
    """Refuse a model some of whose weights are not stored; a pooler that feature extraction drops is no loss.

    Raises: BadInput: names the first of them.
    """
    absent = sorted(key for key in missing if not key.startswith("pooler."))
    if not absent:
        return
    said = f"{path.parent} has no weights for {', '.join(absent[:3])}"
    if any(BLOCK.search(key) for key in absent):
        config: Any = model.config
        layers = getattr(config, "num_hidden_layers", None)
        raise BadInput(
            f"{said}{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}, which {type(model).__name__} of "
            f"config.json has (num_hidden_layers = {layers}). {CONFIG_HINT}"
        )
    raise BadInput(
        f"{said}, which task {task!r} needs. Choose another --task ({', '.join(tasks)}) or give the fine-tuned "
        "checkpoint."
    )


def check_unexpected(path: Path, model: nn.Module, unexpected: Collection[str]) -> tuple[str, ...]:
    """Refuse weights of the body or the head of a model that its class does not know; they would be dropped.

    Returns: what lies beside them: heads of other tasks.
    Raises: BadInput: names the first of them.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    base: Any = getattr(model, prefix[:-1], model)
    children = (*base.named_children(), *model.named_children(), *base.named_parameters(recurse=False))
    parts = {name for name, _ in children}
    buffers = {name.removeprefix(prefix) for name, _ in model.named_buffers()}
    names = {key.removeprefix(prefix) for key in unexpected} - buffers
    lost = sorted(name for name in names if name.partition(".")[0] in parts and not UNUSED.search(name))
    if lost:
        raise BadInput(
            f"{path}: the weights hold {shown(lost[0])}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which "
            f"{type(model).__name__} of this config does not have{_why(model, lost[0])}; without them it would be "
            f"another model. {CONFIG_HINT}"
        )
    return tuple(sorted(name for name in names if not UNUSED.search(name)))


def _why(model: nn.Module, name: str) -> str:
    """The entries of the config by which a class may lack a weight."""
    config: Any = model.config
    layers = getattr(config, "num_hidden_layers", None)
    found = BLOCK.search(name)
    if found and isinstance(layers, int) and int(found[2]) >= layers:
        return f" (num_hidden_layers = {layers})"
    without = [key for key, value in config.to_dict().items() if key.endswith("bias") and value is False]
    return f" ({', '.join(f'{key} = false' for key in without)})" if without and name.endswith(".bias") else ""


def tell_left_out(path: Path, model: nn.Module, names: Collection[str]) -> None:
    """One line on what is stored but has no place in the model, and on a head that the architecture had."""
    config: Any = model.config
    architectures = getattr(config, "architectures", None) or []
    heads = sorted({name.partition(".")[0] for name in names})
    other = [name for name in architectures if FRAMEWORK.sub("", name) != type(model).__name__]
    if heads or other:
        instead = f", not as {', '.join(map(shown, other[:3]))}" if other else ""
        bare = "For" not in type(model).__name__  # a head without weights of its own is left out, too
        left = ", ".join(map(shown, heads[:5])) or ("its head" if bare else "")
        _tell(f"{path}: loaded as {type(model).__name__}{instead}" + (f"; left out: {left}." if left else "."))


@cache
def _tell(text: str) -> None:
    """Once a process: a job loads its model more than once."""
    logging.getLogger(__name__).warning(text)
