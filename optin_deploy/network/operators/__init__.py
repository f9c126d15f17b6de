"""Operators by family, one file each; `rows` finds the one of a node."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from optin_deploy.network.operators.row import Row

FAMILIES = (
    "elementwise",
    "products",
    "shapes",
    "selections",
    "reductions",
    "normalizations",
    "spatial",
    "pools",
    "resizing",
    "detection",
    "attention",
    "attention_runtime",
    "attention_grouped",
    "rotations",
    "fused",
    "quantized",
    "quantized_products",
    "quantized_units",
    "packed",
    "control",
    "recurrent",
)
"""Files of this folder with a tuple `ROWS`."""


@cache
def rows() -> dict[tuple[str, str], Row]:
    """Return every row by domain and name."""
    found: dict[tuple[str, str], Row] = {}
    for family in FAMILIES:
        for row in import_module(f"{__name__}.{family}").ROWS:
            if found.setdefault((row.domain, row.name), row) is not row:
                raise AssertionError(f"two rows for {row.domain or 'onnx'}.{row.name}")
    return found
