"""fp32, tf32, fp16, bf16: data type, matrix-product mode, and how far an output may be off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optin_deploy.exporters.precisions import DTYPES, TOLERANCES

LIMITS = {name: TOLERANCES[name] for name in DTYPES}
"""Largest allowed max |a - b| / max(1, max |a|) against eager fp32 of the same weights."""


@contextmanager
def matmul_mode(precision: str) -> Iterator[None]:
    """TF32 on for `tf32` and off for all others, in matrix products and convolutions; restored after.

    The older of torch's two interfaces, for both: reading one after writing the other raises an error.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allowed = precision == "tf32"
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed  # on by default: it would round ViT's patch embedding in fp32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def cast(model: nn.Module, precision: str) -> nn.Module:
    """A copy of the model in this precision's data type; the input is untouched."""
    return copy.deepcopy(model).to(DTYPES[precision])


def cast_inputs(inputs: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Inputs with floating-point ones (pixels) in this precision's data type."""
    return {k: v.to(DTYPES[precision]) if v.is_floating_point() else v for k, v in inputs.items()}


def parity_error(expected: Tensor, found: Tensor) -> float:
    """max |expected - found| / max(1, max |expected|), infinite where either holds no number or the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    difference = (expected.float() - found.float()).abs().max()
    error = float(difference / expected.float().abs().max().clamp(min=1))
    return error if error == error else float("inf")
