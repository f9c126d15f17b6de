"""The sizes of images that a transformers model is exported for: its processor's, those that were asked for, or any."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import torch
from torch import nn

from optin_deploy.data.image_feeds import LARGEST
from optin_deploy.errors import BadInput
from optin_deploy.loading import LoadedModel
from optin_deploy.network.examples import FREE_SIZE, IMAGE_SIZE, SERVED_SIZE, example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.read_torch import FAILURES, prepared
from optin_deploy.network.run import Program

INTERPOLATED = "interpolate_pos_encoding"
"""Argument of transformers' models by which they scale their table of positions to an image."""
TOLERANCE = 1e-4
"""Of the largest value of an output."""


def serve_images(loaded: LoadedModel, size: tuple[int, int] | None, *, any_size: bool) -> None:
    """Note in the config what images the model is exported for, also where it was built for others.

    DINOv2 checkpoints are built for 518 pixels and served at 224; everything is counted and measured as served.

    Args: size: height and width; None: those that its own processor makes, which is set to them otherwise.
    Raises: BadInput: the processor makes others.
    """
    config: Any = loaded.model.config
    if size is not None:
        if not all(1 <= side <= LARGEST for side in size):
            raise BadInput(f"--image-size {size[0]}x{size[1]}: possible are 1 to {LARGEST} pixels a side.")
        _resize(loaded.preprocessor, size)
    height, width = _made_by(loaded)
    if size not in (None, (height, width)):
        raise BadInput(
            f"--image-size {size[0]}x{size[1]}: the model's image processor makes {height} x {width} pixels "
            "all the same. Set the size in its preprocessor_config.json and leave --image-size out."
        )
    built = getattr(config, "image_size", None) or IMAGE_SIZE
    other = [height, width] != (list(built) if isinstance(built, (tuple, list)) else [built, built])
    if other:
        setattr(config, SERVED_SIZE, [height, width])
    if any_size:
        setattr(config, FREE_SIZE, True)
    if (other or any_size) and INTERPOLATED in inspect.signature(loaded.model.forward).parameters:
        loaded.model.register_forward_pre_hook(_interpolated, with_kwargs=True)


def _interpolated(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {INTERPOLATED: True, **kwargs}


def _resize(processor: Any, size: tuple[int, int]) -> None:
    height, width = size
    processor.size = type(processor.size)(height=height, width=width)
    if getattr(processor, "crop_size", None) is not None:
        processor.crop_size = type(processor.crop_size)(height=height, width=width)


def _made_by(loaded: LoadedModel) -> tuple[int, int]:
    """Height and width that the processor makes of an image."""
    from PIL import Image

    grey = getattr(loaded.model.config, "num_channels", 3) == 1
    image = Image.new("L" if grey else "RGB", (60, 40), 100 if grey else (200, 100, 50))
    height, width = loaded.preprocessor(images=[image], return_tensors="pt")["pixel_values"].shape[-2:]
    return int(height), int(width)


def check_any_size(model: Any, network: Network) -> None:
    """Compare the graph with the model on images of other sizes than it was exported with.

    Raises: BadInput: it says something else, as it holds what was computed from one size.
    """
    example = example_of(model).inputs["pixel_values"]
    height, width = example.shape[2], example.shape[3] // 2
    for tall, wide in product((height, 2 * height), (width, 3 * width)):
        images = torch.randn(2, example.shape[1], tall, wide, generator=torch.Generator().manual_seed(0))
        try:
            with prepared(model), torch.no_grad():
                wanted, found = model(pixel_values=images), Program(network)({"pixel_values": images}).outputs
            same = all(_near(value, wanted[name]) for name, value in found.items())
        except (BadInput, *FAILURES):
            same = False
        if not same:
            raise BadInput(
                f"--any-size: the graph of {type(model).__name__} holds for {height} x {2 * width} pixels and not for "
                f"images of {tall} x {wide}. Leave --any-size out, and say by --image-size what it is served with."
            )


def _near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
