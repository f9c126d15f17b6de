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
    """Compare all outputs in float64.

    Args: why: what was changed, and what a difference would mean.
    Raises: BadInput: they differ, or the changed network cannot be run.
    """
    one, other = (Program(each, dtype=torch.float64) for each in (network, changed))
    worst = [0.0]
    with torch.no_grad():
        for feeds in probes:
            wanted, found = one(feeds).outputs, _run(network, other, feeds)
            worst += [difference(found[name], value) for name, value in wanted.items()]
    if not np.max(worst) <= TOLERANCE:  # a NaN is the largest
        raise BadInput(
            f"{network.source}: outputs change by {np.max(worst):.1e} of the largest one when {why}; so tokens cannot "
            "be merged or dropped. Leave out --tokens."
        )


def check_runs(network: Network, result: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Run both.

    Raises: BadInput: the changed one cannot be run, or gives outputs of other sizes.
    """
    one, other = Program(network), Program(result)
    with torch.no_grad():
        for feeds in probes:
            found = _run(network, other, feeds)
            for name, value in one(feeds).outputs.items():
                if found[name].shape != value.shape:
                    raise BadInput(
                        f"{network.source}: with fewer tokens the output {name!r} is {tuple(found[name].shape)}, not "
                        f"{tuple(value.shape)}. Leave out --tokens."
                    )


def _run(network: Network, changed: Program, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return changed(feeds).outputs
    except (BadInput, LookupError) as err:
        raise BadInput(f"{network.source}: tokens cannot be merged or dropped: {err} Leave out --tokens.") from err
