"""What people pass as calibration data -> batches that the model takes, or one error that says what is wrong.

A batch is a dict of inputs by the names of the model's forward, one row a sample. Taken besides: a tuple of them in the
order of the forward, or the main input alone; a list, a generator or a DataLoader of batches, or one batch.
"""

from __future__ import annotations

import inspect
import reprlib
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.inputs import longest_text
from optin_deploy.masking import Batch, inference, rows_of

WHAT = (
    "A batch is a dict of tensors, arrays or lists by the names of the model's inputs, one row a sample, such as a "
    "tokenizer or an image processor makes with return_tensors='pt'; give a list, a generator or a DataLoader of them."
)
MAIN = ("input_ids", "pixel_values")
"""Inputs that a sample is known by."""
OF_TOKENS = ("attention_mask", "token_type_ids", "position_ids")
"""Inputs of text with one value a token, (rows, tokens)."""
LABELS = ("labels", "label", "label_ids")
"""Left out: nothing is learned from them."""
SETTINGS = (
    *("self", "args", "kwargs", "past_key_values", "inputs_embeds", "head_mask", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "interpolate_pos_encoding", "cache_position"),
)
"""Of a forward: what is no input of a sample, or takes the place of the main one."""
MOST_ROWS = 2**20
"""Of all batches; far more than anything can be learned from."""
REFUSED = (IndexError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError)
"""What a forward raises about inputs that it cannot take."""


class Batches(tuple[Batch, ...]):
    """Batches that one model was seen to take: not checked again."""

    model: weakref.ref[nn.Module]


def make_batches(model: nn.Module, given: Any, *, least: int = 1) -> Batches:
    """Batches of tensors on the model's device, checked; an iterator is read once.

    Args: model: checked already. least: samples that are needed.
    Returns: as many batches as were given, in their order, without labels.
    Raises: BadInput: says what a batch is, which batch and which input are wrong, and what was found.
    """
    if isinstance(given, Batches) and given.model() is model:
        return given
    found: list[dict[str, Tensor]] = []
    rows = 0
    streamed = not isinstance(given, (list, tuple, Mapping, Tensor, np.ndarray))  # may fill one buffer again and again
    for number, one in enumerate(_each(given)):
        batch = _Reader(model, f"batch {number}", copying=streamed).read(one)
        if found and batch.keys() != found[0].keys():
            raise BadInput(
                f"batch {number} has {', '.join(batch)}, batch 0 has {', '.join(found[0])}: give the same inputs in "
                f"all batches. {WHAT}"
            )
        found.append(batch)
        rows += rows_of(batch)
        if rows > MOST_ROWS:
            raise BadInput(
                f"more than {MOST_ROWS} calibration samples: does the {type(given).__name__} ever end? A few hundred "
                "are enough."
            )
    total = rows
    if total < least:
        told = "no calibration batches were given" if not found else f"{total} calibration samples are too few"
        raise BadInput(f"{told}; give at least {least} sample{'s' * (least > 1)}. {WHAT}")
    _try(model, found)
    batches = Batches(found)
    batches.model = weakref.ref(model)
    return batches


def _each(given: Any) -> Iterable[Any]:
    """The batches of what was given; one batch is one, too."""
    if isinstance(given, (Mapping, Tensor, np.ndarray)):
        return [given]
    if not hasattr(type(given), "__iter__") and hasattr(type(given), "__len__") and hasattr(type(given), "__getitem__"):
        return (given[index] for index in range(len(given)))  # its own end may be no IndexError: a torch Dataset
    try:
        found: Iterable[Any] = iter(given if not isinstance(given, (str, bytes, type)) else 0)  # type: ignore[arg-type]
        return found
    except TypeError as err:
        raise BadInput(f"the calibration batches are {_told(given)}. {WHAT}") from err


