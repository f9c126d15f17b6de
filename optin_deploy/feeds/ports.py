"""What the inputs of a network take, and tensors made to fit them: types, sizes and values are checked, never bent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import MASK
from optin_deploy.network.graph import Network, Port
from optin_deploy.network.indices import table_rows
from optin_deploy.network.tensors import torch_dtype

SAVE = "Give every input by its name, samples first: numpy.savez('calibration.npz', {names})."


@dataclass(frozen=True, eq=False)
class Takes:
    """The inputs of a network."""

    source: str
    """Source of the network, for messages."""
    ports: Mapping[str, Port]
    """Inputs by name, in their order."""
    rows: int | None
    """Samples in each batch, where that is fixed."""
    shared: tuple[str, ...]
    """Inputs without an axis of samples: all samples share their values."""
    tables: Mapping[str, int]
    """Rows of the table that an input indexes, for the inputs that index one."""

    @property
    def samples(self) -> list[str]:
        """Names of the inputs with a row a sample."""
        return [name for name in self.ports if name not in self.shared]

    def __str__(self) -> str:
        """All inputs, as messages tell them."""
        return few([described(port) for port in self.ports.values()])

    @property
    def as_arrays(self) -> str:
        """How to give all inputs in one file."""
        return SAVE.format(names=few([f"{name}=..." for name in self.ports]))


def takes(network: Network) -> Takes:
    """Read what a network's inputs take.

    Raises: BadInput: it has no inputs.
    """
    ports = {port.name: port for port in network.inputs}
    if not ports:
        raise BadInput(f"{network.source} has no inputs, so nothing can be learned from data.")
    first = {name: _first(port) for name, port in ports.items()}
    free = [name for name, size in first.items() if isinstance(size, str)]
    fixed = [size for size in first.values() if isinstance(size, int)]
    rows = None if free or not fixed else fixed[0]
    shared = tuple(name for name, size in first.items() if size is None or (isinstance(size, int) and size != rows))
    return Takes(network.source, ports, rows, shared, table_rows(network))


def _first(port: Port) -> int | str | None:
    """Size of the first axis; a name where it is free; None: there is no axis."""
    if port.shape is None:
        return "?"
    return port.shape[0] if port.shape else None


def few(words: Sequence[str], most: int = 8) -> str:
    """A list of words, cut short."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} others" if len(words) > most else "")


def described(port: Port) -> str:
    """An input as messages tell it: name, type, sizes."""
    sizes = "of any sizes" if port.shape is None else f"({', '.join(map(str, port.shape))})"
    return f"{port.name} {port.dtype.name.lower()} {sizes}"


