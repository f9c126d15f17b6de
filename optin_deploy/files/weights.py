"""The files of a model folder: where they are, and what the headers of the weights say, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.files.hub import revision_of, snapshot
from optin_deploy.files.storage import read_json
from optin_deploy.files.wall import reason, shown, wall

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS = ("*.json", "*.txt", "*.model")
"""Config, tokenizer and image processor: everything but the weights."""
SHARDS = (WEIGHTS, "model-*.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024
"""A pointer of Git LFS is three lines; anything larger is a real file."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
SAVE_HINT = "Give the folder that save_pretrained wrote."
WHOLE_HINT = "Copy the file again, whole, or save the model anew with save_pretrained."


@dataclass(frozen=True)
class HeaderTensor:
    """A tensor in a weights file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of it, such as F32."""

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


def model_folder(name: str) -> Path:
    """The folder of a model: a local one, or the snapshot of a hub id with all but its weights.

    Raises: BadInput: absent, without config.json, files that Git LFS left out.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or revision_of(name)[0].count("/") > 1:
            raise BadInput(f"model folder {name} does not exist. Give a folder with config.json, or a hub id.")
        folder = snapshot(name, SETTINGS)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{name} has no config.json. {_inside(folder) or SAVE_HINT}")
    for pattern in SETTINGS:
        for path in sorted(folder.glob(pattern)):
            refuse_pointer(path)
    return folder


def _inside(folder: Path) -> str | None:
    """Old sentence-transformers folders hold the model in a folder of its own, 0_Transformer."""
    found = sorted(path.parent for path in folder.glob("*/config.json") if (path.parent / WEIGHTS).is_file())
    return f"The model lies in {found[0]}: give that folder." if len(found) == 1 else None


def refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS left out of a clone.

    Raises: BadInput.
    """
    if not path.is_file() or path.stat().st_size > POINTER_BYTES:
        return
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except OSError as err:
        raise BadInput(f"{path} cannot be read: {reason(err)}. {WHOLE_HINT}") from err
    if begins == POINTER:
        raise BadInput(
            f"{path} is a pointer of Git LFS: the file itself was not downloaded. Run `git lfs pull` in its folder."
        )


def stored_tensors(name: str, folder: Path) -> dict[str, HeaderTensor]:
    """All tensors of a model folder by name, from the headers alone; weights of a hub id are downloaded first.

    Raises: BadInput: no safetensors, truncated, quantised, or an index that does not fit its files.
    """
    if not Path(name).exists():
        folder = snapshot(name, SHARDS)
    if (folder / WEIGHTS).is_file():
        found = read_header(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        found = _sharded(folder)
    else:
        raise BadInput(f"{name} has no {WEIGHTS}{_instead(folder)}. Save with save_pretrained.")
    for key, tensor in found.items():
        if key.rpartition(".")[2] in ("weight", "bias") and tensor.dtype not in FLOATS and len(tensor.shape) < 3:
            raise BadInput(
                f"{tensor.file}: {key} holds {tensor.dtype} values, so these weights are quantised. "
                "Give the checkpoint in float32, float16 or bfloat16; the engine's precision is --precision."
            )
    return found


def _instead(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return " but an adapter; merge it into its base model (merge_and_unload of peft) first"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f" or {INDEX} ({', '.join(others[:3])} is another name)"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    return f" weights ({pickles[0]} is a pickle, which is not read)" if pickles else ""


def read_header(path: Path) -> dict[str, HeaderTensor]:
    """Name, shape and dtype of each tensor of a safetensors file.

    Raises: BadInput: a pointer of Git LFS, truncated, or not safetensors.
    """
    from safetensors import safe_open

    refuse_pointer(path)
    with wall(f"{path} is truncated or not a safetensors file", WHOLE_HINT), safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        return {key: HeaderTensor(path, tuple(each.get_shape()), str(each.get_dtype())) for key, each in slices.items()}


def _sharded(folder: Path) -> dict[str, HeaderTensor]:
    path = folder / INDEX
    refuse_pointer(path)
    weight_map = read_json(path, WHOLE_HINT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: weight_map is {shown(weight_map)}, not an object of file names. {WHOLE_HINT}")
    for key, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\\0")
        if not plain:
            raise BadInput(f"{path}: {key} lies in {shown(shard)}, which is no safetensors file of this folder.")
        if not (folder / shard).is_file():
            raise BadInput(f"{path}: {key} lies in {shown(shard)}, which is missing. {WHOLE_HINT}")
    found: dict[str, HeaderTensor] = {}
    for shard in sorted(set(weight_map.values())):
        header = read_header(folder / shard)
        twice = sorted(header.keys() & found.keys())
        if twice:
            raise BadInput(f"{folder / shard}: {twice[0]} is also in {found[twice[0]].file.name}. {WHOLE_HINT}")
        found |= header
    absent = sorted(key for key, shard in weight_map.items() if key not in found or found[key].file.name != shard)
    if absent:
        raise BadInput(f"{path}: {absent[0]} is not in {shown(weight_map[absent[0]])}. {WHOLE_HINT}")
    return found


def read_weights(tensors: Mapping[str, HeaderTensor]) -> dict[str, Any]:
    """The tensors by name, mapped from their files.

    Raises: BadInput: a file that has changed meanwhile.
    """
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted({tensor.file for tensor in tensors.values()}):
        with wall(f"{path} cannot be read", WHOLE_HINT):
            found |= load_file(path)
    return found
