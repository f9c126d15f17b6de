"""What people iterate over in Python as feeds: a DataLoader, a generator or a list of batches, by the forward's names.

A batch is a dict of inputs by name, a tuple of them in the order of the forward, or the only input; labels beside the
inputs are told apart only where nothing else can be meant. An iterator is read once, and no further than needed.
"""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.feeds.array_feeds import LABELS, labels_of
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.network.examples import Example

log = logging.getLogger(__name__)

WHAT = (
    "A batch is a dict of tensors by the names of the forward's arguments, one row a sample, a tuple of them in that"
    " order, or (inputs, labels); give a list, a generator or a DataLoader of batches."
)
MOST_BATCHES = 2**20


@dataclass(frozen=True)
class Arguments:
    """What a forward takes."""

    owner: str
    names: tuple[str, ...]
    """Names of the arguments in their order."""
    needed: tuple[str, ...]
    """Those without a default."""
    named: bool = False
    """It takes any name besides (**kwargs)."""

    def __str__(self) -> str:
        """Describe the arguments for messages."""
        return f"{self.owner} takes {', '.join(self.names) or 'anything'}"


def arguments_of(model: nn.Module, names: Sequence[str] | None = None) -> Arguments:
    """Read the arguments of a module's forward.

    Args: names: of the inputs in their order, for a forward that takes `*args`.
    """
    owner = type(model).__name__
    if names is not None:
        return Arguments(owner, tuple(names), tuple(names))
    found = inspect.signature(model.forward).parameters.values()
    plain = [one for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.name not in LABELS]
    needed = tuple(one.name for one in plain if one.default is one.empty)
    return Arguments(owner, tuple(one.name for one in plain), needed, any(one.kind is one.VAR_KEYWORD for one in found))


def module_feeds(model: nn.Module, given: Any, *, most: int, names: Sequence[str] | None = None) -> Feeds:
    """Read batches until `most` rows are there; rows beyond are cut off.

    Returns: tensors of their own, on the CPU, real numbers in the type of the model's.
    Raises: BadInput: says which batch and which input are wrong, what was found, and what a batch is.
    """
    arguments = arguments_of(model, names)
    like = next((value for value in model.parameters() if value.is_floating_point()), torch.empty(0))
    batches: list[dict[str, Tensor]] = []
    labels: list[Label] = []
    for number, one in enumerate(_each(given)):
        reader = _Reader(arguments, f"batch {number}", like.dtype)
        batch, some = reader.read(one)
        if batches and batch.keys() != batches[0].keys():
            raise reader.bad(
                f"it has {', '.join(batch)}, batch 0 has {', '.join(batches[0])}: all need the same inputs"
            )
        left = most - len(labels)
        batches.append({name: value[:left] for name, value in batch.items()})
        labels += some[:left]
        if len(labels) >= most or number >= MOST_BATCHES:
            break
    if not batches:
        raise BadInput(f"{_described(given)} gives no calibration batches. {WHAT} {arguments}.")
    return Feeds(tuple(batches), tuple(labels), f"a {type(given).__name__}")


def example_in(feeds: Feeds) -> Example:
    """Make inputs to trace a module with: two rows, and as free axes that of the rows and those whose sizes differ.

    Axes whose sizes are the same in every batch, such as the tokens of ids and mask, have one name.
    """
    sizes: dict[tuple[int, ...], str] = {}
    axes = {}
    for name, value in feeds.batches[0].items():
        axes[name] = {0: "batch"}
        for axis in range(1, value.dim()):
            found = tuple(batch[name].shape[axis] for batch in feeds.batches)
            if len(set(found)) > 1:
                axes[name][axis] = sizes.setdefault(found, f"size_{len(sizes) + 1}")
    # A size of 1 would be taken for fixed.
    batch = max(feeds.batches, key=lambda batch: min(batch[name].shape[axis] for name in axes for axis in axes[name]))
    return Example({name: torch.cat([value, value])[:2] for name, value in batch.items()}, axes)


