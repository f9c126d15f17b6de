"""The dense network that a job starts from, with what belongs to it: of an ONNX file, or of a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optin_deploy.checkpoint.loading import LoadedModel, load_dense
from optin_deploy.checkpoint.tasks import Task
from optin_deploy.data.labels import classifies
from optin_deploy.errors import BadInput
from optin_deploy.feeds.beside_graph import class_names
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.inputs import check_seq_len, config_settings, longest_text
from optin_deploy.feeds.pooling import POOLED, pooling_of
from optin_deploy.feeds.sentence_modules import NONE, Prompts, SentenceModules
from optin_deploy.files.names import DENSE
from optin_deploy.files.storage import sha256_file, sha256_json, sha256_tensors
from optin_deploy.network.examples import example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.read_torch import FAILURES, prepared
from optin_deploy.network.sealed import finished
from optin_deploy.network.unused import tidied
from optin_deploy.pruning.served_images import check_any_size, check_room, serve_images
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.settings import Kind

PACKAGES = ("torch", "onnx", "onnxscript", "transformers")
"""What an exported graph depends on besides the model."""
SEQ_LEN = 128
"""Tokens of a calibration text at most, where nothing is said."""


@dataclass(frozen=True, eq=False)
class DenseSource:
    """A dense network and what belongs to it."""

    network: Network
    key: str
    """Hash of all that its graph depends on."""
    loaded: LoadedModel | None = None
    """The transformers model that it was exported from; None: it is an ONNX file."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in their order; None means that they are not known."""

    @property
    def model(self) -> Any:
        """The transformers model, or None."""
        return None if self.loaded is None else self.loaded.model

    @property
    def task(self) -> Task | None:
        """Task of the transformers model."""
        return None if self.loaded is None else self.loaded.task

    @property
    def read_as(self) -> Kind | None:
        """How its outputs are compared, where its task says it."""
        return None if self.loaded is None else self.loaded.task.read_as(self.loaded.model.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was loaded with the model; None means the one beside the network."""
        return self.loaded.preprocessor if self.loaded is not None and self.loaded.is_text else None

    @property
    def processor(self) -> Any:
        """The image processor that was loaded with the model; None: what lies beside the network."""
        return self.loaded.preprocessor if self.loaded is not None and self.loaded.is_image else None

    @property
    def sentence(self) -> SentenceModules | None:
        """What the model's folder of sentence-transformers says."""
        return None if self.loaded is None else self.loaded.sentence

    @property
    def head(self) -> EmbeddingHead | None:
        """What makes embeddings of states, where the model's own files say it."""
        if self.sentence is not None:
            return self.sentence.head
        return None if self.loaded is None else EmbeddingHead(pooling_of(self.loaded.model))

    @property
    def prompts(self) -> Prompts:
        """What is put before texts."""
        return NONE if self.sentence is None else self.sentence.prompts

    @property
    def longest(self) -> int | None:
        """Tokens that its table of positions holds; None: not known."""
        return None if self.loaded is None or not self.loaded.is_text else longest_text(self.loaded.model.config)

    def seq_len(self, asked: int | None) -> int | None:
        """Tokens of a calibration text at most; None: what the network fixes.

        Raises: BadInput: more than the table of positions holds.
        """
        if self.loaded is None:
            return asked
        if not self.loaded.is_text:
            if asked is not None:
                what = "images have a size" if self.loaded.is_image else "sounds have sizes"
                raise BadInput(f"--seq-len {asked}: {what} of their own, and no length in tokens.")
            return None
        if asked is not None:
            check_seq_len(self.loaded.model.config, asked)
        bounds = (SEQ_LEN, self.longest, self.sentence and self.sentence.longest)
        return asked or min(bound for bound in bounds if bound)


def dense_of(source: Source, home: Path | None = None) -> DenseSource:
    """Load what a job starts from; a transformers model is exported once, and read from its output folder afterwards.

    Args: home: an output folder, whose dense.onnx is taken where it was exported from this very model.
    Raises: BadInput: it cannot be loaded, or not be exported.
    """
    if source.is_file:
        if source.task is not None:
            raise BadInput(f"--task {source.task} is for transformers models; {source.model} is an ONNX file.")
        if source.any_size:
            raise BadInput(
                f"--any-size is for transformers models; {source.model} is an ONNX file, whose sizes it says."
            )
        path = Path(source.model)
        network = read_file(path)
        return DenseSource(
            network, sha256_json([sha256_file(path), version("onnx")]), class_names=class_names(source.model)
        )
    loaded = load_dense(source.model, source.task)
    if loaded.is_image:
        serve_images(loaded, source.image_size, any_size=source.any_size)
    elif source.any_size or source.image_size is not None:
        raise BadInput(f"{source.model} takes no images: --image-size and --any-size are for models that take images.")
    weights = sha256_tensors(loaded.model.state_dict())
    settings = [type(loaded.model).__name__, config_settings(loaded.model), [version(name) for name in PACKAGES]]
    key = sha256_json([weights, *settings])
    names = _names(loaded) if classifies(loaded.model) else None
    known = None if home is None else finished(home / DENSE)
    if home is not None and known is not None and known.key == key:
        return DenseSource(stored_in(home, type(loaded.model).__name__), key, loaded, names)
    if source.image_size is not None:
        check_room(loaded.model, source.image_size)
    _try_two(loaded)
    network = tidied(read(loaded.model))
    if source.any_size:
        check_any_size(loaded.model, network)
    return DenseSource(network, key, loaded, names)


def stored_in(home: Path, source: str) -> Network:
    """The network of the dense.onnx there, without what pooling added; `source` is what it came from."""
    return Network(tidied(read_file(home / DENSE), without=POOLED).model, source)


def _names(loaded: LoadedModel) -> tuple[str, ...]:
    config: Any = loaded.model.config
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def _try_two(loaded: LoadedModel) -> None:
    """Some classifiers take one sample at a time unless their config names a padding token.

    Raises: BadInput.
    """
    refusals = (ValueError,) if loaded.is_text else FAILURES
    try:
        with prepared(loaded.model), torch.no_grad():
            loaded.model(**example_of(loaded.model).inputs)
    except refusals as err:
        step = "Check the sizes in its config.json: they make other inputs than this model takes."
        if loaded.is_text:
            step = "Name the padding token in its config.json (pad_token_id), as the tokenizer has it."
        elif loaded.is_image:
            step = "Check --image-size and preprocessor_config.json: they make other images than this model takes."
        raise BadInput(f"{type(loaded.model).__name__} does not take two samples at once: {err} {step}") from err
