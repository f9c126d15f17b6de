"""Positions in images of other sizes than a model was built for: its table is scaled where transformers can do that."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from optin_deploy.network.examples import FREE_SIZE, built_for

ARGUMENT = "interpolate_pos_encoding"
"""Argument of the forward of such a model; without it other image sizes are refused."""


def scale_positions(model: Any) -> None:
    """Let a model scale its table of positions to images of other sizes, and only to these."""
    if ARGUMENT in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_scaled, with_kwargs=True)


def _scaled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config: Any = model.config
    images = kwargs.get("pixel_values", args[0] if args else None)
    if images is None or not (getattr(config, FREE_SIZE, False) or tuple(images.shape[2:4]) != built_for(config)):
        return args, kwargs
    return args, {ARGUMENT: True, **kwargs}
