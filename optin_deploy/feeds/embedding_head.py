"""What makes an embedding of the states of a text's tokens: pooling, dense layers, unit length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.feeds.pooling import POOLINGS, pooled_states
from optin_deploy.files.opening import short
from optin_deploy.files.storage import read_json, read_tensors, sha256_tensors
from optin_deploy.files.support_files import support_file

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "Sigmoid": torch.sigmoid,
    "GELU": nn.functional.gelu,
    "SiLU": nn.functional.silu,
}
"""Activations of a dense layer, by their names in torch.nn."""
WEIGHTS, SAVE = "model.safetensors", "Save the folder again with SentenceTransformer.save_pretrained."
DEFAULTS = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "use_residual": False,
}
"""Settings of a dense layer that are understood with these values alone."""


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A layer of sentence-transformers' module Dense."""

    weight: Tensor
    """(out, in)."""
    bias: Tensor | None
    activation: str = "Identity"
    """One of `ACTIVATIONS`."""

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        bias = None if self.bias is None else self.bias.to(x)
        return ACTIVATIONS[self.activation](nn.functional.linear(x, self.weight.to(x), bias))

    @property
    def digest(self) -> str:
        """Hash of what it computes."""
        return (
            sha256_tensors({"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias}))
            + self.activation
        )


@dataclass(frozen=True, eq=False)
class EmbeddingHead:
    """How states become one vector a text."""

    pooling: str = POOLINGS[0]
    """One of `feeds.pooling.POOLINGS`."""
    layers: tuple[DenseLayer, ...] = ()
    normalized: bool = False
    """Whether it ends with unit length."""
    after_prompt: bool = False
    """Whether it is of the tokens behind a prompt alone."""

    def __call__(self, states: Tensor, valid: Tensor) -> Tensor:
        """One vector a sample.

        Args: states, valid: see `pooled_states`.
        Returns: (batch, size).
        """
        vectors = pooled_states(states, valid, self.pooling)
        for layer in self.layers:
            vectors = layer(vectors)
        return nn.functional.normalize(vectors, dim=-1) if self.normalized else vectors

    @property
    def digest(self) -> str:
        """A text that differs where embeddings do."""
        return " ".join(
            [
                self.pooling,
                *(layer.digest for layer in self.layers),
                *["normalized"] * self.normalized,
                *["after prompt"] * self.after_prompt,
            ]
        )


def read_layer(folder: Path, name: str, width: int) -> DenseLayer:
    """Read a module Dense of a sentence-transformers folder.

    Args: name: of its folder inside. width: of what it is given.
    Raises: BadInput: missing, damaged, pickled, of another width, or something that is not understood.
    """
    about, stored = support_file(folder, f"{name}/config.json"), support_file(folder, f"{name}/{WEIGHTS}")
    home = folder / name
    if about is None or stored is None:
        missing = "config.json" if about is None else WEIGHTS
        pickled = (
            " Its pytorch_model.bin is not read: it may run code." if (home / "pytorch_model.bin").exists() else ""
        )
        raise BadInput(f"{home / missing}, which belongs to the module Dense, is missing.{pickled} {SAVE}")
    config = read_json(about, SAVE)
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    other = {key: config[key] for key, value in DEFAULTS.items() if config.get(key, value) not in (value, None)}
    if activation not in ACTIVATIONS or other:
        settings = other or {"activation_function": config.get("activation_function")}
        raise BadInput(
            f"{about}: {short(settings)} is not understood. Possible are a plain layer of the sentence embedding, and "
            f"the activations {', '.join(ACTIVATIONS)}."
        )
    tensors = read_tensors(stored, SAVE)
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if (
        weight is None
        or weight.dim() != 2
        or weight.shape[1] != width
        or (bias is not None and len(bias) != len(weight))
    ):
        shape = None if weight is None else tuple(weight.shape)
        raise BadInput(f"{stored}: linear.weight is {shape}; it needs (out, {width}), and a bias that fits. {SAVE}")
    return DenseLayer(weight.float(), None if bias is None else bias.float(), activation)
