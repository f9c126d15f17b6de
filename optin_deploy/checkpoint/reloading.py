"""Load a cut transformers model: its class without values, then the stored tensors and sizes, each of them checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from optin_deploy.checkpoint.config import CONFIG_HINT, read_config
from optin_deploy.checkpoint.fit import sketch
from optin_deploy.checkpoint.positions import scale_positions
from optin_deploy.checkpoint.smaller import CONFIG, MANIFEST, WEIGHTS, config_hash, drop_pooler, read_saved, remedy
from optin_deploy.cutting.attributes import Sizes, numbers, write
from optin_deploy.cutting.proof import difference
from optin_deploy.cutting.torch import ROUNDING, copied, tensors
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import read_tensors, sha256_file
from optin_deploy.files.wall import reason, shown, wall
from optin_deploy.files.weights import read_header
from optin_deploy.network.graph import Network
from optin_deploy.network.read_torch import FAILURES, Traced, prepared
from optin_deploy.network.run import Program

DENSE_RATIO = 256
"""Values that the dense model may have for each one that is left: a bound for configs that cannot be."""


def load(folder: Path) -> Any:
    """Load what `smaller.save` wrote: a model of its own class, in evaluation mode, in the types that were stored.

    Raises: BadInput, PlanMismatch: files are missing, damaged, hostile, or do not belong together.
    """
    saved, _ = read_saved(folder)
    path, hint = folder / WEIGHTS, remedy(folder)
    stored = read_tensors(path, hint)
    if saved.weights_sha256 != sha256_file(path):
        raise PlanMismatch(f"{path} is not the file that was saved here. {hint}")
    if saved.config_sha256 != config_hash(folder / CONFIG, hint):
        raise PlanMismatch(f"{folder / CONFIG} is not the config that was saved here. {hint}")
    model = _empty(folder, saved.model_class)
    drop_pooler(model, stored)
    _fill(model, stored, path, hint)
    write(model, _checked(model, saved.sizes, folder / MANIFEST, hint))
    scale_positions(model)
    return model.eval()


def differs(folder: Path, network: Network, probes: Sequence[Mapping[str, Tensor]]) -> str:
    """Return why the model in a folder is not the one of this graph; empty if both compute the same.

    Args: probes: inputs by name.
    """
    try:
        model = copied(load(folder), dtype=torch.float32)
        program = Program(network, dtype=torch.float32)
        with prepared(model), torch.no_grad():
            for feeds in probes:
                values = [value.float() if value.is_floating_point() else value for value in feeds.values()]
                found, expected = Traced(model, tuple(feeds))(*values), tuple(program(feeds).outputs.values())
                if len(found) != len(expected):
                    return f"it has {len(found)} outputs, its graph has {len(expected)}"
                worst = max(difference(*pair) for pair in zip(found, expected, strict=True))
                if not worst <= ROUNDING:
                    return f"what was saved differs from its graph by {worst:.1e} of the largest output"
    except BadInput as err:
        return str(err)
    except FAILURES as err:
        return f"what was saved does not run: {reason(err)}"
    return ""


def _empty(folder: Path, name: str) -> Any:
    """A model of the stored class without values; the class must be one of transformers' own.

    Raises: BadInput.
    """
    found = getattr(transformers, name, None) if re.fullmatch(r"[A-Za-z0-9]+", name) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class):
        raise BadInput(
            f"{folder / MANIFEST} names class {shown(name)}, which transformers {transformers.__version__} lacks. "
            f"{remedy(folder)}"
        )
    path = folder / CONFIG
    try:
        with wall(f"{path} cannot be used", CONFIG_HINT):
            stored = read_header(folder / WEIGHTS)
            return sketch(path, read_config(path), stored.values(), found, ratio=DENSE_RATIO)
    except BadInput as err:
        raise BadInput(f"{err} {remedy(folder)}") from err


def _fill(model: nn.Module, stored: Mapping[str, Tensor], path: Path, hint: str) -> None:
    """Give a model its tensors; what the class ties is one again where the stored values are equal.

    Raises: PlanMismatch: names a tensor that is missing, that the class does not have, or that is larger than it.
    """
    known = tensors(model)
    for what, names in (("no", known.keys() - stored.keys()), ("a strange", stored.keys() - known.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PlanMismatch(
                f"{path} does not fit {type(model).__name__}: it has {what} {shown(min(names))}{more}. {hint}"
            )
    made: dict[int, Tensor] = {}
    for name, dense in known.items():
        value = stored[name]
        fits = value.dim() == dense.dim() and all(n <= most for n, most in zip(value.shape, dense.shape, strict=True))
        if not fits or value.is_floating_point() != dense.is_floating_point():
            raise PlanMismatch(
                f"{path} does not fit {type(model).__name__}: {name} is {tuple(value.shape)} of {value.dtype}; the "
                f"dense one is {tuple(dense.shape)} of {dense.dtype}. {hint}"
            )
        tied = made.get(id(dense))
        if tied is None or not torch.equal(tied, value):
            copy = value.clone()  # the tensors of a file are not aligned
            tied = made[id(dense)] = nn.Parameter(copy) if isinstance(dense, nn.Parameter) else copy
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, tied)


def _checked(model: nn.Module, sizes: Sizes, path: Path, hint: str) -> Sizes:
    """Stored sizes as the modules take them: only whole numbers that are there already, and none larger than it is.

    Raises: PlanMismatch: names the module and the attribute.
    """
    modules, found = dict(model.named_modules()), {}
    for (owner, name), size in sizes.items():
        dense = dict(numbers(modules[owner])).get(name) if owner in modules else None
        if dense is None:
            raise PlanMismatch(f"{path}: {shown(owner)} of {type(model).__name__} has no size {shown(name)}. {hint}")
        old, new = ((each,) if isinstance(each, int) else each for each in (dense, size))
        alike = isinstance(dense, int) == isinstance(size, int) and len(old) == len(new)
        if not alike or not all(0 <= less <= most for less, most in zip(new, old, strict=True)):
            raise PlanMismatch(
                f"{path}: {owner}.{name} = {shown(size)}: the dense model has {shown(dense)}, a cut one less. {hint}"
            )
        found[owner, name] = size if isinstance(dense, int) else type(dense)(size)
    return found
