"""Which of a network's outputs is compared, and how: by what made it, or by what the caller says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.feeds.embedding_head import DenseLayer, EmbeddingHead
from optin_deploy.network.graph import MOVING, Network, Node
from optin_deploy.scoring.losses import OutputKind, Readout
from optin_deploy.scoring.settings import KINDS, Kind

LEAST = 1e-30
"""Least probability before its logarithm is taken."""
NOWHERE = -1e4
"""Logit of a place where no answer begins or ends; finite, so that differences of logarithms are numbers."""
START, END = "start_logits", "end_logits"
"""What transformers calls the logits of where an answer begins and ends."""


@dataclass(frozen=True)
class Reading:
    """What is compared: one output of a network, or what two of them tell together.

    logits and probabilities: by KL divergence, a position at a time, classes along the last axis (of pictures along the
    second); multi-label: by the KL divergences of each class being there or not, summed over the classes; span: by
    KL divergence over the tokens at which an answer begins, and over those at which it ends; regression: squared error;
    embedding: squared distance of unit vectors, pooled over tokens before.
    """

    output: str
    kind: Kind
    pooling: str = "mean"
    """Pooling of embeddings over tokens, see `optin_deploy.feeds.pooling`."""
    layers: tuple[DenseLayer, ...] = ()
    """Layers that an embedding goes through behind its pooling."""
    masks: str | None = None
    """Output with logits of a mask of each query, (batch, queries, height, width), where `output` has logits of their
    classes, the last of them for none: a place's classes are those of all queries, by how surely it is theirs (Cheng
    et al., Mask2Former, CVPR 2022, arXiv 2112.01527)."""
    ends: str | None = None
    """Output with logits of where an answer ends, (batch, tokens), where `output` has those of where it begins."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"outputs are read as {self.kind!r}; possible are {', '.join(KINDS)}.")

    @property
    def facts(self) -> dict[str, object]:
        """What a hash of results takes of it; what is not there counts as it did before it could be."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        known["layers"] = [layer.digest for layer in self.layers] or None
        return {name: value for name, value in known.items() if value is not None}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all outputs that are read."""
        return tuple(name for name in (self.output, self.masks, self.ends) if name is not None)

    def read(self, outputs: Mapping[str, Tensor], valid: Tensor | None = None) -> Readout:
        """Return what is compared of a run.

        Args: valid: (batch, tokens), 0 or 1, of texts; used where the output has as many positions.
        """
        values = outputs[self.output]
        values = values if values.is_floating_point() else values.float()
        if self.ends is not None:
            return _span(values, outputs[self.ends], valid)
        if self.masks is not None:
            values = _worth(values, outputs[self.masks])
        pictures = values if values.dim() == 4 and self.kind in ("logits", "probabilities") else None
        if self.masks is not None:
            values = values / values.sum(1, keepdim=True).clamp(min=LEAST)
        if values.dim() == 4:
            values = values.flatten(2).transpose(1, 2)  # (batch, places, classes)
        if values.dim() > 3:
            values = values.flatten(1).unsqueeze(1)
        fits = valid is not None and values.dim() == 3 and valid.shape == values.shape[:2]
        real = valid if fits and valid is not None else torch.ones(values.shape[: max(1, values.dim() - 1)]).to(values)
        if self.kind == "embedding":
            return self._embedding(values, real)
        if values.dim() == 1:
            values = values.unsqueeze(1)
        if values.dim() == 2:
            values, real = values.unsqueeze(1), torch.ones(len(values), 1).to(values)
        if self.kind == "probabilities":
            values = values.clamp(min=LEAST).log()
        kind: OutputKind = "logits" if self.kind == "probabilities" or self.kind == "span" else self.kind
        # Real positions first, so that noise falls on a token by its place in the text, wherever the padding is.
        order = real.argsort(dim=1, descending=True, stable=True)
        return Readout(kind, values.take_along_dim(order.unsqueeze(-1), 1), real.gather(1, order), pictures)

    def _embedding(self, values: Tensor, real: Tensor) -> Readout:
        if values.dim() == 3:
            values = EmbeddingHead(self.pooling, self.layers)(values, real)
        values = torch.nn.functional.normalize(values.flatten(1), dim=-1)
        return Readout("embedding", values.unsqueeze(1), torch.ones(len(values), 1).to(values))


