"""Backward passes through a network span by span: the graph of one span is kept at a time, not that of the network.

The network runs once without a graph, and what is live between two spans is kept. Then spans run again, the last one
first, with a graph and a multiplier of ones at every site; all passes hand their gradients down through it. That costs
one forward more, and takes the memory of one span.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.run import Cone
from optin_deploy.network.spans import Spans
from optin_deploy.scoring.sites import Key, MaskSite, masks_of
from optin_deploy.scoring.subject import Subject

Gradients = dict[str, Tensor]
"""Gradients by name of value."""


@dataclass(frozen=True)
class Span:
    """Some nodes in a row of the order of work."""

    cone: Cone
    gives: tuple[str, ...]
    """Values that it makes and later ones, or whoever asked, read."""
    sites: tuple[MaskSite, ...]


def spans_of(subject: Subject, wanted: Collection[str], sites: Iterable[MaskSite]) -> list[Span]:
    """Divide a network behind each of its features, where the least is live.

    Args: wanted: values that are read beside what leads from one span to the next. sites: where gradients are wanted.
    """
    network, sites = subject.structure.network, {site.key: site for site in sites}.values()
    spans, last = Spans(network), len(network.nodes)
    bounds = [0, *sorted({feature.node + 1 for feature in subject.features} - {last}), last]
    found = []
    for start, stop in pairwise(bounds):
        read = {*spans.live(stop), *wanted}
        gives = tuple(name for node in network.nodes[start:stop] for name in node.outputs if name in read)
        here = tuple(site for site in sites if start <= site.place[0] < stop)
        found.append(Span(spans.cone(start, gives), gives, here))
    return found


@dataclass(frozen=True, eq=False)
class Passes:
    """One batch in a network, ready for backward passes."""

    subject: Subject
    spans: Sequence[Span]
    samples: int
    kept: Mapping[str, Tensor]
    """What leads from one span to the next, and what was wanted of the run."""
    seconds: float
    """Seconds of the forward."""

    @classmethod
    def make(cls, subject: Subject, batch: Batch, spans: Sequence[Span]) -> Passes:
        """Run a batch without a graph."""
        kept, started = subject.fed(batch), time.perf_counter()
        for span in spans:
            feeds = {name: kept[name] for name in span.cone.needs}
            kept |= subject.program(feeds, watch=span.gives, cone=span.cone).watched
        return cls(subject, spans, rows_of(batch), kept, time.perf_counter() - started)

    def down(
        self, passes: Sequence[Gradients], joining: Callable[[str, Tensor], Sequence[Tensor]]
    ) -> list[dict[Key, Tensor]]:
        """Gradients of the multipliers, (samples, entries of the axis), one dict a pass.

        Args:
            passes: of each, gradients at values that the network puts out.
            joining: gradients that the first passes have at a value, by its name, beside what comes down to it.
        """
        left: list[Gradients] = [dict(each) for each in passes]
        found: list[dict[Key, Tensor]] = [{} for _ in passes]
        for span in reversed(self.spans):
            device = self.subject.program.device
            ones = {
                site: torch.ones(self.samples, len(site.units), device=device, requires_grad=True)
                for site in span.sites
            }
            starts = {name: _leaf(self.kept[name]) for name in span.cone.needs}
            with torch.enable_grad():
                run = self.subject.program(starts, masks=masks_of(ones.items()), watch=span.gives, cone=span.cone)
            below = {name: value for name, value in starts.items() if value.requires_grad}
            joined = {name: joining(name, value.detach()) for name, value in run.watched.items()}
            for number, gradients in enumerate(left):
                roots = {
                    name: [*joined[name][number : number + 1], *([gradients.pop(name)] if name in gradients else [])]
                    for name in run.watched
                }
                live = {name: some for name, some in roots.items() if some and run.watched[name].requires_grad}
                if not live or not (ones or below):
                    continue
                back = torch.autograd.grad(
                    [run.watched[name] for name in live],
                    [*ones.values(), *below.values()],
                    [torch.stack(some).sum(0).to(run.watched[name].dtype) for name, some in live.items()],
                    retain_graph=number + 1 < len(left),
                    allow_unused=True,
                )
                found[number] |= {site.key: each for site, each in zip(ones, back, strict=False) if each is not None}
                for name, each in zip(below, back[len(ones) :], strict=True):
                    if each is not None:
                        gradients[name] = each + gradients[name] if name in gradients else each
        return found


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
