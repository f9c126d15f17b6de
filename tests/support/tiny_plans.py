"""What tests of planning share: small networks of the zoo with their costs, and error curves with a few bends."""

from __future__ import annotations

from functools import cache

import numpy as np

from benchmarks.zoo.export import export
from optin_deploy.network.read_onnx import read_file
from optin_deploy.planning.costs import Costs, costs_of
from optin_deploy.planning.curve import Curve
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout


@cache
def layout_of(family: str) -> Layout:
    """As TorchScript exports it."""
    return find(read_file(export(family, "torchscript").path))


@cache
def costs_in(family: str) -> Costs:
    """What its plans cost."""
    return costs_of(layout_of(family))


def falling(units: int, rng: np.random.Generator) -> Curve:
    """Errors of a group at up to three widths, between none and all."""
    inner = sorted(rng.choice(np.arange(1, units), size=min(3, units - 1), replace=False).tolist()) if units > 1 else []
    errors = np.sort(rng.random(len(inner) + 1))[::-1].tolist()
    return Curve((0, *inner, units), (*errors, 0.0), tuple(rng.permutation(units).tolist()))
