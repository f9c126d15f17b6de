"""Inputs to walk a network with: right kinds of values, and sizes that no size of the network can be taken for.

Free sizes are primes that divide no size of a weight and no number in a shape, so that an axis of the batch is never
mistaken for one of heads. A second probe has other primes: what holds in both does not hold by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice

import onnx_ir as ir
import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short
from optin_deploy.network.graph import Network, Port
from optin_deploy.network.indices import table_rows
from optin_deploy.network.shapes import shapes_of

IMAGES = (((96, 160), (48, 320), (224, 224), (640, 640)), ((128, 192), (48, 256), (224, 224), (448, 448)))
"""Heights and widths to try in either probe, where they are free: many networks take multiples of 32 alone, those that
read a line of text a height of 48."""
SIGNALS = (None, 101, 1009, 16033)
"""Lengths to try of signals of free length; the first is as short as that of a text."""
SMALLEST_PRIME = 5
MOST_SIZES = 8
"""Whole numbers of the file that are at most so many may be sizes; more are indices."""
MOST_ENTRIES = 2**28
"""Most entries of an input that is made here; a larger one must come from the caller."""
COLOURS = 4
"""An axis of at most this size beside two free ones holds the channels of an image."""


@dataclass(frozen=True)
class Given:
    """What the caller knows better."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of free axes, by the names that the file gives them; one without a name is called `axis 2` by its place."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Whole inputs, by name."""


NOTHING = Given()


def probes_of(network: Network, *, given: Given = NOTHING) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make the inputs of both probes, in the first sizes that the graph takes.

    Raises: BadInput: as `probes`.
    """
    first, second = (_fitting(network, probes(network, which, given=given)) for which in (0, 1))
    return first, second


