"""A network with the data that it is made smaller by, and what is computed once of both: costs, weights, a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.tokens import merged
from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.rows import Feeds, rows_of
from optin_deploy.files.storage import sha256_json
from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.shapes import shapes_of
from optin_deploy.planning.costs import Costs, costs_of
from optin_deploy.pruning.networks import Found, costs_merging
from optin_deploy.quality.judges import Judge, judge_of
from optin_deploy.quality.outputs import readouts
from optin_deploy.quality.quality import Asked, Quality
from optin_deploy.scoring.hearing import TokenWeights, token_weights
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.labels import DEFAULT_KINDS
from optin_deploy.structure.tokens import TokenStream, token_stream

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ready:
    """A network with the data that it is made smaller by; checked to fit together."""

    found: Found
    rows: Halves
    subject: Subject
    kinds: tuple[str, ...] = DEFAULT_KINDS
    """Kinds of the groups that may be cut."""
    names: tuple[str, ...] | None = None
    """Names of the classes, in their order."""
    strict: bool = False
    """Labels that the network does not know are refused, not left out."""
    metric: Asked | None = None
    """What is measured besides what fits the output."""
    seed: int = 0
    """Seed of random directions."""
    turned: tuple[str, ...] = ()
    """Names of the groups whose widths are turned: they stay from the front."""
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def network(self) -> Network:
        """The network before anything is cut."""
        return self.found.network

    @property
    def layout(self) -> Layout:
        """What can be cut in it."""
        return self.found.layout

    @cached_property
    def sizes(self) -> dict[Axis, int]:
        """Sizes of the free axes for one of the widest calibration rows, for which multiply-accumulates are counted."""
        return sizes_of(self.found, self.rows.calibration)

    @cached_property
    def costs(self) -> Costs:
        """What any plan costs."""
        return costs_of(self.layout, self.sizes)

    def costs_with(self, merges: tuple[int, ...]) -> Costs:
        """What any plan costs that merges so many tokens in each block; what it is compared with merges none.

        Raises: BadInput: they cannot be merged.
        """
        if not any(merges):
            return self.costs
        sizes = partial(sizes_of, rows=self.rows.calibration)
        return self.kept(("costs", merges), lambda: costs_merging(self.found, self.merging(merges), self.costs, sizes))

    def merging(self, merges: tuple[int, ...]) -> Network:
        """The network, with so many tokens merged in each block.

        Raises: BadInput: they cannot be merged.
        """

        def made() -> Network:
            used = {(block, count > 0) for block, count in enumerate(merges) if count}
            known = self.kept("proven merges", list[set[tuple[int, bool]]])
            proven = any(used <= some for some in known)
            network = merged(self.layout, merges, self.found.probes, self.stream, proven=proven)
            known += [] if proven else [used]
            return network

        return self.kept(("network", merges), made)

    @cached_property
    def stream(self) -> TokenStream:
        """Its tokens.

        Raises: BadInput: there are none that can be merged or dropped.
        """
        return token_stream(self.layout)

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """What is made once."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    @cached_property
    def key(self) -> str:
        """Hash of all that scores, curves and repairs depend on beside their own settings."""
        reading = self.subject.reading.facts
        return sha256_json([self.subject.hash, self.rows.calibration.fingerprint, reading, sorted(self.kinds)])

    @cached_property
    def judging_key(self) -> str | None:
        """Hash of all that qualities depend on beside the networks; None: no rows judge."""
        rows = self.rows.held_out
        if rows is None:
            return None
        return sha256_json([rows.key, self.names, self.metric, self.strict])

    @cached_property
    def judge(self) -> Judge:
        """Compares cut networks with this one on rows that nothing learned from.

        Raises: BadInput: no such rows, or labels by which the network is no better than guessing.
        """
        if self.rows.held_out is None:
            raise BadInput("there are no rows that judge: give --eval, or more calibration rows.")
        reading, rows = self.subject.reading, self.rows.held_out
        dense = readouts(self.subject.program, reading, rows)
        return judge_of(dense, reading, rows, names=self.names, metric=self.metric, strict=self.strict)

    def token_weights(self, progress: Progress = silent) -> TokenWeights | None:
        """What each calibration token counts in curves and repairs: the same for every plan, measured once."""
        batches = self.rows.calibration.batches
        make = partial(token_weights, self.subject, batches, seed=self.seed, progress=progress)
        return self.kept("token weights", make)

    def some(self, marks: Tensor, *, weighted: bool = True) -> Ready:
        """The same network with the marked calibration rows, (rows,) of bool.

        Args: weighted: their tokens count what they do among all rows, where it is measured once.
        """
        rows = self.rows.calibration
        part = replace(self, rows=replace(self.rows, calibration=rows.kept(marks.tolist())))
        weights = self.token_weights() if weighted else None
        sizes = [rows_of(batch) for batch in rows.batches]
        part.know_token_weights(None if weights is None else weights.chosen(torch.split(marks, sizes)))
        return part

    def know_token_weights(self, weights: TokenWeights | None) -> None:
        """Take what calibration tokens count from elsewhere."""
        self._kept["token weights"] = weights

    def quality_of(self, smaller: Network) -> Quality:
        """What a cut network is worth on the rows that judge."""
        assert self.rows.held_out is not None, "asked for a judge before"
        return self.judge.compare(readouts(Program(smaller), self.subject.reading, self.rows.held_out))


def sizes_of(found: Found, rows: Feeds) -> dict[Axis, int]:
    """Sizes of all axes for one of the widest rows, where they differ from the probe's: also of what follows from the
    inputs' sizes, such as pictures behind a convolution with a stride."""
    widest, network, one = rows.widest, found.network, takes(found.network).rows or 1
    feeds = {port.name: widest[port.name] for port in network.inputs}
    shapes = shapes_of(network, {name: x if name in rows.shared else x[:one] for name, x in feeds.items()})
    sizes: dict[Axis, int] = {}
    for name, axes in found.layout.structure.axes.items():
        for axis, size in zip(axes, shapes.shape(name) or (), strict=False):
            if axis.kind == "leaf" and axis.size != size:
                sizes.setdefault(axis.root, size)
    return sizes
