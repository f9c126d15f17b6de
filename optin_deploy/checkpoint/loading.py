"""Load a dense model from the user: safetensors only, no remote code, with its tokenizer or image processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from optin_deploy.checkpoint.config import CONFIG_HINT, make_config, read_config
from optin_deploy.checkpoint.fit import check_mismatched, check_missing, check_unexpected, sketch, tell_left_out
from optin_deploy.checkpoint.positions import scale_positions
from optin_deploy.checkpoint.smaller import MANIFEST
from optin_deploy.checkpoint.tasks import PROBLEMS, Task, infer_task, task_of, tasks
from optin_deploy.common.guard import inference
from optin_deploy.errors import BadInput
from optin_deploy.feeds.inputs import example_inputs, longest_text, takes_images, takes_text
from optin_deploy.feeds.preprocessor import load_beside
from optin_deploy.feeds.sentence_modules import SentenceModules, embeds
from optin_deploy.files.wall import blamed, shown, wall
from optin_deploy.files.weights import INDEX, WEIGHTS, HeaderTensor, model_folder, read_weights, stored_tensors

TRIED_TOKENS = 8
"""Length of the text that a loaded model is tried with."""
TRIED_VALUES = 10**8
"""Models of fewer parameters that do not run are loaded once more for each entry of the config: which one is wrong?"""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A dense model with what prepares its inputs."""

    model: nn.Module
    task: Task
    preprocessor: Any
    """Tokenizer for text, image processor for images; None: it takes sound, whose feature extractor
    is loaded where recordings come."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What travels along unchanged with a pruned model, by path in the folder."""
    sentence: SentenceModules | None = None
    """What its folder of sentence-transformers says."""

    @property
    def is_text(self) -> bool:
        """Whether it takes input_ids."""
        return takes_text(self.model)

    @property
    def is_image(self) -> bool:
        """Whether it takes pixel_values."""
        return takes_images(self.model)


def load_dense(name: str, task: str | None = None) -> LoadedModel:
    """Load model and preprocessor from a folder or the hub, in float32 and evaluation mode.

    Args: task: its name, see `checkpoint.tasks`; None: inferred from `config.architectures`, where a head for masked
        words is left over from training beside a modules.json of sentence-transformers.
    Raises: BadInput: absent folder, missing weights or tokenizer files, weights that do not fit the config or the task.
    """
    model, found = load_model(name, task)
    return LoadedModel(model, found, *load_beside(name, model))


def load_model(name: str, task: str | None = None) -> tuple[Any, Task]:
    """The model alone, and its task.

    Nothing is built before config.json and the headers of the weights agree on the sizes, and whatever goes wrong with
    the files is bad input.
    Raises: BadInput: as `load_dense`.
    """
    with wall(f"model {shown(name)} cannot be loaded", CONFIG_HINT):
        folder = model_folder(name)
        _refuse_pruned(folder)
        source = folder / "config.json"
        data = read_config(source)
        config = make_config(source, data)
        row = infer_task(config) if task is None else task_of(task)
        if task is None and row.name == "fill-mask" and embeds(folder):
            row = task_of("feature-extraction")
        _check_config(source, config, row)
        stored = stored_tensors(name, folder)
        model, left_out = _load(source, data, row, stored)
        tell_left_out(source, model, left_out)
        drop_pooler(model, row)
        scale_positions(model)
        _try_one(source, data, model, lambda entries: _load(source, entries, row, stored)[0])
        model.config.name_or_path = name
    return model, row


def _refuse_pruned(folder: Path) -> None:
    """Refuse what optin-deploy made itself: its weights do not fit their config.

    Raises: BadInput.
    """
    home = folder if any((folder / name).is_file() for name in (WEIGHTS, INDEX)) else folder / "model"
    if (home / MANIFEST).is_file():
        raise BadInput(
            f"{folder} holds a model that optin-deploy has pruned already. Give the dense model that it was made from; "
            "its output folder has the scores for other budgets (`optin plan`)."
        )


def _load(
    source: Path, data: Mapping[str, Any], task: Task, stored: Mapping[str, HeaderTensor]
) -> tuple[Any, tuple[str, ...]]:
    """The model with its weights, and what is left out; a config and weights that do not agree are refused."""
    auto: Any = getattr(transformers, task.auto_class)

    def build(config: Any) -> Any:
        try:
            return auto.from_config(config)
        except ValueError as err:
            if "Unrecognized configuration class" not in str(err):
                raise
            raise BadInput(f"{source}: transformers has no {config.model_type} model for task {task.name!r}.") from err

    sketched = sketch(source, data, stored.values(), build, ratio=2)
    model, info = type(sketched).from_pretrained(
        None,
        config=sketched.config,
        state_dict=read_weights(stored),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    check_missing(source, model, info["missing_keys"], task.name, tasks())
    check_mismatched(source, model.config, info["mismatched_keys"])
    return model.eval(), check_unexpected(source, model, info["unexpected_keys"])


def _check_config(source: Path, config: Any, task: Task) -> None:
    """Refuse what no task gives the model, and a classifier whose classes are not said.

    Raises: BadInput.
    """
    for name in ("add_cross_attention", "is_encoder_decoder"):
        if getattr(config, name, False) and not task.of_encoder:
            raise BadInput(
                f"{source}: {name} = true: this model attends to a second input, which no task gives it. "
                "Give an encoder, or a decoder alone."
            )
    if not task.classifies:
        return
    labels = config.id2label or {}
    if not labels or set(labels) != set(range(len(labels))):
        raise BadInput(
            f"{source}: id2label has the keys {shown(sorted(labels))}; a classifier needs 0 to {len(labels) - 1}, "
            f"a name for each class. {CONFIG_HINT}"
        )
    if config.problem_type not in PROBLEMS:
        possible = ", ".join(map(repr, PROBLEMS))
        raise BadInput(f"{source}: problem_type = {shown(config.problem_type)}; possible are {possible}. {CONFIG_HINT}")


def _try_one(source: Path, data: Mapping[str, Any], model: Any, load: Callable[[dict[str, Any]], Any]) -> None:
    """Run the model once: some entries of a config are read in the forward only.

    Args: load: loads the same weights with other entries, to find the one that is wrong.
    Raises: BadInput: what was loaded does not run.
    """
    needed = {"input_ids": "vocab_size", "pixel_values": "image_size"}.get(getattr(model, "main_input_name", ""))
    if needed is None or not hasattr(model.config, needed):
        return  # no family that takes our inputs
    small = sum(map(torch.numel, model.parameters())) < TRIED_VALUES

    def run(entries: dict[str, Any]) -> None:
        if entries != data and not small:
            raise BadInput("to load a large model once for each entry takes too long")
        tried = model if entries == data else load(entries)
        with inference(tried), torch.no_grad():
            longest = longest_text(tried.config) if tried.main_input_name == "input_ids" else None
            tried(**example_inputs(tried, batch=1, seq_len=min(TRIED_TOKENS, longest or TRIED_TOKENS)))

    blamed(source, data, run, CONFIG_HINT)


def drop_pooler(model: nn.Module, task: Task) -> None:
    """Remove a pooler that embeddings do not use; it would cost time in every engine."""
    if task.embeds and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # type: ignore[assignment]  # transformers' own way to have none