def _fitting(network: Network, tries: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first inputs for which most nodes have shapes; only one try is taken as it is."""
    several = list(islice(tries, 2))
    if len(several) == 1:
        return several[0]
    best, fewest = several[0], math.inf
    for feeds in chain(several, tries):
        problems = len(shapes_of(network, feeds).problems)
        if problems < fewest:
            best, fewest = feeds, problems
        if not problems:
            break
    return best


def probes(
    network: Network, which: int = 0, seed: int = 0, *, padding: bool = False, given: Given = NOTHING
) -> Iterator[dict[str, Tensor]]:
    """Make inputs for every graph input, then others: where the graph refuses these, the next may fit.

    Axes of one name have one size. In the last ones axes at one place of their inputs have: some exporters give every
    axis of every input a name of its own.

    Args:
        which: 0 or 1; free sizes of the two differ, but for those of images that are tried late.
        padding: masks end in zeros, in every row but the first.
    Raises: BadInput: an input is no tensor of numbers or has no rank; it names it and says what to give.
    """
    _check_given(network, given)
    ports = [port for port in network.inputs if port.name not in given.tensors]
    for port in ports:
        _check_port(port, network)
    rows = table_rows(network)
    for names in _namings(ports):
        for rung in range(len(SIGNALS) if any(_is_signal(port) for port in ports) else 1):
            sizes = _sizes(network, names, given, which)
            generator = torch.Generator().manual_seed(2 * seed + which)
            found = dict(given.tensors)
            for port in ports:
                shape = [
                    size
                    if isinstance(size, int)
                    else given.sizes.get(size) or _rung(port, place, rung, which) or sizes[size]
                    for place, size in enumerate(names[port.name])
                ]
                if math.prod(shape) > MOST_ENTRIES:
                    raise BadInput(
                        f"{network.source}: input {port.name!r} of sizes {shape} is too large to be made here. "
                        "Give smaller sizes, or the input itself."
                    )
                found[port.name] = _values(port, shape, rows.get(port.name), generator, padding=padding)
            yield {port.name: found[port.name] for port in network.inputs}


_Names = Mapping[str, tuple[int | str, ...]]
"""Fixed sizes and names of free ones, by input."""


def _namings(ports: list[Port]) -> Iterator[_Names]:
    """Ways to say which free axes have one size; those without a name have it by their place."""
    named = {
        port.name: tuple(f"axis {place}" if size == "?" else size for place, size in enumerate(port.shape or ()))
        for port in ports
    }
    yield named
    placed = {
        name: tuple(size if isinstance(size, int) else f"axis {place}" for place, size in enumerate(shape))
        for name, shape in named.items()
    }
    if len(_free(placed)) < len(_free(named)):
        yield placed


def _free(names: _Names) -> list[str]:
    """Names of free sizes, each once, in the order of the inputs."""
    return list(dict.fromkeys(size for shape in names.values() for size in shape if isinstance(size, str)))


def _sizes(network: Network, names: _Names, given: Given, which: int) -> dict[str, int]:
    """A prime for each name, and what the caller says of some."""
    free = _free(names)
    numbers = _numbers(network) | {size for shape in names.values() for size in shape if isinstance(size, int)}
    primes = islice(_primes(numbers - {0}), which * len(free), None)
    sizes = dict(zip(free, primes, strict=False))
    for port in network.inputs:
        if port.name in given.tensors:
            shape = given.tensors[port.name].shape
            sizes |= {name: size for name, size in zip(port.shape or (), shape, strict=False) if isinstance(name, str)}
    return sizes | dict(given.sizes)


def _numbers(network: Network) -> set[int]:
    """Sizes of weights, and whole numbers of the file that may be sizes."""
    found: set[int] = set()
    for weight in network.weights.values():
        sizes = weight.shape.numpy()
        found.update(sizes)
        if weight.dtype in (ir.DataType.INT64, ir.DataType.INT32) and math.prod(sizes) <= MOST_SIZES:
            found.update(abs(int(number)) for number in weight.numpy().reshape(-1))
    return found


def _primes(numbers: set[int]) -> Iterator[int]:
    """Primes that divide none of the numbers."""
    for number in count(SMALLEST_PRIME):
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)) and all(n % number for n in numbers):
            yield number


def _rung(port: Port, place: int, rung: int, which: int) -> int | None:
    """Size to try for a free axis of an image or a signal; None: as every free axis."""
    shape = port.shape or ()
    if not _is_signal(port):
        return None
    if len(shape) != 4:
        return SIGNALS[rung] if place else None
    rows = 1 if isinstance(shape[3], int) and shape[3] <= COLOURS and isinstance(shape[1], str) else 2
    return IMAGES[which][rung][place - rows] if place - rows in (0, 1) else None


def _is_signal(port: Port) -> bool:
    """An image, or anything that is not made of words, with a free size beside its batch."""
    shape = port.shape or ()
    return (port.dtype.is_floating_point() or len(shape) == 4) and any(isinstance(size, str) for size in shape[1:])


def _values(port: Port, shape: list[int], rows: int | None, generator: torch.Generator, *, padding: bool) -> Tensor:
    dtype = ir.tensor_adapters.to_torch_dtype(port.dtype)
    if port.dtype.is_floating_point():
        return torch.randn(shape, generator=generator).to(dtype)
    if rows is not None:
        return torch.randint(rows, shape, generator=generator).to(dtype)
    if dtype == torch.bool and len(shape) > 1:
        half = torch.arange(shape[-1]) < (shape[-1] + 1) // 2  # some hide what is true, others what is not
        values = half.expand(shape).clone()
    elif len(shape) == 4:
        return torch.randint(128, shape, generator=generator).to(dtype)  # an image of bytes
    else:
        values = torch.ones(shape, dtype=dtype)
    if padding and len(shape) > 1 and shape[-1] > 1:
        kept = torch.randint(
            1, shape[-1], (shape[0],), generator=torch.Generator().manual_seed(generator.initial_seed())
        )
        kept[0] = shape[-1]
        tail = torch.arange(shape[-1]) >= kept.reshape(-1, *[1] * (len(shape) - 1))  # (rows, 1, ..., length)
        values = values.masked_fill(tail, 0)
    return values


def _check_port(port: Port, network: Network) -> None:
    """Raises: BadInput."""
    value = next(value for value in network.model.graph.inputs if value.name == port.name)
    advice = f"Give it as `Given(tensors={{{port.name!r}: ...}})`."
    try:
        ir.tensor_adapters.to_torch_dtype(port.dtype)
    except (TypeError, ValueError) as err:
        raise BadInput(f"{network.source}: input {port.name!r} is of type {port.dtype}. {advice}") from err
    if not isinstance(value.type, ir.TensorType):
        raise BadInput(f"{network.source}: input {port.name!r} is no tensor. {advice}")
    if port.shape is None:
        raise BadInput(f"{network.source}: input {port.name!r} has no shape. {advice}")


def _check_given(network: Network, given: Given) -> None:
    """Raises: BadInput: it speaks of inputs or sizes that the network does not have."""
    ports = {port.name: port for port in network.inputs}
    free = set(_free(next(_namings(list(ports.values())))))
    for name in (*(given.tensors.keys() - ports.keys()), *(given.sizes.keys() - free)):
        known = ", ".join((*ports, *sorted(free)))
        raise BadInput(f"{network.source} has no input and no free size {short(name)}; it has {known}.")
    for name, size in given.sizes.items():
        if size < 1:
            raise BadInput(f"Size {name} = {size}: a size is at least 1.")
