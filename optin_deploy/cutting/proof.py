"""Prove a cut: in float64, on two probes, the smaller network gives what the masked one gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from optin_deploy.cutting.masks import masks
from optin_deploy.errors import OWN_FAULT, BadInput, OptinError
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.structure.groups import Layout

ENTRY_BYTES = 8
TOLERANCE = 1e-9
"""Largest allowed difference in float64, as a part of the largest output."""


class NotProven(OptinError):
    """A cut network does not give what the masked one gives."""

    exit_code = OWN_FAULT


@dataclass(frozen=True)
class Proof:
    """How far a cut network is from the masked and from the dense one: largest differences of any output."""

    masked: float
    """Difference as a part of the largest masked output, which counts as at least 1; the worst of all probes."""
    dense: float
    """The same for the masked and the dense outputs; 0 where a plan removes nothing that counts."""


def prove(
    layout: Layout, keep: Mapping[str, Sequence[int]], smaller: Network, probes: Sequence[Mapping[str, Tensor]]
) -> Proof:
    """Compare a cut network with the masked one.

    Raises: NotProven: they differ by more than TOLERANCE. BadInput: the network itself gives no numbers, or takes more
        memory than is free.
    """
    _check_room(layout)
    dense, less = (Program(network, dtype=torch.float64) for network in (layout.structure.network, smaller))
    places = {place: mask.double() for place, mask in masks(layout, keep).items()}
    worst = [0.0, 0.0]
    with torch.no_grad():
        for feeds in probes:
            masked, cut, whole = dense(feeds, masks=places).outputs, less(feeds).outputs, dense(feeds).outputs
            _check_numbers(layout.structure.network, masked)
            for n, other in enumerate((cut, whole)):
                worst[n] = max(worst[n], *(difference(other[name], value) for name, value in masked.items()))
    if not worst[0] <= TOLERANCE:
        raise NotProven(
            f"the cut network differs from the masked one by {worst[0]:.1e} of the largest output "
            f"(at most {TOLERANCE:.0e} is rounding), so it is not written. "
            "This is a fault of ours: please report it, with the plan."
        )
    return Proof(*worst)


def _check_room(layout: Layout) -> None:
    """Raises: BadInput: one value alone takes more memory than is free."""
    tensors = layout.structure.shapes.tensors
    name, entries = max(((name, tensor.numel()) for name, tensor in tensors.items()), key=lambda each: each[1])
    free_bytes = psutil.virtual_memory().available
    if ENTRY_BYTES * entries > free_bytes:
        raise BadInput(
            f"the value {name[:80]!r} has {entries} entries: {ENTRY_BYTES * entries / 2**30:.1f} GiB in float64, but "
            f"{free_bytes / 2**30:.1f} GiB are free, so that a cut cannot be proven. Give smaller inputs."
        )


def _check_numbers(network: Network, outputs: Mapping[str, Tensor]) -> None:
    """Raises: BadInput: an output is no number."""
    for name, value in outputs.items():
        if value.isnan().any():
            raise BadInput(
                f"{network.source}: output {name[:80]!r} is not a number (NaN) for random inputs, so that a cut cannot "
                "be proven. Are weights damaged, or does the network take other inputs?"
            )


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a part of the largest entry of the second, at least 1; infinite if shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    apart = (one.double() - other.double()).abs().nan_to_num(float("inf"), float("inf"), float("inf"))
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(apart), apart)
    return float(apart.max() / other.double().abs().nan_to_num(0, 0, 0).max().clamp(min=1))
