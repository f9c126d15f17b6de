"""Record one launch in a CUDA graph, which is then replayed without work for the processor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from optin_deploy.errors import BadInput

logger = logging.getLogger(__name__)

WARMUP_RUNS = 3
"""Launches before a graph is recorded: libraries prepare kernels and memory in the first, and compilers compile."""
Found = TypeVar("Found")


def recorded(launch: Callable[[], Found], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Found] | None:
    """A graph of one launch.

    Args: launch: on torch's current stream, with inputs that stay where they are. stream: not the default one.
    Returns: the graph, and what the launch gave: memory that each replay writes anew; None where no graph can be
        recorded, which is logged with the reason.
    """
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_RUNS):
            launch()
        stream.synchronize()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = launch()
    except (RuntimeError, BadInput) as err:
        torch.cuda.set_stream(before)  # a capture that failed leaves its own
        logger.warning("running without a CUDA graph: %s", err)
        return None
    return graph, found
