"""Prove that a changed network gives what the given one gives, or at least runs as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from optin_deploy.cutting.proof import TOLERANCE, difference
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program


def prove_same(network: Network, changed: Network, probes: Sequence[Mapping[str, Tensor]], why: str) -> None:
    """Compare them.

    Raises: BadInput: outputs differ in float64; `why` ends the sentence that says how much."""
    worst = _furthest(network, changed, probes)
    if not worst <= TOLERANCE:
        raise BadInput(
            f"{network.source}: outputs change by {worst:.1e} of the largest one when {why}, and tokens cannot be "
            "merged or dropped. Leave out --tokens."
        )


def _furthest(network: Network, changed: Network, probes: Sequence[Mapping[str, Tensor]]) -> float:
    """The largest difference of any output in float64, as a part of the largest one."""
    one, other = (Program(each, dtype=torch.float64) for each in (network, changed))
    worst = [0.0]
    with torch.no_grad():
        for feeds in probes:
            wanted, found = one(feeds).outputs, other(feeds).outputs
            worst += [difference(found[name], value) for name, value in wanted.items()]
    return float(np.max(worst))  # a NaN is the largest


def check_runs(network: Network, result: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Run both.

    Raises: BadInput: the changed one cannot be run, or gives outputs of other sizes.
    """
    one, other = Program(network), Program(result)
    with torch.no_grad():
        for feeds in probes:
            try:
                found = other(feeds).outputs
            except (BadInput, LookupError) as err:
                raise BadInput(
                    f"{network.source}: tokens cannot be merged or dropped: {err} Leave out --tokens."
                ) from err
            for name, value in one(feeds).outputs.items():
                if found[name].shape != value.shape:
                    raise BadInput(
                        f"{network.source}: with fewer tokens the output {name!r} is {tuple(found[name].shape)}, not "
                        f"{tuple(value.shape)}. Leave out --tokens."
                    )
