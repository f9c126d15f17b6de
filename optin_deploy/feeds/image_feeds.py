"""Images as feeds: prepared by an image processor, or by size, mean and deviation, laid out as networks take them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optin_deploy.data.class_maps import ClassMap
from optin_deploy.data.images import eight_bit, open_image
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import Takes, described, fitted, type_of
from optin_deploy.feeds.rows import Batching, Feeds, grouped

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

COLOURS = {1: "L", 3: "RGB"}
"""Channels of a network -> Pillow's mode of the images that it takes."""
PIXELS_AT_ONCE = 2**26
"""Most pixels that are prepared together: 200 MB as 8-bit RGB, and several times that while they are prepared."""
IMAGES_AT_ONCE = 32
ONE_COLOUR = 1e-3
"""Prepared pixels of one colour differ by no more."""
LARGEST = 4096
"""Pixels of a side."""
HOW = (
    "Give --preprocessor DIR (preprocessor_config.json), or how pixels are scaled: --mean and --std, such as"
    " --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 of ImageNet, or --mean 0 --std 1 for values from 0 to 1."
)


@dataclass(frozen=True)
class Pixels:
    """How 8-bit pixels become numbers: (pixel * scale - mean) / std, by channel."""

    mean: tuple[float, ...] = (0.0,)
    """One a channel, or one for all."""
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    """1 where mean and std are those of pixels from 0 to 255."""
    bgr: bool = False
    """Channels as blue, green, red, as networks trained on OpenCV's images take them."""

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std, self.scale)
        if not all(np.isfinite(numbers)) or min((*self.std, self.scale)) <= 0 or max(map(abs, numbers)) > LARGEST:
            raise BadInput(
                f"--mean {_shown(self.mean)} --std {_shown(self.std)} --scale {self.scale:g}: they are finite, below"
                f" {LARGEST}, and --std and --scale above 0. Pixels become (pixel * scale - mean) / std; the default"
                " scale is 1/255."
            )


@dataclass(frozen=True, eq=False)
class ImageInput:
    """The input of a network that takes an image."""

    takes: Takes
    name: str
    channels: int
    last: bool
    """Channels stand last, not behind the rows."""
    size: tuple[int | None, int | None]
    """Height and width, where they are fixed."""


def image_input(inputs: Takes) -> ImageInput:
    """Find the input that takes images: (rows, channels, height, width) or (rows, height, width, channels).

    Raises: BadInput: there is none, or others beside it.
    """
    images = [port for port in inputs.ports.values() if port.shape is not None and len(port.shape) == 4]
    if len(images) != 1 or len(inputs.ports) != 1 or inputs.shared:
        raise BadInput(
            f"{inputs.source}: images fill one input of four axes, and it takes {inputs}. {inputs.as_arrays}"
        )
    port = images[0]
    _, *sizes = port.shape or ()
    last = sizes[0] not in COLOURS
    if last and sizes[2] not in COLOURS:
        raise BadInput(
            f"{inputs.source}: which axis of {described(port)} holds the channels is not known: 1 or 3 of them stand "
            f"at axis 1 or last. Export the network with that size fixed. {inputs.as_arrays}"
        )
    channels = sizes.pop(2 if last else 0)
    height, width = (size if isinstance(size, int) else None for size in sizes)
    return ImageInput(inputs, port.name, int(channels), last, (height, width))