class _Reader:
    """One batch on its way in."""

    def __init__(self, model: nn.Module, where: str, *, copying: bool) -> None:
        self.model, self.where, self.copying = model, where, copying
        self.config: Any = getattr(model, "config", None)
        self.names = [name for name in inspect.signature(model.forward).parameters if name not in SETTINGS]
        self.main = next((name for name in MAIN if name in self.names), None)
        like = next(model.parameters())
        self.device, self.dtype = like.device, like.dtype if like.is_floating_point() else torch.float32

    def read(self, given: Any) -> dict[str, Tensor]:
        values = self._named(given)
        unknown = [name for name in values if name not in self.names]
        if unknown:
            raise self._bad(f"{_shown(unknown[0])} is no input of {type(self.model).__name__}")
        if self.main is None or self.main not in values:
            raise self._bad(f"{self.main or ' or '.join(MAIN)} is missing; it has {_shown(list(values))}")
        batch = {name: self._tensor(name, values[name]) for name in self.names if name in values}
        rows = {name: len(value) for name, value in batch.items()}
        if 0 in rows.values():
            raise self._bad("it has no rows")
        if len(set(rows.values())) > 1:
            raise self._bad(f"its inputs differ in rows: {', '.join(f'{name} {n}' for name, n in rows.items())}")
        self._check_text(batch) if self.main == "input_ids" else self._check_images(batch["pixel_values"])
        return {name: value.to(self.device) for name, value in batch.items()}

    def _named(self, given: Any) -> dict[Any, Any]:
        """By name, without labels and without what is None."""
        if isinstance(given, Mapping):
            values = dict(given)
        elif isinstance(given, (tuple, list)) and given and all(isinstance(x, (Tensor, np.ndarray)) for x in given):
            names = [name for name in self.names if name in (*MAIN, *OF_TOKENS[:2], *LABELS)]
            if len(given) > len(names):
                raise self._bad(f"it is a tuple of {len(given)}; the forward takes {', '.join(names)}: give a dict")
            values = dict(zip(names, given, strict=False))
        elif isinstance(given, (Tensor, np.ndarray, tuple, list)):
            values = {self.main: given}
        else:
            raise self._bad(f"it is {_told(given)}")
        return {name: value for name, value in values.items() if name not in LABELS and value is not None}

    def _tensor(self, name: str, given: Any) -> Tensor:
        """A tensor of its own, (rows, ...); whole numbers in int64 or int32, others in the model's type."""
        if isinstance(given, Tensor):
            if given.is_meta or given.layout is not torch.strided or given.is_quantized or given.is_nested:
                raise self._bad(f"{name} is a tensor without plain values ({given.layout}, {given.device})")
            found = given.detach()
            # Of a worker's memory there is little; and through what inference_mode made no gradient passes.
            if self.copying or found.is_inference() or found.is_shared():  # type: ignore[no-untyped-call]
                found = found.clone()
        else:
            found = self._of_values(name, given)
        if found.is_complex() or found.dim() == 0:
            raise self._bad(f"{name} is {_told(found)}; it needs one row a sample")
        if found.is_floating_point():
            return found.to(self.dtype)
        return found if found.dtype in (torch.int64, torch.int32, torch.bool) else found.long()

    def _of_values(self, name: str, given: Any) -> Tensor:
        try:
            # Of a list of tensors, numpy makes one array if they are of equal size.
            array = np.array(given)
        except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as err:
            raise self._bad(f"{name} is {_told(given)}, which is no array: its rows must be of one length") from err
        if array.dtype.kind not in "biuf":
            raise self._bad(f"{name} is {_told(given)} of {array.dtype}; it needs numbers")
        kind = {"b": np.bool_, "f": np.float64 if array.dtype.itemsize > 4 else np.float32}
        return torch.from_numpy(array.astype(kind.get(array.dtype.kind, np.int64)))

    def _check_text(self, batch: dict[str, Tensor]) -> None:
        ids = batch["input_ids"]
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise self._bad(f"input_ids are {ids.dtype}; token ids are whole numbers")
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise self._bad(f"input_ids are {_told(ids)}; they need a shape of (rows, tokens)")
        self._check_range("input_ids", ids, _vocabulary(self.model))
        longest = longest_text(self.config) if _has_table(self.model) else None
        if longest is not None and ids.shape[1] > longest:
            raise self._bad(f"input_ids have {ids.shape[1]} tokens; the model's position table holds {longest}")
        for name in OF_TOKENS:
            if name not in batch:
                continue
            value = batch[name]
            if value.shape != ids.shape:
                raise self._bad(f"{name} is {_told(value)}; input_ids have shape {tuple(ids.shape)}")
            if name == "attention_mask":
                batch[name] = value = self._mask(value)
            elif value.is_floating_point() or value.dtype == torch.bool:
                raise self._bad(f"{name} are {value.dtype}; they are whole numbers")
            elif name == "token_type_ids":
                kinds = getattr(self.config, "type_vocab_size", None)
                self._check_range(name, value, kinds or _vocabulary(self.model))  # GPT-2 looks them up among the ids
            else:
                self._check_range(name, value, getattr(self.config, "max_position_embeddings", None))

    def _mask(self, mask: Tensor) -> Tensor:
        """1 for real tokens, 0 for padding."""
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise self._bad("attention_mask holds other values than 1 (a token) and 0 (padding)")
        empty = (mask == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise self._bad(f"row {empty[0]} has no token: its attention_mask is all 0")
        return mask if mask.dtype in (torch.int64, torch.int32) else mask.long()

    def _check_range(self, name: str, ids: Tensor, size: int | None) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (size is not None and high >= size):
            wrong = low if low < 0 else high
            raise self._bad(f"{name} hold {wrong}; possible are 0 to {'any' if size is None else size - 1}")

    def _check_images(self, pixels: Tensor) -> None:
        channels = getattr(self.config, "num_channels", None)
        if not pixels.is_floating_point():
            raise self._bad(f"pixel_values are {pixels.dtype}; give floats, scaled as the image processor does")
        if pixels.dim() != 4 or 0 in pixels.shape or pixels.shape[1] != (channels or pixels.shape[1]):
            wanted = f"(rows, {channels or 'channels'}, height, width)"
            raise self._bad(f"pixel_values are {_told(pixels)}; they need a shape of {wanted}")
        if not bool(torch.isfinite(pixels).all()):
            raise self._bad("pixel_values hold NaN or infinity")

    def _bad(self, what: str) -> BadInput:
        takes = ", ".join(name for name in self.names if name not in LABELS)
        return BadInput(f"{self.where}: {what}. {WHAT} {type(self.model).__name__} takes {takes}.")


def _vocabulary(model: nn.Module) -> int | None:
    """Number of embeddings."""
    table = None
    with suppress(AttributeError, NotImplementedError):  # not every model has one, or tells
        table = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    size = getattr(table, "num_embeddings", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _has_table(model: nn.Module) -> bool:
    """Whether positions are looked up, so that there is a longest text."""
    tables = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return any("position" in path or path.endswith("wpe") for path in tables)


def _try(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Run a sample of every kind of shape, so that what the model itself cannot take is known before the work.

    Where the config names no padding token, two: some classifiers of text then take one alone.

    Raises: BadInput: with the model's own words.
    """
    largest: dict[Any, tuple[Any, int]] = {}
    for number, batch in enumerate(batches):
        shapes = tuple(value.shape[1:] for value in batch.values())
        kind = shapes if "pixel_values" in batch else tuple(map(len, shapes))
        size = (rows_of(batch) > 1, shapes)
        if kind not in largest or size > largest[kind][0]:
            largest[kind] = (size, number)
    config: Any = getattr(model, "config", None)
    rows = 1 if "pixel_values" in batches[0] or getattr(config, "pad_token_id", None) is not None else 2
    for _, number in largest.values():
        some = {name: value[:rows] for name, value in batches[number].items()}
        try:
            with inference(model), torch.no_grad():
                model(**some)
        except torch.OutOfMemoryError:
            raise
        except REFUSED as err:
            said = " ".join(str(err).split())[:300]
            raise BadInput(
                f"batch {number}: {type(model).__name__} does not take it ({type(err).__name__}: {said}). {WHAT}"
            ) from err


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


def _told(value: Any) -> str:
    """Type and size, or the value itself where it is short."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"an array of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}, {_shown(value)}"
