"""What any network with fewer tokens must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program


def check_fewer(network: Network, smaller: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Outputs are numbers of the same names and sizes, but not all the same."""
    for feeds in probes:
        dense, found = Program(network)(feeds).outputs, Program(smaller)(feeds).outputs
        assert {name: value.shape for name, value in dense.items()} == {n: v.shape for n, v in found.items()}
        assert all(value.isfinite().all() for value in found.values())
        assert max(float((found[name] - value).abs().max()) for name, value in dense.items()) > 0
