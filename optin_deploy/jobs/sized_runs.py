"""Run real rows on an artifact: as they are, or padded where it takes some sizes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from optin_deploy.exporters.base import Artifact
from optin_deploy.feeds.rows import MASK, Batch, Feeds, rows_of
from optin_deploy.network.graph import Network, Port
from optin_deploy.runtimes.base import Runtime


def misfit(artifact: Artifact, network: Network, rows: Feeds) -> str | None:
    """Why rows cannot be brought to the sizes that an artifact takes; None: they can.

    Args: network: the graph that it was made of, or one with the same inputs.
    """
    free = {_free(port) for port in network.inputs}
    if not artifact.shapes or free in ({()}, {(0,)}):
        return None
    if free != {(0, 1)} or MASK not in {port.name for port in network.inputs}:
        return f"it takes some sizes alone, and only texts with an {MASK} are padded to them"
    longest = max(batch[MASK].shape[1] for batch in rows.batches)
    most = max(tokens for _, tokens in artifact.shapes)
    return f"it takes {most} tokens at most, and they have {longest}" if longest > most else None


def run_rows(runtime: Runtime, artifact: Artifact, network: Network, batch: Batch) -> dict[str, Tensor]:
    """Outputs of a batch by name; copies of its first row and masked tokens that fill a size are cut off again."""
    given = {port.name: batch[port.name] for port in network.inputs}
    free = {_free(port) for port in network.inputs}
    if not artifact.shapes or free == {()}:
        return _run(runtime, given)
    tokens = batch[MASK].shape[1] if free == {(0, 1)} else None
    rows, length = _size(artifact.shapes, tokens)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, rows_of(given), rows):
        part = {name: value[start : start + rows] for name, value in given.items()}
        count = rows_of(part)
        found = _run(runtime, {name: _padded(value, rows, length) for name, value in part.items()})
        parts.append({name: value[:count] for name, value in found.items()})
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return whole if tokens is None else {p.name: _shortened(whole[p.name], p, length, tokens) for p in network.outputs}


def _free(port: Port) -> tuple[int, ...]:
    """Axes of any size; of an unknown shape too many to be padded."""
    shape = ("?",) * 9 if port.shape is None else port.shape
    return tuple(axis for axis, size in enumerate(shape) if isinstance(size, str))


def _size(shapes: Sequence[tuple[int, int]], tokens: int | None) -> tuple[int, int]:
    """The shortest size that holds so many tokens, and the largest batch of it."""
    if tokens is None:
        return max(shapes)
    return min((shape for shape in shapes if shape[1] >= tokens), key=lambda shape: (shape[1], -shape[0]))


def _padded(value: Tensor, rows: int, length: int) -> Tensor:
    full = torch.cat([value, value[:1].expand(rows - len(value), *value.shape[1:])])
    return pad(full, (0, length - full.shape[1])) if full.dim() == 2 else full


def _shortened(value: Tensor, port: Port, length: int, tokens: int) -> Tensor:
    """An output without the tokens that were added; axes of a fixed size, such as classes, stay."""
    for axis in _free(port)[1:]:
        if axis < value.dim() and value.shape[axis] == length:
            value = value.narrow(axis, 0, tokens)
    return value


def _run(runtime: Runtime, given: Batch) -> dict[str, Tensor]:
    found = runtime.run({name: value.numpy() for name, value in given.items()})
    tensors = {name: torch.from_numpy(value) for name, value in found.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
