"""The sizes of images that a transformers model is exported for: its processor's, those that were asked for, or any."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optin_deploy.checkpoint.loading import LoadedModel
from optin_deploy.errors import BadInput
from optin_deploy.feeds.image_feeds import check_image_size
from optin_deploy.network.examples import FREE_SIZE, SERVED_SIZE, built_for, example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.normal import reason
from optin_deploy.network.read_torch import FAILURES, prepared
from optin_deploy.network.run import Program
from optin_deploy.scoring.memory import free_bytes

TOLERANCE = 1e-4
"""Largest allowed difference, as a part of the largest value of an output."""


def serve_images(loaded: LoadedModel, size: tuple[int, int] | None, *, any_size: bool) -> None:
    """Note in the config what images the model is exported for, also where it was built for others.

    DINOv2 checkpoints are built for 518 pixels and served at 224; everything is counted and measured as served.

    Args: size: height and width; None: those that its own processor makes, which is set to them otherwise.
    Raises: BadInput: the processor makes others.
    """
    config: Any = loaded.model.config
    made = _made_by(loaded)
    if size is not None and size != made:
        _set_to(loaded, size)
        made = size
    if made != built_for(config):
        setattr(config, SERVED_SIZE, list(made))
    if any_size:
        setattr(config, FREE_SIZE, True)


def _set_to(loaded: LoadedModel, size: tuple[int, int]) -> None:
    """Raises: BadInput: its processor cannot make images of this size."""
    check_image_size(*size)
    try:
        _resize(loaded.preprocessor, size)
        height, width = _made_by(loaded)
        why = "" if (height, width) == size else f"{height} x {width} pixels all the same"
    except FAILURES as err:
        why = reason(err)
    if why:
        raise BadInput(
            f"--image-size {size[0]}x{size[1]}: {type(loaded.preprocessor).__name__} cannot be set to it ({why}). Set "
            "the size in the model's preprocessor_config.json, and leave --image-size out."
        )


def check_room(model: Any, size: tuple[int, int]) -> None:
    """Try a model on two images of this size without computing anything.

    Raises: BadInput: a value of them, beside what it is made of, takes more than what is free.
    """
    largest = _Largest()  # type: ignore[no-untyped-call]
    refused = suppress(*FAILURES)  # which is told when it is tried
    with refused, prepared(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), largest:
        model(**example_of(model).inputs)
    free = free_bytes(torch.device("cpu"))
    if 2 * largest.bytes > free:
        raise BadInput(
            f"--image-size {size[0]}x{size[1]}: two images take {2 * largest.bytes / 2**30:,.1f} GiB or more inside of "
            f"the model, and {free / 2**30:,.1f} GiB are free. Give a smaller size."
        )


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() * each.element_size() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return made


def _resize(processor: Any, size: tuple[int, int]) -> None:
    """Let a processor make images of this size: by the same crop, or by the same scaling."""
    height, width = size
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    kind, edge = type(processor.size), processor.size.get("shortest_edge")
    if crop is not None:
        ratio = max(height / crop["height"], width / crop["width"])
        processor.crop_size = type(crop)(height=height, width=width)
        if edge:
            processor.size = kind(shortest_edge=round(edge * ratio))
        else:
            processor.size = kind(
                height=round(processor.size["height"] * height / crop["height"]),
                width=round(processor.size["width"] * width / crop["width"]),
            )
    elif edge and height == width:
        processor.size = kind(shortest_edge=height)
        if _made(processor, grey=False) != size:  # it keeps the shape of images
            processor.size = kind(height=height, width=width)
    else:
        processor.size = kind(height=height, width=width)


def _made_by(loaded: LoadedModel) -> tuple[int, int]:
    return _made(loaded.preprocessor, grey=getattr(loaded.model.config, "num_channels", 3) == 1)


def _made(processor: Any, *, grey: bool) -> tuple[int, int]:
    """Height and width that a processor makes of an image."""
    from PIL import Image

    image = Image.new("L" if grey else "RGB", (60, 40), 100 if grey else (200, 100, 50))
    height, width = processor(images=[image], return_tensors="pt")["pixel_values"].shape[-2:]
    return int(height), int(width)


def check_any_size(model: Any, network: Network) -> None:
    """Compare the graph with the model on images of other sizes than it was exported with.

    Sizes that nothing divides are among them: models that fill up their images do other things there. Sizes that the
    model itself refuses do not count.
    Raises: BadInput: the graph says something else, as it holds what was computed from one size.
    """
    example = example_of(model).inputs["pixel_values"]
    height, width = example.shape[2], example.shape[3] // 2
    odd = (height + height // 4 + 1, width + width // 2 + 3)
    for tall, wide in ((height, width), (2 * height, width), (height, 3 * width), odd):
        images = torch.randn(2, example.shape[1], tall, wide, generator=torch.Generator().manual_seed(0))
        with prepared(model), torch.no_grad():
            try:
                wanted = model(pixel_values=images)
            except FAILURES:
                continue
            try:
                found = Program(network)({"pixel_values": images}).outputs
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