def image_feeds(
    image: ImageInput,
    samples: Sequence[Sample],
    processor: Any | None,
    *,
    pixels: Pixels | None,
    size: tuple[int, int] | None,
    batching: Batching,
    origin: str,
) -> Feeds:
    """Open, prepare and lay out.

    Args:
        processor: of transformers; used where neither `pixels` nor `size` is given.
        pixels: None with a whole-number input: as they are. size: height and width, where the network leaves them free.
    Raises: BadInput: it is not said how, a size does not fit, an image does not open.
    """
    if pixels is not None or size is not None or processor is None:
        processor = _plain(image, pixels, size)
    real, rows = type_of(image.takes.ports[image.name]).is_floating_point, []
    for values in prepared(samples, processor, image.channels):
        _check_size(image, values)
        values = values if real else _whole(image, values)
        if image.last:
            values = values.movedim(1, -1)
        rows += [fitted(image.takes, {image.name: one.unsqueeze(0).contiguous()}, origin) for one in values]
    if (mapped := next((sample for sample in samples if sample.class_map is not None), None)) is not None:
        _check_places(mapped, processor, image.channels)
    labels = [sample.label if sample.class_map is None else _class_map(sample, processor) for sample in samples]
    return grouped(rows, labels, origin, batching)


def _check_places(sample: Sample, processor: Any, channels: int) -> None:
    """Raises: BadInput: prepared images do not show all that a map of classes tells of, and nothing else."""
    what = "crops" if getattr(processor, "do_center_crop", False) else "pads" if _pads(processor, channels) else None
    if what is not None:
        raise BadInput(
            f"{sample.source} has a map of classes, and the image processor {what} images, so that what is put out is "
            "of other places. Let it scale them to one height and width, and no more, in preprocessor_config.json."
        )


def _pads(processor: Any, channels: int) -> bool:
    """Whether a wide and a tall image of one colour do not stay of one colour."""
    from PIL import Image

    images = [Image.new("RGB", size, (200, 100, 50)).convert(COLOURS[channels]) for size in ((60, 40), (40, 60))]
    pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return bool((pixels.amax((2, 3)) - pixels.amin((2, 3)) > ONE_COLOUR).any())


def _class_map(sample: Sample, processor: Any) -> ClassMap:
    assert sample.class_map is not None
    # Before transformers 4.22 the entry was called reduce_labels; it still lies in the files of many models.
    reduced = any(getattr(processor, name, False) for name in ("do_reduce_labels", "reduce_labels"))
    return ClassMap(sample.class_map, reduced, sample.image if isinstance(sample.image, Path) else None)


def prepared(samples: Sequence[Sample], processor: Any, channels: int) -> Iterator[Tensor]:
    """Open images and prepare them with a processor of transformers, a few at a time.

    Args: channels: that the network takes; 1 makes the images grey.
    Returns: (images, channels, height, width) each, all of one size, in the order of the samples.
    Raises: BadInput: a sample without image, an image that does not open, or images of unequal size after preparing.
    """
    shape: tuple[int, ...] = ()
    for names, images in _groups(_open_images(samples)):
        try:
            coloured = [image.convert(COLOURS[channels]) for image in images]
            values: Tensor = processor(images=coloured, return_tensors="pt")["pixel_values"]
            if values.shape[1] != channels:
                raise ValueError(f"it makes {values.shape[1]} channels, and the network takes {channels}.")
            shape = shape or tuple(values.shape[1:])
            if tuple(values.shape[1:]) != shape:
                raise ValueError(f"the prepared images have unequal shapes {shape} and {tuple(values.shape[1:])}.")
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as err:
            why = next(iter(str(err).splitlines()), type(err).__name__)
            raise BadInput(
                f"{names[0]} to {names[-1]}: the image processor does not fit: {why} Use the one saved with this"
                " network, with a fixed size (do_resize, do_center_crop) in preprocessor_config.json."
            ) from err
        yield values


def _groups(images: Iterator[tuple[str, Image.Image]]) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """A few images at a time, with their names, so that those of a camera do not fill the memory."""
    names: list[str] = []
    group: list[Image.Image] = []
    for name, image in images:
        names.append(name)
        group.append(image)
        if len(group) == IMAGES_AT_ONCE or sum(each.width * each.height for each in group) >= PIXELS_AT_ONCE:
            yield names, group
            names, group = [], []
    if group:
        yield names, group


