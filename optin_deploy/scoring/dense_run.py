"""What a batch gives in the dense network, which all comparisons start from; NaN and infinity are refused."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.errors import NonFiniteActivation
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.run import Values
from optin_deploy.scoring.features import Tokens, draw_tokens
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.settings import Features
from optin_deploy.scoring.subject import Subject, read_tokens, tokens_of, valid_of
from optin_deploy.structure.stream import Feature

MOST_TOKENS = 512
"""Pictures of more places are compared by so many, drawn for each sample."""


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """What a batch gives in the dense network: what all comparisons start from."""

    values: Values
    tokens: Mapping[str, Tokens]
    """Compared tokens by value of the features."""
    readout: Readout
    valid: Tensor | None
    """(samples, tokens), 0 or 1, of texts."""
    seconds: float
    """Seconds of the forward."""

    def gram(self, feature: Feature, value: Tensor, times: int = 1) -> Tensor:
        """The Gram matrices of a feature in a run of these samples, each so many times."""
        tokens = self.tokens[feature.value]
        return tokens.gram(tokens_of(feature, value, times * tokens.batch))


def dense_run(
    subject: Subject,
    batch: Batch,
    chosen: Features,
    seed: int,
    *,
    watch: Collection[str] = (),
) -> DenseBatch:
    """Run a batch and keep these values, and those of the features.

    Raises: NonFiniteActivation: the network puts out NaN or infinity.
    """
    assert chosen.site == subject.compared, "the subject says which values are compared"
    started = _now(subject)
    values = subject.run(batch, watch={*watch, *(feature.value for feature in subject.features)})
    seconds = _now(subject) - started
    watched = values.watched
    tokens = {f.value: chosen_tokens(subject, f, watched[f.value], batch, chosen, seed) for f in subject.features}
    readout = subject.read(values.outputs, read_tokens(batch))
    check_finite(subject, batch, [readout.values])
    return DenseBatch(values, tokens, readout, valid_of(batch), seconds)


def check_finite(subject: Subject, batch: Batch, values: Sequence[Tensor]) -> None:
    """Refuse NaN and infinity in what this batch gave.

    Raises: NonFiniteActivation: names the first operator that puts one out.
    """
    if all(bool(torch.isfinite(value).all()) for value in values):
        return
    network = subject.structure.network
    nodes = network.nodes
    names = [name for node in nodes for name in node.outputs if name]
    watched = subject.run(batch, watch=names).watched
    first = next(
        (
            _described(node, network)
            for node in nodes
            for name in node.outputs
            if name in watched and watched[name].is_floating_point() and not bool(torch.isfinite(watched[name]).all())
        ),
        "a layer",
    )
    raise NonFiniteActivation(
        f"{first} put out NaN or infinity on the calibration data. Check the weights and the data; a network stored "
        "in half precision may overflow: export it in float32."
    )


def _described(node: Node, network: Network) -> str:
    """An operator with the weights that it reads, by whose names people know the layer."""
    weights = [name for name in node.inputs if name in network.weights]
    return f"{node}, which reads {', '.join(weights)}," if weights else str(node)


def chosen_tokens(
    subject: Subject, feature: Feature, value: Tensor, batch: Batch, chosen: Features, seed: int
) -> Tokens:
    """Which tokens of a feature are compared."""
    flat = tokens_of(feature, value, rows_of(batch))
    valid = subject.real(batch, feature.value, feature.channels)
    if valid is None or valid.shape != flat.shape[:2]:
        valid = torch.ones(flat.shape[:2])
        if chosen.tokens is None and flat.shape[1] > MOST_TOKENS:
            chosen = Features(chosen.site, MOST_TOKENS, chosen.across)
    return draw_tokens(chosen, batch, valid.to(value.device, torch.promote_types(value.dtype, torch.float32)), seed)


def _now(subject: Subject) -> float:
    if subject.program.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
