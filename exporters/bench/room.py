"""Refuse a size of input that cannot fit into memory, before anything is made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.inputs import IMAGE_SIZE, input_names
from optin_deploy.layout import ModelLayout
from optin_deploy.runtimes.device import current_gpu
from optin_deploy.scoring.memory import free_bytes

VALUE_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of an activation by precision, where it is not 4."""
ID_BYTES, PIXEL_BYTES = 8, 4


def check_room(each: int, point: str, batch: int) -> None:
    """Refuse a batch that takes more than all memory that is free, here or on the GPU.

    Args: each: bytes that a sample takes at the least. point: what the user calls the size of input.
    Raises: BadInput: says how many samples may fit.
    """
    gpu = current_gpu()
    free = max(free_bytes(device) for device in (torch.device("cpu"), *(() if gpu is None else (gpu,))))
    if batch * each > free:
        raise BadInput(
            f"{point}: a batch of {batch} takes {batch * each / 2**30:,.1f} GiB or more, and {free / 2**30:,.1f} GiB "
            f"are free. Give a batch of {max(1, free // max(1, each))} or less, or a shorter length."
        )


def least_bytes(model: nn.Module, layout: ModelLayout, *, tokens: int, precision: str) -> int:
    """Bytes that one sample takes at the least: its inputs and its activations.

    Args: tokens: a sample, or patches of an image.
    """
    names = input_names(model)
    inputs = PIXEL_BYTES * _pixels(model.config) if names == ("pixel_values",) else tokens * ID_BYTES * len(names)
    return inputs + activation_bytes(layout, tokens=tokens, precision=precision)


def activation_bytes(layout: ModelLayout, *, tokens: int, precision: str | None) -> int:
    """Bytes that any engine holds of one sample inside of one FFN: its input, the residual, and what it computes.

    Attention scores, weights and workspaces come on top.
    """
    widest = max(2 * layer.hidden + max(layer.hidden, layer.neurons) for layer in layout.layers)
    return tokens * widest * VALUE_BYTES.get(precision or "", 4)


def _pixels(config: Any) -> int:
    size = getattr(config, IMAGE_SIZE, None) or config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(config.num_channels * height * width)