def _each(given: Any) -> Iterator[Any]:
    """The batches of what was given; one batch is one, too."""
    if isinstance(given, (Mapping, Tensor, np.ndarray)):
        yield given
        return
    if isinstance(given, tuple) and any(isinstance(one, (Tensor, np.ndarray)) for one in given):
        raise BadInput(
            f"a tuple of {len(given)} tensors: is it one batch, or is each of them one? Put it, or them, into a list."
            f" {WHAT}"
        )
    iterable = hasattr(type(given), "__iter__")
    if not iterable and hasattr(type(given), "__len__") and hasattr(type(given), "__getitem__"):
        raise BadInput(
            f"{_described(given)} gives samples one by one. Give `torch.utils.data.DataLoader(it, batch_size=32,"
            " shuffle=True)`, which makes batches of them."
        )
    if not iterable or isinstance(given, (str, bytes)):
        raise BadInput(f"the calibration batches are {_described(given)}. {WHAT}")
    batches: Iterable[Any] = given
    yield from batches


class _Reader:
    """One batch on its way in."""

    def __init__(self, arguments: Arguments, where: str, dtype: torch.dtype) -> None:
        self.arguments, self.where, self.dtype = arguments, where, dtype

    def read(self, given: Any) -> tuple[dict[str, Tensor], list[Label]]:
        """Inputs by name, and labels of the rows."""
        values, labels = self._apart(given)
        batch = {str(name): self._tensor(str(name), value) for name, value in values.items() if value is not None}
        if not batch:
            raise self.bad("it holds no inputs")
        rows = {name: len(value) for name, value in batch.items()}
        if len(set(rows.values())) > 1:
            raise self.bad(f"its inputs differ in rows: {', '.join(f'{name} {n}' for name, n in rows.items())}")
        count = next(iter(rows.values()))
        if count == 0:
            raise self.bad("it has no rows")
        return batch, (None if labels is None else self._labels(labels, count)) or [None] * count

    def _apart(self, given: Any) -> tuple[Mapping[Any, Any], Any]:
        """(inputs by name, labels or None)."""
        if isinstance(given, Mapping):
            return self._named(given)
        if not isinstance(given, (tuple, list)) or (isinstance(given, list) and _is_numbers(given)):
            return self._placed((given,)), None
        if not given:
            raise self.bad("it is empty")
        if isinstance(given[0], (Mapping, tuple, list)) and not _is_numbers(given[0]):
            if len(given) > 2:
                raise self.bad(f"it is {len(given)} parts, the first of them {_described(given[0])}")
            values, labels = self._apart(given[0])
            if len(given) == 2 and labels is not None:
                raise self.bad("it has labels among the inputs and beside them")
            return values, given[1] if len(given) == 2 else labels
        taken, needed = len(self.arguments.names), len(self.arguments.needed)
        if len(given) == taken + 1:  # more than the forward can take
            return self._placed(given[:-1]), given[-1]
        if len(given) > max(needed, 1) and len(given) <= taken:
            optional = self.arguments.names[len(given) - 1]
            raise self.bad(
                f"it is a tuple of {len(given)}: is the last of them {optional!r}, or the labels? Give dicts"
            )
        return self._placed(given), None

    def _named(self, given: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], Any]:
        beside = [name for name in given if name in LABELS and name not in self.arguments.names]
        if len(beside) > 1:
            raise self.bad(f"it has {' and '.join(beside)}: which of them are the labels?")
        values = {name: value for name, value in given.items() if name not in beside}
        unknown = [name for name in values if name not in self.arguments.names]
        if unknown and not (self.arguments.named and all(isinstance(name, str) for name in unknown)):
            raise self.bad(f"{_shown(unknown[0])} is none of its arguments")
        missing = [name for name in self.arguments.needed if values.get(name) is None]
        if missing:
            raise self.bad(f"{', '.join(missing)} is missing; it has {', '.join(map(str, values)) or 'nothing'}")
        return values, given[beside[0]] if beside else None

    def _placed(self, given: Sequence[Any]) -> Mapping[Any, Any]:
        names = self.arguments.names
        if not len(self.arguments.needed) <= len(given) <= len(names):
            fault = "takes arguments without names: give dicts, or `names`" if not names else "does not take so many"
            raise self.bad(
                f"it is {len(given)} values, and the forward {fault if len(given) > len(names) else 'needs more'}"
            )
        return dict(zip(names, given, strict=False))

    def _tensor(self, name: str, given: Any) -> Tensor:
        """A tensor of its own, (rows, ...); whole numbers in int64 or int32, real ones in the model's type."""
        if isinstance(given, Tensor):
            if given.is_meta or given.layout is not torch.strided or given.is_quantized or given.is_nested:
                raise self.bad(f"{name} is a tensor without plain values ({given.layout}, {given.device})")
            found = given.detach().to("cpu", copy=True)  # a loader may fill one buffer again and again
        else:
            found = self._of_values(name, given)
        if found.is_complex() or found.dim() == 0:
            raise self.bad(f"{name} is {_described(found)}; it needs one row a sample, real or whole numbers")
        if found.is_floating_point():
            found = found.to(self.dtype)
            if not bool(found.isfinite().all()):
                raise self.bad(f"{name} holds NaN or infinity")
            return found
        return found if found.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8) else found.long()

    def _of_values(self, name: str, given: Any) -> Tensor:
        if not _is_numbers(given):
            raise self.bad(f"{name} is {_described(given)}; it needs a tensor")
        try:
            array = np.array(given)
        except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as err:
            raise self.bad(f"{name} is {_described(given)}, which is no array: its rows must be of one length") from err
        if array.dtype.kind not in "biuf":
            raise self.bad(f"{name} is {_described(given)}; it needs numbers")
        wide = np.dtype(np.float64 if array.dtype.kind == "f" else np.int64)
        plain = array.dtype in (np.bool_, np.uint8, np.float32)
        return torch.from_numpy(np.array(array, array.dtype if plain else wide, order="C"))

    def _labels(self, given: Any, rows: int) -> list[Label] | None:
        """None: they are of a kind that is not used, such as boxes."""
        if isinstance(given, Mapping) or (isinstance(given, (list, tuple)) and given and isinstance(given[0], Mapping)):
            log.warning("%s: its labels are %s, which are not used", self.where, _described(given))
            return None
        what = f"its labels are {_described(given)}; possible are numbers and names of classes, one a row"
        try:
            values = given.detach().cpu() if isinstance(given, Tensor) else np.asarray(given)
        except ValueError as err:  # lists of unequal lengths
            raise self.bad(what) from err
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            wide = {"b": np.bool_, "f": np.float64}.get(values.dtype.kind, np.int64)
            values = torch.from_numpy(np.array(values, wide, order="C"))  # torch lacks some types and byte orders
        if isinstance(values, np.ndarray) and values.dtype.kind not in "US":
            raise self.bad(what)
        return labels_of(values, rows, f"{self.where}: the labels")

    def bad(self, what: str) -> BadInput:
        """An error about this batch."""
        return BadInput(f"{self.where}: {what}. {WHAT} {self.arguments}.")


def _is_numbers(given: Any) -> bool:
    """An array, or lists of numbers, not a collection of arrays."""
    if isinstance(given, (Tensor, np.ndarray)):
        return True
    if isinstance(given, (list, tuple)):
        return bool(given) and not isinstance(given[0], (Tensor, np.ndarray, Mapping)) and _is_numbers(given[0])
    return isinstance(given, (int, float, np.number))


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


def _described(value: Any) -> str:
    """Type and size, or the value itself where it is short."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"an array of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    name = type(value).__name__
    return f"a{'n' if name[0] in 'aeiouAEIOU' else ''} {name}, {_shown(value)}"