def _open_images(samples: Sequence[Sample]) -> Iterator[tuple[str, Image.Image]]:
    several = []
    for sample in samples:
        if sample.image is None:
            raise BadInput(f"{sample.source}: no image in this sample. An image network needs a folder of images.")
        if not isinstance(sample.image, Path):
            yield sample.source, eight_bit(sample.image, sample.source)
            continue
        image, pictures = open_image(sample.image)
        several += [sample.image] if pictures > 1 else []
        yield sample.source, image
    if several:
        log.warning("%d images hold several pictures, such as %s: the first of each is used", len(several), several[0])


def _check_size(image: ImageInput, values: Tensor) -> None:
    height, width = values.shape[2:]
    fixed = image.size
    if (fixed[0] or height, fixed[1] or width) != (height, width):
        raise BadInput(
            f"the prepared images are {height} x {width} pixels, and {image.takes.source} takes {image.takes}. Correct"
            " the size in preprocessor_config.json, or give --mean and --std: then images take the network's size."
        )


def _whole(image: ImageInput, values: Tensor) -> Tensor:
    """Pixels as whole numbers, for inputs that take no others."""
    if not bool((values == values.round()).all()) or float(values.min()) < 0 or float(values.max()) > 255:
        raise BadInput(
            f"{image.takes.source} takes {image.takes}, whole numbers, but the prepared pixels lie between"
            f" {float(values.min()):.3g} and {float(values.max()):.3g}. Leave out --mean and --std: then it gets pixels"
            " from 0 to 255."
        )
    return values.to(torch.int64)


def _plain(image: ImageInput, pixels: Pixels | None, size: tuple[int, int] | None) -> PlainProcessor:
    whole = not type_of(image.takes.ports[image.name]).is_floating_point
    if pixels is None and not whole:
        raise BadInput(f"{image.takes.source} takes {image.takes}: how are its pixels scaled? {HOW}")
    pixels = pixels or Pixels(scale=1.0)
    for option, values in (("mean", pixels.mean), ("std", pixels.std)):
        if len(values) not in (1, image.channels):
            raise BadInput(
                f"--{option} {_shown(values)}: {len(values)} numbers for {image.channels} channels. Give one a channel,"
                " or one for all."
            )
    height, width = (fixed or (size[axis] if size else None) for axis, fixed in enumerate(image.size))
    if height is None or width is None:
        raise BadInput(
            f"{image.takes.source} takes images of any size ({image.takes}). Give the size that it is served with:"
            " --image-size 224, or --image-size 48 320 (height, width)."
        )
    if size is not None and size != (height, width):
        raise BadInput(
            f"--image-size {size[0]} {size[1]}: {image.takes.source} takes {image.takes}, so images are"
            f" {height} x {width}. Leave --image-size out."
        )
    check_image_size(height, width)
    return PlainProcessor((height, width), pixels)


def check_image_size(height: int, width: int) -> None:
    """Raises: BadInput: no size of images that are prepared here."""
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise BadInput(f"--image-size {height} {width}: possible are 1 to {LARGEST} pixels a side.")


@dataclass(frozen=True)
class PlainProcessor:
    """Resizes the whole image, whatever its shape, and scales its pixels; called as transformers' processors are."""

    size: tuple[int, int]
    """Height and width."""
    pixels: Pixels

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """(images) -> {"pixel_values": (images, channels, height, width)}."""
        from PIL import Image as Pillow

        height, width = self.size
        rows = []
        for image in images:
            values = torch.from_numpy(np.array(image.resize((width, height), Pillow.Resampling.BILINEAR)))
            values = values.unsqueeze(-1) if values.dim() == 2 else values
            values = values.movedim(-1, 0)  # (channels, height, width)
            rows.append(values.flip(0) if self.pixels.bgr else values)
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.pixels.mean, self.pixels.std))
        return {"pixel_values": (torch.stack(rows).to(torch.float32) * self.pixels.scale - mean) / std}


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
