"""A family of networks: a model with random weights, its inputs, and which of their axes may vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import interpolate

hf: Any = transformers  # its configs take more names than their types tell

SIZES: Mapping[str, int] = {"batch": 2, "length": 13, "target": 11, "source": 9}
"""Sizes of the free axes at export. Other sizes must work as well; no width of any model equals one of them."""
VOCABULARY = 97


@dataclass(frozen=True)
class Input:
    """One input of a network."""

    name: str
    shape: tuple[int | str, ...]
    """Numbers are fixed; names, keys of `SIZES`, are free."""
    kind: str = "real"
    """`ids`, `mask` (ones, and zeros at the end of the first row), `zeros`, `real` (normal) or `picture`."""
    below: int = VOCABULARY
    """Ids are smaller."""

    @property
    def free(self) -> dict[int, str]:
        """Free axes: position to name."""
        return {position: size for position, size in enumerate(self.shape) if isinstance(size, str)}

    def values(self, generator: torch.Generator, sizes: Mapping[str, int]) -> Tensor:
        """Make values for these sizes of free axes."""
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)
        if self.kind == "real":
            return torch.randn(shape, generator=generator)
        if self.kind == "picture":
            return picture(shape, generator)
        if self.kind == "ids":
            return torch.randint(min(5, self.below - 1), self.below, shape, generator=generator)
        values = (torch.zeros if self.kind == "zeros" else torch.ones)(shape, dtype=torch.long)
        if self.kind == "mask" and shape[-1] > 2:
            values[0, -2:] = 0
        return values


def picture(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Smooth light colours with lines of dark dots, which detectors of text take for words; from -1 to 1."""
    batch, _, *sizes = shape  # (batch, colours, height, width)
    height, width = (size // 2 for size in sizes)

    def drawn(channels: int, rows: int, columns: int) -> Tensor:
        return torch.rand((batch, channels, rows, columns), generator=generator)

    colours = interpolate(drawn(shape[1], 3, 3), sizes, mode="bilinear")
    words = interpolate(drawn(1, height // 12 + 1, width // 6 + 1).round(), (height, width))
    lines = (torch.arange(height) % 12 < 6)[:, None]
    ink = interpolate(drawn(1, height, width).round() * words * lines, sizes)
    return (1 + colours) * (1 - ink) - 1


@dataclass(frozen=True)
class Family:
    """One row."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the model; its weights are drawn anew by `model`."""
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...] = ("logits",)
    """Fields of what the model returns, in the order in which they are exported."""

    def model(self, seed: int = 0) -> Exported:
        """Return the model in eval mode, with random weights in which no two tensors are equal."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            if isinstance(model, hf.PreTrainedModel):
                model.set_attn_implementation("eager")  # the one that Swin and Mask2Former export with
            scatter(model)
        return Exported(model, tuple(one.name for one in self.inputs), self.outputs).eval()

    def feeds(self, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Make inputs; sizes of free axes by name, such as `batch=5, length=17`."""
        generator = torch.Generator().manual_seed(seed)
        return {one.name: one.values(generator, {**SIZES, **sizes}) for one in self.inputs}

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the free axes."""
        return tuple(dict.fromkeys(name for one in self.inputs for name in one.free.values()))


class Exported(nn.Module):
    """A model with its inputs by position and a tuple of tensors as its output, as exporters want it."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the model; inputs are in the order of the family."""
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


def scatter(model: nn.Module) -> None:
    """Draw weights so that every unit matters and no two tensors are equal.

    As initialised, many biases, tables and normalizations are zeros or ones: exporters would store equal ones once,
    and a mask on what they multiply would change nothing.
    """
    for module in model.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
            nn.init.ones_(
                module.get_parameter("weight")
            )  # some start near zero, and features would be as good as equal
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.normal_(0, max(parameter[0].numel(), 1) ** -0.5)
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2]
        if last == "running_var":
            buffer.uniform_(0.5, 1.5)
        elif last in ("running_mean", "weight", "bias"):  # frozen BatchNorms hold all of theirs as buffers
            buffer.add_(torch.randn_like(buffer) * 0.1)
