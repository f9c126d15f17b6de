"""The forward that graph exporters trace: typed weights inside, the contract's inputs and float32 outputs outside."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exporters.base import output_names
from optin_deploy.inputs import config_settings, example_inputs, input_names, longest_text
from optin_deploy.pooling import pooled_states
from optin_deploy.rewrite.verify import main_output
from optin_deploy.storage import sha256_json, sha256_tensors

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Type of weights and activations by precision; int8 is made from the fp32 graph."""
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 13
"""Sizes of the traced example; neither is 1, which torch would take for a constant."""


class Traced(nn.Module):
    """A model's forward with positional inputs; pixels come and outputs go as float32 whatever the weights are."""

    def __init__(self, model: nn.Module, pool: str | None) -> None:
        """Raises: BadInput: pooling of a model with logits, or unknown pooling."""
        super().__init__()
        self.model, self.pool = model, pool
        self.inputs = input_names(model)
        self.outputs = output_names(model, pool)
        self.dtype = next(model.parameters()).dtype
        self.eval()  # a fresh module is in training mode and would bring dropout back

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Main output, shape (batch, tokens, hidden) or (batch, classes); with pooling also (batch, hidden)."""
        typed = [v.to(self.dtype) if v.is_floating_point() and v.dtype != self.dtype else v for v in values]
        inputs = dict(zip(self.inputs, typed, strict=True))
        states = main_output(self.model(**inputs))
        states = states if states.dtype == torch.float32 else states.float()
        if self.pool is None:
            return states
        real = inputs.get("attention_mask", torch.ones_like(states[..., 0])).to(states)
        return states, pooled_states(states, real, self.pool)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with, on the model's device."""
        device = next(self.model.parameters()).device
        example = example_inputs(self.model, batch=EXAMPLE_BATCH, seq_len=EXAMPLE_LENGTH)
        return tuple(example[name].to(device) for name in self.inputs)

    def dynamic_shapes(self) -> tuple[tuple[dict[int, Any], ...]]:
        """Any batch, and any length up to the position table's."""
        batch = torch.export.Dim("batch", min=1)
        # torch treats a length of 1 as a case of its own.
        sequence = torch.export.Dim("sequence", min=2, max=longest_text(self.model.config))
        return (tuple({0: batch} | ({1: sequence} if v.dim() == 2 else {}) for v in self.example()),)


def typed_copy(model: nn.Module, precision: str) -> nn.Module:
    """The model in the type of a precision; itself if it has that type already. No weight is there three times."""
    dtype = DTYPES[precision]
    if next(model.parameters()).dtype == dtype:
        return model
    typed: dict[int, Any] = {}  # what deepcopy takes instead of a copy
    for parameter in filter(torch.is_floating_point, model.parameters()):
        typed[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return copy.deepcopy(model, typed).to(dtype)


def graph_key(model: nn.Module, *settings: object) -> str:
    """Hash of everything that an exported graph depends on: weights, config, and the given settings."""
    return sha256_json([sha256_tensors(model.state_dict()), type(model).__name__, config_settings(model), *settings])


@contextmanager
def quiet_export() -> Iterator[None]:
    """The exporter's own progress and deprecation notes are not for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