def reading_of(
    network: Network, shapes: Mapping[str, Sequence[int] | None], *, output: str | None = None, kind: Kind | None = None
) -> Reading:
    """Choose what is compared: the output that is named so, or called logits, or the first of real numbers.

    Args: shapes: of the outputs; None: not known.
    Raises: BadInput: there is no such output.
    """
    names = [port.name for port in network.outputs]
    if output is not None and output not in names:
        raise BadInput(f"--output {output!r}: this network's outputs are {', '.join(names)}.")
    named = [name for name in names if "logits" in name.lower()]
    real = [port.name for port in network.outputs if port.dtype.is_floating_point()]  # some files put out their inputs
    queries = _queries(named, shapes) if output is None and kind is None else None
    if queries is not None:
        return Reading(queries[0], "probabilities", masks=queries[1])
    if {START, END} <= set(names) and output is None and kind in (None, "span"):
        return Reading(START, "span", ends=END)
    if kind == "span":
        raise BadInput(f"--compare-output :span needs {START} and {END}; the outputs are {', '.join(names)}.")
    chosen = output or (named or real or names)[0]
    return Reading(chosen, kind or _kind(network, chosen, shapes.get(chosen)))


def _worth(classes: Tensor, masks: Tensor) -> Tensor:
    """What each class is worth at each place, (batch, classes, height, width)."""
    real = torch.promote_types(classes.dtype, torch.float32)
    sure = classes.to(real).softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", sure, masks.to(real).sigmoid())


def _span(starts: Tensor, ends: Tensor, valid: Tensor | None) -> Readout:
    """Two positions, whose classes are the tokens, (batch, 2, tokens); padding is none of them."""
    values = torch.stack((starts, ends.to(starts)), 1)
    if valid is not None and valid.shape == starts.shape:
        values = values.masked_fill(valid.unsqueeze(1) == 0, NOWHERE)
    return Readout("logits", values, values.new_ones(len(values), 2))


def _queries(names: Sequence[str], shapes: Mapping[str, Sequence[int] | None]) -> tuple[str, str] | None:
    """The logits of queries' classes and of their masks, where these are the only two logits."""
    known = {name: tuple(shapes.get(name) or ()) for name in names}
    classes, masks = ([name for name in names if len(known[name]) == axes] for axes in (3, 4))
    if len(names) == 2 and classes and masks and known[classes[0]][1] == known[masks[0]][1]:
        return classes[0], masks[0]
    return None


def _kind(network: Network, output: str, shape: Sequence[int] | None) -> Kind:
    maker = _maker(network, output)
    if shape is not None and ((len(shape) < 3 and shape[-1:] == (1,)) or (len(shape) == 4 and shape[1] == 1)):
        return "regression"  # one class alone says nothing
    if maker is not None and maker.op in ("Softmax", "Sigmoid"):
        return "probabilities" if maker.op == "Softmax" else "regression"
    if maker is not None and maker.op == "LogSoftmax":
        return "logits"
    if "logits" in output.lower():
        return "logits"
    return (
        "logits"
        if shape is not None and len(shape) == 2 and maker is not None and _adds_bias(network, maker)
        else "embedding"
    )


def _maker(network: Network, output: str) -> Node | None:
    """The node that computes an output, behind those that only move entries."""
    node = network.producer.get(output)
    while node is not None and node.op in MOVING:
        node = network.producer.get(node.inputs[0])
    return node


def _adds_bias(network: Network, node: Node) -> bool:
    """Whether this is a product with a weight and a bias: embeddings mostly end without one."""
    if node.op == "Add":
        made = [network.producer.get(name) for name in node.inputs]
        return any(each is not None and each.op in ("MatMul", "Gemm") for each in made) and any(
            name in network.fixed for name in node.inputs
        )
    return node.op == "Gemm" and len(node.inputs) > 2 and bool(node.inputs[2])
