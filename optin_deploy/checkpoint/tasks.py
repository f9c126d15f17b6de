"""Tasks of transformers models: one row each, which says how a model is loaded, read and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from optin_deploy.common.plugins import with_added
from optin_deploy.errors import BadInput
from optin_deploy.files.wall import shown
from optin_deploy.quality.quality import Asked
from optin_deploy.scoring.settings import Kind

PROBLEMS: Mapping[str | None, Kind | None] = {
    None: None,
    "regression": "regression",
    "single_label_classification": "logits",
    "multi_label_classification": "multi-label",
}
"""What transformers calls the kinds of classifiers -> how their outputs are compared; None means by what makes them."""


@dataclass(frozen=True)
class Task:
    """What one kind of model is for."""

    name: str
    """Its name in transformers and on the Hub."""
    auto_class: str
    """Its auto class in transformers."""
    endings: tuple[str, ...] = ()
    """Endings of the architectures that are of this task; a task without any must be asked for."""
    classifies: bool = False
    """Whether its config names the classes."""
    embeds: bool = False
    """Whether it puts out states that become an embedding; a pooler that serves a head is dropped."""
    of_encoder: bool = False
    """Whether of an encoder with a decoder it takes the encoder alone."""
    metric: Asked | None = None
    """What judges it; None means what fits the output and the labels."""

    def read_as(self, config: Any) -> Kind | None:
        """How the outputs of a model are compared; None means by what makes them."""
        return PROBLEMS.get(getattr(config, "problem_type", None)) if self.classifies else None


AUDIO: tuple[str, ...] = ("Wav2Vec2", "Wav2Vec2Bert", "Wav2Vec2Conformer", "Hubert", "WavLM", "Data2VecAudio")
AUDIO += ("SEW", "SEWD", "UniSpeech", "UniSpeechSat")
"""Models of sound whose classifiers are called as those of texts."""

OWN = (
    Task("feature-extraction", "AutoModel", ("Model",), embeds=True),
    Task("sentence-similarity", "AutoModel", embeds=True),
    Task("text-classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",), classifies=True),
    Task("text-ranking", "AutoModelForSequenceClassification", classifies=True),
    Task("zero-shot-classification", "AutoModelForSequenceClassification", classifies=True),
    Task("token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), classifies=True),
    Task("question-answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), metric="pseudo_perplexity"),
    Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), metric="perplexity"),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        classifies=True,
    ),
    Task(
        "audio-classification",
        "AutoModelForAudioClassification",
        ("ForAudioClassification", *(f"{name}ForSequenceClassification" for name in AUDIO)),
        classifies=True,
        of_encoder=True,
    ),
    Task("image-feature-extraction", "AutoModel", embeds=True),
    Task("semantic-segmentation", "AutoModelForSemanticSegmentation", ("ForSemanticSegmentation",)),
    Task("universal-segmentation", "AutoModelForUniversalSegmentation", ("ForUniversalSegmentation",)),
)
"""A new task is a row here, or an entry point in the group optin_deploy.tasks."""
OTHER_HEADS = ("HeadModel", "HeadsModel", "DecoderModel")
"""Endings of architectures that end in Model but are more than it."""


@cache
def tasks() -> Mapping[str, Task]:
    """Return every task by its name, those of other packages too."""
    found = {task.name: task for task in OWN}
    for name, place in with_added("tasks", dict.fromkeys(found, "")).items():
        if place:
            module, _, row = place.partition(":")
            found[name] = getattr(import_module(module), row)
    return found


def task_of(name: str) -> Task:
    """The task of this name.

    Raises: BadInput: there is none.
    """
    if name not in tasks():
        raise BadInput(f"unknown --task {name!r}; possible: {', '.join(tasks())}.")
    return tasks()[name]


def task_with(architecture: str) -> Task | None:
    """The task of an architecture, by its longest ending that a task has; None: a head that no task covers."""
    fits = {
        ending: task
        for task in tasks().values()
        for ending in task.endings
        if architecture.endswith(ending) and (ending != "Model" or not architecture.endswith(OTHER_HEADS))
    }
    return fits[max(fits, key=len)] if fits else None


def infer_task(config: Any) -> Task:
    """The task of a model, by the architecture in its config.

    Raises: BadInput: a head that no task covers.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    found = task_with(name)
    if found is not None:
        return found
    head = "" if not name else " Feature extraction takes such a model without its head."
    raise BadInput(f"cannot infer the task from architecture {shown(name)}; give --task {' | '.join(tasks())}.{head}")
