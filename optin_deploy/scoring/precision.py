"""The type in which passes multiply: a faster one than the network's own, if the hardware multiplies it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features, on x86 and on ARM; without one, bfloat16 is emulated and slower."""


def pass_dtype(hidden: Tensor) -> torch.dtype:
    """What passes over values of this kind multiply in; only dtype and device are looked at."""
    if hidden.dtype != torch.float32:
        return hidden.dtype
    if hidden.is_cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Not in every torch that we run with.
        able: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(able.get(name, False) for name in BFLOAT16_PRODUCTS)
    return torch.bfloat16 if fast else torch.float32
