"""Turn calibration samples into batches of tensors, and split off a held-out part."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from optin_deploy.data.bundled import bundled_samples
from optin_deploy.data.halves import MIN_SAMPLES, halves, too_few
from optin_deploy.data.images import eight_bit, open_image
from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.errors import BadInput
from optin_deploy.storage import sha256_tensors

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Batches",
    "Sample",
    "bundled_samples",
    "image_batches",
    "read_samples",
    "split",
    "text_batches",
]

log = logging.getLogger(__name__)

T = TypeVar("T")
COLOURS = {1: "L", 3: "RGB"}
"""Channels of a model -> Pillow's mode of the images that it takes."""
PIXELS_AT_ONCE = 2**26
"""Of images that are prepared together: 200 MB as 8-bit RGB, some times as much on the way."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Model inputs in batches, with the labels in the order of the rows."""

    batches: tuple[dict[str, torch.Tensor], ...]
    """Each {input name: (rows, ...)}, on the CPU."""
    labels: tuple[str | int | None, ...]
    """One a row, over all batches."""

    def __post_init__(self) -> None:
        rows = sum(len(tensor) for batch in self.batches for tensor in list(batch.values())[:1])
        if rows != len(self.labels):
            raise BadInput(f"{len(self.labels)} labels for {rows} rows. Give one label a row, None where it has none.")

    def __len__(self) -> int:
        """The number of samples, not of batches."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the names, dtypes, shapes and bytes of all tensors, batch by batch; not the labels."""
        named = {f"{i} {name}": tensor for i, batch in enumerate(self.batches) for name, tensor in batch.items()}
        return sha256_tensors(named)


