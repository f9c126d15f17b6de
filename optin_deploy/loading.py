"""Load a dense model from the user: safetensors only, no remote code, with its tokenizer or image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.preprocessor import load_beside

AUTO_CLASSES = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""Task -> transformers auto class. A new task is a line here and an output kind in scoring/losses.py."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A dense model with what prepares its inputs."""

    model: nn.Module
    task: str
    preprocessor: Any
    """Tokenizer for text, image processor for images."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What travels along unchanged with a pruned model, by path in the folder."""

    @property
    def is_text(self) -> bool:
        """True: takes input_ids; False: takes pixel_values."""
        return bool(self.model.main_input_name != "pixel_values")


def load_dense(name: str, task: str | None = None) -> LoadedModel:
    """Load model and preprocessor from a folder or the hub, in float32 and evaluation mode.

    Args: task: one of AUTO_CLASSES; inferred from `config.architectures` if None.
    Raises: BadInput: absent folder, missing weights or tokenizer files, weights that do not fit the task.
    """
    folder = Path(name)
    local = folder.exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise BadInput(f"model folder {name} does not exist. Give a folder with config.json, or a hub id.")
    if local and not (folder / "config.json").is_file():
        raise BadInput(f"{name} has no config.json. Give the folder that save_pretrained wrote.")
    if local and not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.glob("*.bin"))
        found = f" ({others[0]} is a pickle, which is not read)" if others else ""
        raise BadInput(f"{name} has no *.safetensors weights{found}. Save with save_pretrained.")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        task = check_task(task) if task else infer_task(config)
        auto: Any = getattr(transformers, AUTO_CLASSES[task])
        model, info = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        if isinstance(err, BadInput):
            raise
        raise BadInput(f"model {name} cannot be loaded: {_first_line(err)}") from err
    drop_pooler(model, task)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise BadInput(
            f"{name} has no weights for {', '.join(missing[:3])}, which task {task!r} needs. "
            f"Choose another --task ({', '.join(AUTO_CLASSES)}) or give the fine-tuned checkpoint."
        )
    return LoadedModel(model.eval(), task, *load_beside(name, model))


def check_task(task: str) -> str:
    """Refuse an unknown task.

    Raises: BadInput.
    """
    if task not in AUTO_CLASSES:
        raise BadInput(f"unknown --task {task!r}; possible: {', '.join(AUTO_CLASSES)}.")
    return task


def infer_task(config: Any) -> str:
    """Task from `config.architectures`.

    Raises: BadInput: a head that no task covers.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    endings = {
        "ForSequenceClassification": "text-classification",
        "ForImageClassification": "image-classification",
        "Model": "feature-extraction",
    }
    for ending, task in endings.items():
        if name.endswith(ending):
            return task
    raise BadInput(f"cannot infer the task from architecture {name!r}; give --task {' | '.join(AUTO_CLASSES)}.")


def drop_pooler(model: nn.Module, task: str) -> None:
    """Remove a pooler that feature extraction does not use; it would cost time in every engine."""
    if task == "feature-extraction" and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # type: ignore[assignment]  # transformers' own way to have none


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
