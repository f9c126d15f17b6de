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


def check_room(model: nn.Module, layout: ModelLayout, *, batch: int, tokens: int, precision: str, option: str) -> None:
    """Refuse a batch whose inputs and activations take more than all memory that is free, here or on the GPU.

    Args: tokens: a sample, or patches of an image. option: what the user calls the size of input.
    Raises: BadInput: says how many samples may fit.
    """
    gpu = current_gpu()
    free = max(free_bytes(device) for device in (torch.device("cpu"), *(() if gpu is None else (gpu,))))
    each = least_bytes(model, layout, tokens=tokens, precision=precision)
    if batch * each > free:
        raise BadInput(
            f"{option}: {batch} samples of {tokens} tokens take {batch * each / 2**30:,.1f} GiB or more, and "
            f"{free / 2**30:,.1f} GiB are free. Give a batch of {max(1, free // each)} or less, or a shorter length."
        )


def least_bytes(model: nn.Module, layout: ModelLayout, *, tokens: int, precision: str = "fp32") -> int:
    """Bytes that one sample takes at the least: its inputs, and what any engine holds inside of one FFN.

    That is the layer's input, its residual, and the wider of hidden state and neurons. Attention scores, weights and
    workspaces come on top.
    """
    names, config = input_names(model), getattr(model, "config", None)
    inputs = tokens * ID_BYTES * len(names) if names != ("pixel_values",) else PIXEL_BYTES * _pixels(config)
    widest = max(2 * layer.hidden + max(layer.hidden, layer.neurons) for layer in layout.layers)
    return inputs + tokens * widest * VALUE_BYTES.get(precision, 4)


def _pixels(config: Any) -> int:
    size = getattr(config, IMAGE_SIZE, None) or config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(config.num_channels * height * width)
