"""Read config.json as data: what needs code is refused, switches of the runtime are put back to their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from optin_deploy.errors import BadInput
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.inputs import longest_text
from optin_deploy.feeds.pooling import POOLING, POOLINGS
from optin_deploy.feeds.sentence_modules import embeds, read_sentence_modules
from optin_deploy.files.storage import read_json
from optin_deploy.files.wall import blamed, shown

CONFIG_HINT = "Correct config.json, or take the one that was saved with these weights."
SWITCHES: dict[str, Any] = {
    **{"output_attentions": False, "output_hidden_states": False, "return_dict": True, "torchscript": False},
    **{"gradient_checkpointing": False, "chunk_size_feed_forward": 0},
    **{"attn_implementation": None, "experts_implementation": None, "use_kernels": False, "kernel_config": None},
    **{"fusion_config": None, "distributed_config": None, "transformers_weights": None},
}
"""How a model runs, not what it is -> what we run it with. transformers takes them from any config.json."""
LARGEST = 2**31 - 1
"""Largest integer in a config; no size, id or count is larger."""
MOST_LABELS = 2**20
"""transformers writes a name for each before anybody can compare them with the weights."""


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a config.json that describe the model, checked as far as they need no class.

    Raises: BadInput: not JSON, code of its own, quantised, numbers that cannot be.
    """
    data = read_json(path, "Give the folder that save_pretrained wrote.")
    if data.get("auto_map"):
        raise BadInput(
            f"{path}: auto_map = {shown(data['auto_map'])}: this model needs code of its own, which is not run. "
            "Give a model of transformers' own classes."
        )
    if data.get("quantization_config") is not None:
        method = data["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise BadInput(
            f"{path}: quantization_config = {shown(method)}: quantised weights cannot be cut. Give the float "
            "checkpoint that they were made from; the engine's own precision is --precision."
        )
    if data.get("per_layer_config"):
        raise BadInput(
            f"{path}: per_layer_config = {shown(data['per_layer_config'])}: layers of unequal configs are not possible."
        )
    names = data.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadInput(f"{path}: architectures = {shown(names)}: a list of class names is possible. {CONFIG_HINT}")
    return _neutral(data)


def _check_numbers(path: Path, data: Mapping[str, Any]) -> None:
    values = list(data.items())
    while values:
        key, value = values.pop()
        if isinstance(value, dict | list):
            values += [(key, each) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{path}: {key} = {value}: only finite numbers are possible. {CONFIG_HINT}")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise BadInput(f"{path}: {key} = {shown(value)}: at most {LARGEST} is possible. {CONFIG_HINT}")
    labels = data.get("num_labels")
    if labels is not None and (type(labels) is not int or not 0 <= labels <= MOST_LABELS):
        raise BadInput(f"{path}: num_labels = {shown(labels)}: 0 to {MOST_LABELS} are possible. {CONFIG_HINT}")


def _neutral(data: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out private entries, and set the switches of the runtime to their defaults, also in nested configs."""
    found = {key: SWITCHES.get(key, value) for key, value in data.items() if not key.startswith("_")}
    for key in ("dtype", "torch_dtype"):
        if key in found and not _is_dtype(found[key]):
            del found[key]
    return {
        key: _neutral(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in found.items()
    }


def _is_dtype(name: object) -> bool:
    import torch

    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def make_config(path: Path, data: Mapping[str, Any]) -> Any:
    """The transformers config of these entries.

    Raises: BadInput: names the entry that transformers does not take.
    """
    kind = _config_class(path, data)
    declared = {*(field.name for field in fields(kind)), *kind.attribute_map, *SWITCHES}
    known = {key for key in data if key in declared or isinstance(getattr(kind, key, None), property)}
    _check_numbers(path, {key: value for key, value in data.items() if key in known})
    # An entry that is no field would take the place of a method or a table of the class.
    taken = {key: value for key, value in data.items() if key in known or not hasattr(kind, key)}
    return blamed(path, taken, lambda entries: kind.from_dict(entries), CONFIG_HINT)


def _config_class(path: Path, data: Mapping[str, Any]) -> Any:
    model_type = data.get("model_type")
    if model_type is None:  # before 2020 they had none
        names = data.get("architectures") or [""]
        kind = getattr(getattr(transformers, names[0], None), "config_class", None) if names[0].isidentifier() else None
        if kind is None:
            raise BadInput(f"{path}: model_type is missing. {CONFIG_HINT}")
        return kind
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise BadInput(
            f"{path}: model_type = {shown(model_type)}: transformers {transformers.__version__} has no such model. "
            f"{CONFIG_HINT}"
        )
    return transformers.CONFIG_MAPPING[model_type]


def longest_in(folder: Path) -> int | None:
    """Tokens that the table of positions of the model in a folder holds; None: it has none, or there is no model.

    Raises: BadInput: its config.json is damaged.
    """
    path = folder / "config.json"
    return longest_text(make_config(path, read_config(path))) if path.is_file() else None


def head_in(folder: Path) -> EmbeddingHead | None:
    """What makes embeddings by the files of a model's folder; None: there is no config.json.

    Raises: BadInput: they are damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    data = read_config(path)
    modules = read_sentence_modules(folder, make_config(path, data).hidden_size) if embeds(folder) else None
    return EmbeddingHead(str(data.get(POOLING, POOLINGS[0]))) if modules is None else modules.head
