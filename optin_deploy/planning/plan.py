"""The plan of a network: which units of each group stay, what that costs, and the network it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optin_deploy.common.stored import Stored
from optin_deploy.common.validation import STORED, holds
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.network.axes import Axis, size
from optin_deploy.network.hashing import network_hash
from optin_deploy.planning.costs import Costs, costs_of
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.keep import checked
from optin_deploy.structure.tokens import token_stream


@dataclass(frozen=True)
class PlanCost:
    """What a network costs before and after, at the sizes of inputs that are named."""

    __pydantic_config__ = STORED

    macs_dense: int
    macs_pruned: int
    weights_dense: int
    """Entries of stored tensors that the network reads."""
    weights_pruned: int
    """More than before where a weight that many nodes share is cut by some of them, and little else goes."""
    bytes_dense: int
    """Bytes of these tensors, in the types in which they are stored."""
    bytes_pruned: int
    inputs: Mapping[str, tuple[int, ...]]
    """Shapes of the inputs at which multiply-accumulates are counted."""

    def __post_init__(self) -> None:
        counts = (self.weights_dense, self.weights_pruned, self.bytes_dense, self.bytes_pruned)
        if not 0 <= self.macs_pruned <= self.macs_dense or min(counts) < 0:
            raise BadInput("a cut network costs more than the dense one, or less than nothing")


@dataclass(frozen=True)
class Origin:
    """Which scores ranked the units, and which curves and latency table the widths follow."""

    __pydantic_config__ = STORED

    scores: str
    """How they were made, such as magnitude."""
    scores_hash: str
    """`hash_of` all scores by name of group."""
    curves_hash: str | None = None
    """Hash of the error curves; None means that they were not needed."""
    latency_hash: str | None = None
    """Hash of the latency table; None means that no time was asked for."""


def describe_merges(merges: Sequence[int], *, of_text: bool) -> str:
    """Say how many tokens go, and where; where both happen, dropped ones have a minus.

    Args: of_text: the numbers are percents.
    """
    both = min(merges) < 0 < max(merges)
    how = "merged or dropped (-)" if both else "dropped" if min(merges) < 0 else "merged"
    counts = ", ".join(str(count if both else abs(count)) for count in merges)
    some = "% of the tokens" if of_text else " tokens"
    return f"{sum(map(abs, merges))}{some} are {how}, behind the attention of the blocks: {counts}"


@dataclass(frozen=True)
class NetworkPlan(Stored):
    """What stays of a network."""

    schema_version = 2
    older = (None,)
    what = "the plan of a network"
    hint = (
        "Write it with `optin plan FILE.onnx --magnitude --flops 0.7 --out PLAN.json`, or by hand as "
        '{"schema_version": 2, "keep": {"NAME OF A GROUP": [0, 1, 2]}} with names that `optin inspect` prints.'
    )

    keep: Mapping[str, tuple[int, ...]]
    """Kept units by name of group; a group that is not named stays whole."""
    network: str | None = None
    """`network.hashing.network_hash` of what it was made for; None: made by hand, for whatever has these groups."""
    cost: PlanCost | None = None
    origin: Origin | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was made."""
    merges: tuple[int, ...] = ()
    """Tokens that are merged behind the attention of each block, or, where negative, dropped; empty: none."""
    of_text: bool = False
    """Whether merges are percents of the tokens, because a text has any number of them."""

    def check(self, layout: Layout) -> None:
        """Make sure that the plan fits a network.

        Raises: PlanMismatch: it was made for another one. BadInput: it names groups or units that are not there, or
            tokens that cannot go.
        """
        if self.network is not None:
            found = network_hash(layout.structure.network)
            if found != self.network:
                raise PlanMismatch(
                    f"the plan was made for the network {self.network[:12]}, but {layout.structure.network.source} is "
                    f"{found[:12]}: its operators or weights are others. Make a plan for this one with `optin plan`."
                )
        checked(layout, self.keep)
        if any(self.merges) and self.of_text != token_stream(layout).of_text:
            raise BadInput(
                f"the plan's merges are {'percents' if self.of_text else 'numbers'} of tokens (of_text is "
                f"{self.of_text}), and {layout.structure.network.source} needs the other. Make a plan for it with "
                "`optin plan`."
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; without merges there are none in it, as before there could be any."""
        found = {**asdict(self), "schema_version": self.schema_version}
        if not any(self.merges):
            del found["merges"]
        if not self.of_text:
            del found["of_text"]
        return found

    @classmethod
    def readable(cls, data: Mapping[str, Any]) -> tuple[int | None, ...]:
        """Versions that can be read; made by hand, a plan of version 1 means what it always did."""
        by_hand = data.get("network") is None and data.get("cost") is None
        return (1, *super().readable(data)) if by_hand else super().readable(data)


def is_plan(path: Path) -> bool:
    """Is this file the plan of a network?"""
    return holds(path, "schema_version", "keep", "network", "cost")


def plan_of(
    layout: Layout,
    keep: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    *,
    sizes: Mapping[Axis, int] | None = None,
    merges: Sequence[int] = (),
    costs: Costs | None = None,
) -> NetworkPlan:
    """Make the plan that keeps these units.

    Args:
        sizes: of axes of the inputs, at which multiply-accumulates are counted; None: those of the probe.
        merges: see `NetworkPlan`. costs: of plans that merge so many; None: of plans without.
    Raises: BadInput: a group or unit is not there.
    """
    checked(layout, keep)
    units = {name: tuple(sorted(kept)) for name, kept in keep.items()}
    cost = plan_cost(layout, costs or costs_of(layout, sizes), units, sizes)
    made_for = network_hash(layout.structure.network)
    of_text = any(merges) and token_stream(layout).of_text
    return NetworkPlan(units, made_for, cost, origin, dict(settings or {}), tuple(merges), of_text)


def plan_cost(
    layout: Layout, costs: Costs, keep: Mapping[str, Sequence[int]], sizes: Mapping[Axis, int] | None = None
) -> PlanCost:
    """Count what a network costs before and after.

    Args: costs: of any plan for the layout. sizes: at which they count; see `plan_of`.
    """
    structure, widths = layout.structure, costs.widths(keep)
    inputs = {
        port.name: tuple(size(axis, sizes or {}) for axis in structure.axes.get(port.name, ()))
        for port in structure.network.inputs
    }
    return PlanCost(
        *(costs.macs.dense, costs.macs.total(widths)),
        *(costs.params.dense, costs.params.total(widths)),
        *(costs.size.dense, costs.size.total(widths)),
        inputs,
    )
