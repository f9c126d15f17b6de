"""Products with stored weights as matrices: a row for each output, a column for each input, whatever node multiplies.

A convolution is a product of its kernel with patches, one matrix for each group of channels; a BatchNorm behind no
product is one of groups of a single channel. A weight may pass through operators that only move entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.operators.spatial import padded, window
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.structure.branches import weight_place
from optin_deploy.structure.stored import GivenTensor, stored_at
from optin_deploy.structure.stream import samples_axis
from optin_deploy.structure.structure import Structure


@dataclass(frozen=True)
class Linear:
    """A product of an activation with a stored matrix."""

    node: Node
    reads: str
    gives: str
    stored: GivenTensor
    place: int
    """Place of the weight."""
    features: int
    """Position of the axis of what it reads that is multiplied."""
    outputs_axis: int
    """Position of the outputs in what it gives."""
    samples: tuple[int | None, int | None]
    """Positions of the axes over samples in what it reads and gives."""
    outputs: int
    channels: int
    """Entries of the multiplied axis, of each group."""
    groups: int = 1
    """Parts of the channels that are multiplied apart, each for as many of the outputs."""
    kernel: tuple[int, ...] = ()
    """Sizes of a convolution's window."""
    factor: float = 1.0
    """Factor by which the product is multiplied."""
    seen: bool = True
    """Whether what it gives is the product; else attention, or sums of a ConvTranspose, follow in the same node."""
    normal: tuple[Tensor, Tensor] | None = None
    """Means of the channels and their standard deviations, by which a BatchNorm brings them to one scale before."""

    @property
    def taps(self) -> int:
        """Columns of the matrix for each channel."""
        return math.prod(self.kernel)

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.channels * self.taps

    @property
    def plain(self) -> bool:
        """Whether each output follows from one place of what is read, and all places have one."""
        return not self.kernel or (self.taps == 1 and set(self.node.get("strides", (1,))) == {1} and not self.fringed)

    @property
    def fringed(self) -> bool:
        """Whether zeros are put around what it reads."""
        return bool(self.kernel) and (
            any(self.node.get("pads", (0,))) or self.node.get("auto_pad", "NOTSET").startswith("SAME")
        )

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor as it is stored as (outputs, inputs of their group); what is written there is written to it."""
        return self.of_used(self.stored.used(tensor))

    def of_used(self, tensor: Tensor) -> Tensor:
        """The same for a tensor as it comes to the node."""
        if self.kernel or self.groups > 1:
            return tensor.view(self.outputs, self.inputs)
        if self.node.op == "ConvTranspose":
            return tensor.view(self.channels, self.outputs).T
        tensor = tensor.view(tensor.shape[-2:])
        turned = bool(self.place) and not self.node.get("transB", 0)
        return tensor.T if turned else tensor

    def places(self, given: Tensor, samples: int) -> int:
        """How many rows of the regression each sample has."""
        return given.numel() // (samples * self.outputs)

    def rows_in(self, read: Tensor, samples: int, chosen: Tensor | None = None) -> Tensor:
        """What is multiplied, (samples, rows, groups * inputs).

        Args: chosen: which rows of each sample; None: all.
        """
        if self.normal is not None:
            mean, spread = (each.to(read).reshape(-1, *[1] * (read.dim() - 2)) for each in self.normal)
            read = (read - mean) / spread
        if self.plain:
            return rows_of_value(read, self.features, self.samples[0], samples, chosen)
        strides, dilations, pads = window(self.node, read, self.kernel)
        windows = padded(read, pads)
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, strides, dilations, strict=True), start=2):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        windows = windows.movedim(1, 1 + len(self.kernel))  # (samples, .. places, channels, .. taps)
        places = windows.shape[1 : 1 + len(self.kernel)]
        count = math.prod(places)
        each = torch.arange(count, device=read.device) if chosen is None else chosen.to(read.device)
        index: list[Any] = [slice(None), *torch.unravel_index(each, places)]
        return windows[tuple(index)].reshape(samples, -1, self.groups * self.inputs)

    def rows_out(self, given: Tensor, samples: int, chosen: Tensor | None = None) -> Tensor:
        """What comes out, or something of its shape, (samples, rows, outputs)."""
        return rows_of_value(given, self.outputs_axis, self.samples[1], samples, chosen)


def linear_of(structure: Structure, node: Node, *, shared: bool = False) -> Linear:
    """Return a node as a product with a matrix.

    Args: shared: also a matrix that other places read.
    Raises: Unsupported: it is none; says why.
    """
    if node.op == "BatchNormalization":
        return _normalization(structure, node)
    weight = weight_place(structure, node)
    if weight is None:
        raise Unsupported("it multiplies no weight")
    form = FORMS.get((node.domain, node.op))
    if form is None:
        raise Unsupported(f"{node.op} is not known as a product with one matrix")
    stored = stored_at(structure, node.inputs[weight])
    if len(stored.places) > 1 and not shared:
        raise Unsupported("several nodes read its weight")
    return form(structure, node, weight, stored)


def _made(structure: Structure, node: Node, weight: int, stored: GivenTensor, **more: object) -> Linear:
    reads, gives = node.inputs[1 - weight], node.outputs[0]
    return Linear(
        node=node,
        reads=reads,
        gives=gives,
        stored=stored,
        place=weight,
        samples=(samples_axis(structure, reads), samples_axis(structure, gives)),
        **more,  # type: ignore[arg-type]
    )


def without(node: Node) -> Node | None:
    """Return a node that gives the product without the activation that follows in the same node; None: none follows."""
    if node.op == "GemmFastGelu":
        return replace(node, op="FusedMatMul", inputs=node.inputs[:2])
    if not node.get("activation"):
        return None
    return replace(
        node, attributes={k: value for k, value in node.attributes.items() if not k.startswith("activation")}
    )


def _product(structure: Structure, node: Node, weight: int, stored: GivenTensor) -> Linear:
    """MatMul, Gemm, FusedMatMul, and those with an activation."""
    read, given = (len(structure.shapes.shape(name) or ()) for name in (node.inputs[1 - weight], node.outputs[0]))
    shape = tuple(structure.shapes.shape(node.inputs[weight]) or ())
    if len(shape) < 2 or math.prod(shape[:-2]) > 1 or read < 2 or given < 2:
        raise Unsupported("it multiplies more than one matrix, or a vector")
    if node.get("transA", 0) or node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise Unsupported("what it reads is turned around in the same node")
    if node.op != "MatMul" and not weight:
        raise Unsupported("its weight is the first factor")
    turned = bool(weight) and not node.get("transB", 0)
    last = (read - 1, given - 1) if weight else (read - 2, given - 2)
    return _made(
        structure,
        node,
        weight,
        stored,
        features=last[0],
        outputs_axis=last[1],
        outputs=shape[-1] if turned else shape[-2],
        channels=shape[-2] if turned else shape[-1],
        factor=float(node.get("alpha", 1.0)),
    )


def _convolution(structure: Structure, node: Node, weight: int, stored: GivenTensor) -> Linear:
    shape = tuple(structure.shapes.shape(node.inputs[weight]) or ())
    if samples_axis(structure, node.inputs[0]) not in (0, None):
        raise Unsupported("samples do not lie along the first axis")
    return _made(
        structure,
        node,
        weight,
        stored,
        features=1,
        outputs_axis=1,
        outputs=shape[0],
        channels=shape[1],
        groups=node.get("group", 1),
        kernel=shape[2:],
    )


def _transposed(structure: Structure, node: Node, weight: int, stored: GivenTensor) -> Linear:
    """ConvTranspose: each place of what it reads is multiplied by one matrix, with a row for each output and place of
    the window; then what falls on one place is added up."""
    shape = tuple(structure.shapes.shape(node.inputs[weight]) or ())
    if not weight or node.get("group", 1) > 1:
        raise Unsupported("ConvTranspose multiplies groups of channels apart" if weight else "its weight is read first")
    return _made(
        structure,
        node,
        weight,
        stored,
        features=1,
        outputs_axis=1,
        outputs=math.prod(shape[1:]),
        channels=shape[0],
        seen=False,
    )


def _normalization(structure: Structure, node: Node) -> Linear:
    """A BatchNorm: of groups of one channel, each multiplied by its entry of the scale."""
    weights, stored = structure.network.weights, stored_at(structure, node.inputs[1])
    if len(stored.places) > 1:
        raise Unsupported("several nodes read its weight")
    if not {*node.inputs[3:5]} <= set(weights):
        raise Unsupported("its means or variances are computed")
    mean, variance = (torch_tensor(weights[name]).double() for name in node.inputs[3:5])
    return _made(
        structure,
        node,
        1,
        stored,
        features=1,
        outputs_axis=1,
        outputs=len(mean),
        channels=1,
        groups=len(mean),
        normal=(mean, (variance + node.get("epsilon", 1e-5)).sqrt()),
    )


def _attention(structure: Structure, node: Node, weight: int, stored: GivenTensor) -> Linear:
    """ONNX Runtime's Attention: queries, keys and values are made of one value in the same node."""
    shape = tuple(structure.shapes.shape(node.inputs[weight]) or ())
    return _made(
        structure,
        node,
        weight,
        stored,
        features=2,
        outputs_axis=2,
        outputs=shape[1],
        channels=shape[0],
        seen=False,
    )


FORMS: dict[tuple[str, str], Callable[[Structure, Node, int, GivenTensor], Linear]] = {
    ("", "MatMul"): _product,
    ("", "Gemm"): _product,
    ("com.microsoft", "FusedMatMul"): _product,
    ("com.microsoft", "TransposeMatMul"): _product,
    ("com.microsoft", "FusedMatMulActivation"): _product,
    ("com.microsoft", "FusedGemm"): _product,
    ("com.microsoft", "GemmFastGelu"): _product,
    ("", "Conv"): _convolution,
    ("com.microsoft", "FusedConv"): _convolution,
    ("", "ConvTranspose"): _transposed,
    ("com.microsoft", "Attention"): _attention,
}


def rows_of_value(
    value: Tensor, features: int, along: int | None, samples: int, chosen: Tensor | None = None
) -> Tensor:
    """(.., features, ..) with the samples along one axis, each maybe in several parts -> (samples, rows, features).

    Args: along: position of the samples; None: there is but one, or they lie along the first axis.
    """
    moved = value.movedim(features, -1)
    if along is not None and along != features:
        moved = moved.movedim(along - (along > features), 0)
    rows = moved.reshape(samples, -1, value.shape[features])
    return rows if chosen is None else rows[:, chosen.to(value.device)]