def split(
    samples: Sequence[Sample], *, samples_limit: int, held_out: float = 0.2, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Shuffle with the seed and cut into (calibration, held-out); no row is in both, nor one that equals it.

    Of rows that are equal (text and second text, or the bytes of the image) the first is taken, with a warning.
    Where the limit leaves enough rows over, the held-out rows (a quarter of the limit, at least 16) come from
    those; otherwise the share `held_out` of all rows is cut off, and calibration gets the rest.
    Args: samples_limit: the most rows for calibration. held_out: a fraction in [0, 0.5]; 0 gives no held-out rows.
    Raises: BadInput: fewer than 8 different samples, or an option out of range.
    """
    rows = list(distinct(samples))
    repeats = len(samples) - len(rows)
    if repeats:
        log.warning("%d of %d calibration samples repeat others and are left out", repeats, len(samples))
    if len(rows) < MIN_SAMPLES:
        where = f" (from {samples[0].source})" if samples else ""
        kind = f"different ones among {len(samples)} calibration samples" if repeats else "calibration samples in all"
        raise too_few(len(rows), kind + where)
    some, others = halves(len(rows), limit=samples_limit, held_out=held_out, seed=seed)
    return tuple(rows[i] for i in some), tuple(rows[i] for i in others)


def text_batches(
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int = 32,
    pad_to: int | None = None,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
) -> Batches:
    """Tokenise, cut to `seq_len`, sort by length (stable) and pad each batch to its longest row, or to `pad_to`.

    The tokenizer is left as it is (truncation set on a fast one would end up in its saved file). Without a padding
    token the end-of-text token pads: the attention mask hides it.
    Args: inputs: the names the model takes; exactly these are returned.
    Returns: batches of int64 tensors, each (rows, tokens).
    Raises: BadInput: a sample without text, an option out of range, or a name that the tokenizer does not make.
    """
    tokenizer = copy.deepcopy(tokenizer)
    _check_text_options(samples, tokenizer, seq_len, pad_to)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None or "attention_mask" not in inputs:
            raise BadInput(
                "The tokenizer has no padding token, so rows of unequal length cannot share a batch."
                ' Set one, for example "pad_token" in its tokenizer_config.json.'
            )
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {"truncation": True, "max_length": seq_len}
    options |= {f"return_{name}": name in inputs for name in ("attention_mask", "token_type_ids")}
    # One by one: a list cannot mix single texts and pairs.
    rows = [(encode_sample(tokenizer, sample, options), sample.label) for sample in samples]
    rows.sort(key=lambda row: len(row[0]["input_ids"]))
    missing = [name for name in inputs if rows and name not in rows[0][0]]
    if missing:
        raise BadInput(
            f"The model takes {', '.join(inputs)}, but the tokenizer does not make {', '.join(missing)} (it makes"
            f" {', '.join(rows[0][0])}). Use the tokenizer that was saved with this model."
        )
    batches = []
    for chunk in _chunks(rows, batch_size):
        encoded = {name: [row[name] for row, _ in chunk] for name in inputs}
        width = pad_to or max(map(len, encoded["input_ids"]))
        batches.append(_pad(encoded, tokenizer, width))
    return Batches(tuple(batches), tuple(label for _, label in rows))


def image_batches(samples: Sequence[Sample], processor: Any, *, batch_size: int = 32, channels: int = 3) -> Batches:
    """Open the images as RGB, a batch at a time, and prepare them with a transformers image processor.

    Args: channels: of the model, `config.num_channels`; 1 makes them grey.
    Returns: batches of {"pixel_values": float32 (rows, channels, height, width)}, in the order of the samples.
    Raises: BadInput: a sample without image, an image that does not open, or images of unequal size after preparing.
    """
    if channels not in COLOURS:
        raise BadInput(f"config.json: num_channels = {channels}; images have 1 (grey) or 3 (RGB).")
    batches: list[dict[str, torch.Tensor]] = []
    for chunk in _chunks(samples, batch_size):
        parts = []
        for images in _groups(_open_images(chunk)):
            try:
                coloured = [image.convert(COLOURS[channels]) for image in images]
                parts.append(processor(images=coloured, return_tensors="pt")["pixel_values"])
                if parts[-1].shape[1] != channels:
                    raise ValueError(f"it makes {parts[-1].shape[1]} channels, and the model takes {channels}.")
                shapes = {tuple(part.shape[1:]) for part in (*parts, *(b["pixel_values"] for b in batches[:1]))}
                if len(shapes) > 1:
                    raise ValueError(f"the prepared images have unequal shapes {sorted(shapes)}.")
            except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as err:
                why = next(iter(str(err).splitlines()), type(err).__name__)
                raise BadInput(
                    f"{chunk[0].source} to {chunk[-1].source}: the image processor does not fit: {why} Use the one"
                    " saved with this model, with a fixed size (do_resize, do_center_crop) in preprocessor_config.json."
                ) from err
        batches.append({"pixel_values": torch.cat(parts)})
    return Batches(tuple(batches), tuple(sample.label for sample in samples))


def encode_sample(tokenizer: Any, sample: Sample, options: dict[str, Any]) -> Any:
    """What a tokenizer makes of one text or pair.

    Raises: BadInput: it cannot take it.
    """
    try:
        return tokenizer(sample.text, sample.text_pair, **options)
    except Exception as err:  # what tokenizers raises is no narrower
        raise BadInput(
            f"{sample.source}: the tokenizer cannot take this text: {err}. Delete that row, or save the tokenizer again"
            " with its unknown token."
        ) from err


def _check_text_options(samples: Sequence[Sample], tokenizer: Any, seq_len: int, pad_to: int | None) -> None:
    for sample in samples:
        if sample.text is None:
            raise BadInput(f"{sample.source}: no text in this sample. A text model needs a .txt, .jsonl or .csv file.")
    # Below this, truncation is silently given up and the rows come out longer than seq_len.
    special = tokenizer.num_special_tokens_to_add(pair=any(sample.text_pair is not None for sample in samples))
    if seq_len <= special:
        raise BadInput(
            f"seq_len={seq_len} leaves no room for text: the tokenizer adds {special} special tokens."
            f" Use --seq-len {special + 1} or more; 128 is the default."
        )
    if pad_to is not None and pad_to < seq_len:
        raise BadInput(
            f"pad_to={pad_to} is below seq_len={seq_len}. Give pad_to={seq_len} or more, or a lower seq_len."
        )


def _pad(encoded: dict[str, list[list[int]]], tokenizer: Any, width: int) -> dict[str, torch.Tensor]:
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    padded = {}
    for name, rows in encoded.items():
        tensor = torch.full((len(rows), width), fill.get(name, 0), dtype=torch.int64)
        for target, row in zip(tensor, rows, strict=True):
            start = width - len(row) if tokenizer.padding_side == "left" else 0
            target[start : start + len(row)] = torch.tensor(row)
        padded[name] = tensor
    return padded


def _chunks(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    if size < 1:
        raise BadInput(f"batch_size={size}: it must be 1 or more, for example 32.")
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _groups(images: Iterator[Image.Image]) -> Iterator[list[Image.Image]]:
    """A few images at a time, so that those of a camera do not fill the memory."""
    group: list[Image.Image] = []
    for image in images:
        group.append(image)
        if sum(each.width * each.height for each in group) >= PIXELS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _open_images(samples: Sequence[Sample]) -> Iterator[Image.Image]:
    several = []
    for sample in samples:
        if sample.image is None:
            raise BadInput(f"{sample.source}: no image in this sample. An image model needs a folder of images.")
        if not isinstance(sample.image, Path):
            yield eight_bit(sample.image, sample.source)
            continue
        image, pictures = open_image(sample.image)
        several += [sample.image] if pictures > 1 else []
        yield image
    if several:
        log.warning("%d images hold several pictures, such as %s: the first of each is used", len(several), several[0])
