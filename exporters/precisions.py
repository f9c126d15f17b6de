"""Types of weights and activations, and how far an engine may be off in each; needs torch alone."""

from __future__ import annotations

import torch

TOLERANCES = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 6e-2, "int8": 0.5}
"""Engine against our own float32 run, largest error over largest output. Fused kernels sum in another order; the
16-bit types round each product to 11 and 8 bits. int8 is a loss to be judged by quality: its limit, on the mean square
error over real samples, only finds nonsense."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Type of weights and activations by precision; int8 is made from the fp32 graph."""