def fitted(inputs: Takes, values: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A batch in the types of the network's inputs and in their order, those with a row a sample first.

    Args: values: every input by name. where: names the batch in messages.
    Raises: BadInput: an input is missing, or does not fit; names input, value, what is possible.
    """
    missing = [name for name in inputs.ports if name not in values]
    if missing:
        raise BadInput(
            f"{where}: {', '.join(missing)} is missing; it holds {', '.join(values) or 'nothing'}. The network takes"
            f" {inputs}. {inputs.as_arrays}"
        )
    order = (*inputs.samples, *inputs.shared)
    found = {name: _fitted(inputs, name, values[name], f"{where}: {name}") for name in order}
    rows = {name: len(found[name]) for name in inputs.samples}
    if len(set(rows.values())) > 1:
        raise BadInput(
            f"{where}: unequal numbers of samples: {', '.join(f'{name} {n}' for name, n in rows.items())}. Each input"
            " has its samples along the first axis, in the same order."
        )
    if 0 in rows.values():
        raise BadInput(f"{where}: it has no samples. The first axis holds the samples; give 8 or more.")
    _check_names(inputs, found, where)
    mask = found.get(MASK)
    if mask is not None and mask.dim() == 2:
        _check_mask(mask, where)
    return found


def _fitted(inputs: Takes, name: str, values: Tensor, where: str) -> Tensor:
    port = inputs.ports[name]
    _check_sizes(port, tuple(values.shape), where, samples=name not in inputs.shared)
    return typed(port, values, where, inputs.tables.get(name))


def _check_sizes(port: Port, sizes: tuple[int, ...], where: str, *, samples: bool) -> None:
    wanted = port.shape
    if wanted is None:
        if samples and not sizes:
            raise BadInput(f"{where} is a single number; it needs an axis of samples.")
        return
    fits = len(sizes) == len(wanted) and all(
        isinstance(want, str) or want == size or (samples and axis == 0)
        for axis, (want, size) in enumerate(zip(wanted, sizes, strict=True))
    )
    if not fits:
        extra = " The first axis holds the samples, also where there is one." if len(sizes) < len(wanted) else ""
        raise BadInput(f"{where} has the shape {sizes}; the network takes {described(port)}, numbers are fixed.{extra}")
    if 0 in sizes[1:]:
        raise BadInput(f"{where} has the shape {sizes}: there is nothing in it.")


def typed(port: Port, values: Tensor, where: str, table: int | None = None) -> Tensor:
    """Values in the type of an input, where none of them changes its meaning.

    Args: table: rows of the table that the input indexes.
    Raises: BadInput: the type, or a value, does not fit.
    """
    wanted = type_of(port)
    if values.is_complex() or values.is_quantized:
        raise BadInput(f"{where} holds {_name(values)} values; the network takes {described(port)}.")
    if values.is_floating_point() and not wanted.is_floating_point:
        raise BadInput(
            f"{where} holds {_name(values)} values; the network takes {described(port)}, whole numbers. Save it in "
            "that type if the values are whole."
        )
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch hardly computes with them
        values = values.to(torch.int64)
    if values.numel() and not values.is_floating_point():
        _check_whole(port, values, wanted, where, table)
    found = values.to(wanted)
    if wanted.is_floating_point and not bool(finite(found).all()):
        row = next(i for i, each in enumerate(found if found.dim() else found[None]) if not finite(each).all())
        cause = "" if not finite(values).all() else f" in {_name(found)}, the type that the network takes"
        raise BadInput(f"{where} holds NaN or infinity{cause}, first in sample {row}. Correct it, or leave it out.")
    return found


def finite(values: Tensor) -> Tensor:
    """Which values are neither NaN nor infinite; of 8 bits torch does not tell."""
    return torch.isfinite(values.float() if values.dtype.itemsize == 1 else values)


def type_of(port: Port) -> torch.dtype:
    """The torch type of an input.

    Raises: BadInput: it is none of numbers.
    """
    try:
        return torch_dtype(port.dtype)
    except TypeError as err:
        raise BadInput(
            f"The input {described(port)} is not made of numbers. Export the network behind this step, where "
            "numbers go in."
        ) from err


def _check_whole(port: Port, values: Tensor, wanted: torch.dtype, where: str, table: int | None) -> None:
    low, high = int(values.min()), int(values.max())
    least, most = (0, 1) if wanted == torch.bool else (-(2**63), 2**63)
    if not wanted.is_floating_point and wanted != torch.bool:
        least, most = torch.iinfo(wanted).min, torch.iinfo(wanted).max
    if table is not None:
        least, most = max(least, -table), min(most, table - 1)
    if low < least or high > most:
        lookup = f", which looks them up in a table of {table} rows" if table is not None else ""
        raise BadInput(
            f"{where} holds {low if low < least else high}; {described(port)} takes {least} to {most}{lookup}."
            " Is it the data, or the tokenizer, of another network?"
        )


def _check_names(inputs: Takes, values: Mapping[str, Tensor], where: str) -> None:
    """Axes that the file calls by one name have one size in a batch."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in values.items():
        for axis, (free, size) in enumerate(zip(inputs.ports[name].shape or (), value.shape, strict=False)):
            if not isinstance(free, str) or free == "?" or (axis == 0 and name not in inputs.shared):
                continue
            before, other = sizes.setdefault(free, (size, name))
            if before != size:
                raise BadInput(
                    f"{where}: {other} has {before} and {name} {size} along the axis {free!r}, which is one size in the"
                    " network. Cut or pad them to the same."
                )


def _check_mask(mask: Tensor, where: str) -> None:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(f"{where}: {MASK} holds other values than 1 (a token) and 0 (padding).")
    empty = (mask == 0).all(1).nonzero().flatten().tolist()
    if empty:
        raise BadInput(f"{where}: sample {empty[0]} has no token: its {MASK} is all 0. Leave it out.")


def _name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
