"""Refuse a size of input that cannot fit into memory, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.runtimes.device import current_gpu
from optin_deploy.scoring.memory import free_bytes

VALUE_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of an activation by precision, where it is not 4."""


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


def least_bytes(network: Network, feeds: Mapping[str, np.ndarray], precision: str | None) -> int:
    """Bytes that one sample takes at the least: its inputs, and what any engine holds of it around its widest product.

    Attention scores, weights and workspaces come on top.
    Args: feeds: inputs of one sample.
    """
    inputs = sum(values.nbytes for values in feeds.values())
    tokens = max((values.size for values in feeds.values() if values.ndim == 2 and values.dtype.kind == "i"), default=0)
    return inputs + tokens * widest(network) * VALUE_BYTES.get(precision or "", 4)


def widest(network: Network) -> int:
    """Values that a token has before and after the largest product with a stored matrix; 0: there is none."""
    looked_up = {node.inputs[0] for node in network.nodes if node.op == "Gather"}
    sizes = [weight.shape.numpy() for name, weight in network.weights.items() if name not in looked_up]
    return max((sum(size) for size in sizes if len(size) == 2 and min(size) > 1), default=0)
