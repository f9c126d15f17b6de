"""Example inputs of transformers models: what their forward takes, in sizes that their config allows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optin_deploy.errors import BadInput

BATCH, LENGTH, DECODER_LENGTH, SAMPLES = 2, 13, 11, 4000
"""Sizes of an example; none is 1, which torch would take for a constant."""
IDS = 1000
"""Ids of an example are below this."""
IMAGE_SIZE, CHANNELS = 224, 3
"""Image size and channels if the config does not tell."""
SERVED_SIZE = "inference_image_size"
"""Our entry in a config: height and width of the images that the model is served with."""
FREE_SIZE = "inference_any_image_size"
"""Our entry in a config: height and width of images stay free."""


@dataclass(frozen=True)
class Example:
    """Inputs to trace a model with."""

    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    """Axes that may have any size, by input."""


def example_of(model: Any) -> Example:
    """Make inputs for a transformers model.

    Raises: BadInput: it takes something that is not known here; the caller gives inputs.
    """
    takes = inspect.signature(model.forward).parameters
    wanted = [name for name in _wanted(model) if name in takes]
    unknown = [name for name in wanted if name not in _ROWS]
    give = "give example inputs by name, as in `read_module(model, {'name': tensor})`."
    if unknown or not wanted:
        raise BadInput(f"{type(model).__name__} takes {', '.join(unknown or takes)}: {give}")
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        made = {name: _ROWS[name].make(model) for name in wanted}
    except AttributeError as err:  # each kind of config has entries of its own
        raise BadInput(f"no {', '.join(wanted)} for {type(model).__name__} can be made up ({err}): {give}") from err
    inputs = {
        name: values.to(weight.device, weight.dtype if values.is_floating_point() else None)
        for name, values in made.items()
    }
    axes = {name: _ROWS[name].axes for name in wanted}
    if "input_values" in axes and _of_spectra(model):
        axes["input_values"] = {0: "batch"}
    if "pixel_values" in axes and getattr(model.config, FREE_SIZE, False):
        images = inputs["pixel_values"]  # not square: else exporters take height and width for one
        inputs["pixel_values"] = torch.cat((images, images.flip(-1)), -1)
        axes["pixel_values"] = {**axes["pixel_values"], 2: "height", 3: "width"}
    return Example(inputs, axes)


def _wanted(model: Any) -> list[str]:
    config, main = model.config, model.main_input_name
    modalities = model.input_modalities
    names = [main] if isinstance(main, str) else list(main)
    several = [modalities] if isinstance(modalities, str) else list(modalities)
    names += ["pixel_values"] * ("image" in several) + ["input_ids"] * ("text" in several and "pixel_values" in names)
    if "input_ids" in names:
        names.append("attention_mask")
        names += ["token_type_ids"] * (getattr(config, "type_vocab_size", 0) > 1)
    names += ["decoder_input_ids"] * bool(getattr(config, "is_encoder_decoder", False))
    return list(dict.fromkeys(names))


def _entry(config: Any, name: str, default: Any) -> Any:
    """An entry of a config, or of the one inside it that speaks of images."""
    for part in (config, *(getattr(config, inner, None) for inner in ("vision_config", "backbone_config"))):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return default


def _ids(model: Any, length: int) -> Tensor:
    """Random ids that mean nothing special, so that no row ends early."""
    config = model.config.get_text_config()
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    known = getattr(config, "vocab_size", IDS)  # none where characters are hashed
    plain = [number for number in range(min(known, IDS)) if number not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(plain)[torch.randint(len(plain), (BATCH, length), generator=generator)]


def built_for(config: Any) -> tuple[int, int]:
    """Height and width of the images that a model was built for, by its config."""
    size = _entry(config, "image_size", IMAGE_SIZE)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _image(model: Any) -> Tensor:
    """An image, or as many as a model of videos takes."""
    height, width = getattr(model.config, SERVED_SIZE, None) or built_for(model.config)
    frames = getattr(model.config, "num_frames", None)
    return _normal(BATCH, *([frames] if frames else []), _entry(model.config, "num_channels", CHANNELS), height, width)


def _sound(model: Any) -> Tensor:
    """A wave, or a spectrum of the frames that the table of positions holds."""
    config = model.config
    return _normal(BATCH, config.max_length, config.num_mel_bins) if _of_spectra(model) else _normal(BATCH, SAMPLES)


def _of_spectra(model: Any) -> bool:
    """Do the input_values of a model have a size of their own, as patches of spectra?"""
    return hasattr(model.config, "patch_size")


def _features(model: Any) -> Tensor:
    """A spectrum: two frames become one position."""
    return _normal(BATCH, model.config.num_mel_bins, 2 * model.config.max_source_positions)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Row:
    make: Callable[[Any], Tensor]
    axes: Mapping[int, str]


_TEXT = {0: "batch", 1: "length"}
_ROWS: Mapping[str, _Row] = {
    "input_ids": _Row(lambda model: _ids(model, LENGTH), _TEXT),
    "attention_mask": _Row(lambda _: torch.ones(BATCH, LENGTH, dtype=torch.int64), _TEXT),
    "token_type_ids": _Row(lambda _: torch.zeros(BATCH, LENGTH, dtype=torch.int64), _TEXT),
    "decoder_input_ids": _Row(lambda model: _ids(model, DECODER_LENGTH), {0: "batch", 1: "decoder_length"}),
    "pixel_values": _Row(_image, {0: "batch"}),
    "input_features": _Row(_features, {0: "batch"}),
    "input_values": _Row(_sound, {0: "batch", 1: "samples"}),
}
"""Inputs of transformers models; a new kind is a row."""
