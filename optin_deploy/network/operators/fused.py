"""What ONNX Runtime's optimiser writes for several nodes at once: products and activations with what follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.elementwise import ROWS as ELEMENTWISE
from optin_deploy.network.operators.elementwise import aligned, same, together, whole_at
from optin_deploy.network.operators.normalizations import over_last, rms_norm
from optin_deploy.network.operators.products import gemm, gemm_axes, matmul_axes
from optin_deploy.network.operators.row import CHANNELS_LAST, Flow, Row, Unsupported, optional, refused
from optin_deploy.network.operators.spatial import conv, convolved

RUNTIME = "com.microsoft"
BLOCKED = "com.microsoft.nchwc"
SMALL = 1e-12
"""What is added to variances where the file does not tell."""

LAID_OUT = (
    "it is laid out for the processor of one machine by ONNX Runtime's last level of optimisation; "
    "give the file from before, or one that was optimised at the level 'extended' or below"
)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add a bias, and apply the unit by its formula with tanh."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def split_gelu(_: Node, x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias, and gate the left half by the right one."""
    left, right = (x + bias).chunk(2, -1)
    return left * functional.gelu(right)


def halves(flow: Flow) -> None:
    """Flow of a gate whose two halves lie side by side on the last axis."""
    axes = flow.broadcast([place for place in (0, 1) if flow.has(place)], flow.shape(0))
    half = flow.fresh(axes[-1].size // 2)
    flow.unify(axes[-1], flow.total([half, half]))
    flow.give(0, [*axes[:-1], half])


ACTIVATIONS = (
    *("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "LeakyRelu", "Elu", "ThresholdedRelu", "Clip", "HardSigmoid"),
    "HardSwish",
)
"""Activations that ONNX Runtime puts into products."""
COMPUTED = {row.name: row.compute for row in ELEMENTWISE if row.name in ACTIVATIONS}


def activated(node: Node, x: Tensor) -> Tensor:
    """Apply the activation that a fused node names.

    Raises: Unsupported: the activation is none of those that ONNX Runtime fuses.
    """
    name = node.get("activation")
    if not name:
        return x
    if name not in ACTIVATIONS:
        raise Unsupported(f"{node.op} with the activation {name}; known are {', '.join(ACTIVATIONS)}")
    single = (node.get(f"activation_{key}") for key in ("alpha", "beta"))
    given = node.get("activation_params") or [value for value in single if value is not None]
    named = zip(("min", "max") if name == "Clip" else ("alpha", "beta"), given, strict=False)
    result = COMPUTED[name](replace(node, attributes=dict(named)), x)
    assert isinstance(result, Tensor)
    return result


def fused_conv(
    node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """Convolve, add another tensor, and apply an activation."""
    y = conv(node, x, weight, bias)
    return activated(node, y if added is None else y + added)


def plus(product: Callable[[Flow], list[Axis]], place: int) -> Callable[[Flow], None]:
    """Make the flow of a product to which the input at a place is added, where it is there."""

    def flow(flow: Flow) -> None:
        out = product(flow)
        if flow.has(place):
            flow.align([out, flow.axes(place)], flow.out_shape())

    return flow


def orders(node: Node, ranks: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Which axis of each factor of a FusedMatMul comes at each place of a plain product."""
    found = []
    for side, rank in zip("AB", ranks, strict=True):
        order = list(range(rank))
        if node.get(f"transBatch{side}", 0):  # the first axis belongs to the matrix, the batch lies behind it
            order = [*order[1:-1], order[0], order[-1]]
        if node.get(f"trans{side}", 0) and rank > 1:
            order[-2:] = order[-1], order[-2]
        found.append(order)
    return found[0], found[1]


def fused_matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Multiply transposed tensors and scale the product."""
    one, other = orders(node, (a.ndim, b.ndim))
    product = a.permute(one) @ b.permute(other) * node.get("alpha", 1.0)
    return activated(node, product)


def fused_matmul_axes(flow: Flow) -> None:
    """Flow of FusedMatMul."""
    matmul_axes(flow, orders=orders(flow.node, (len(flow.shape(0)), len(flow.shape(1)))))


def skip_layer_norm(
    node: Node, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Add what was skipped, and normalise; the sum is given too."""
    total = x + skip if bias is None else x + skip + bias
    return normalized(node, total, scale, shift), None, None, total


def normalized(node: Node, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Normalise over the last axis; what is added to the variance is smaller here than in the operator of ONNX."""
    return functional.layer_norm(x, x.shape[-1:], scale, shift, node.get("epsilon", SMALL))


def skip_rms_norm(
    node: Node, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Add what was skipped, and divide by the root mean square; the sum is given too."""
    total = x + skip if bias is None else x + skip + bias
    return functional.rms_norm(total, total.shape[-1:], scale, node.get("epsilon", SMALL)), None, None, total


def skipped(flow: Flow) -> None:
    """Flow of a sum that is normalised over its last axis."""
    axes = together(flow)
    flow.freeze(axes[-1:])
    flow.give(0, axes)
    flow.give(3, axes)


def embedded(
    node: Node,
    words: Tensor,
    segments: Tensor | None,
    word_table: Tensor,
    place_table: Tensor,
    segment_table: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *rest: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Look words, places and segments up, and normalise their sum; the real words of each row are counted too."""
    mask, places = optional(rest, 2)
    if places is None:
        places = torch.arange(words.shape[1], device=words.device)[None]
    total = word_table[words.long()] + place_table[places.long()]
    if segments is not None and segment_table is not None:
        total = total + segment_table[segments.long()]
    counted = words.new_zeros(words.shape[0], dtype=torch.int32)
    if mask is not None:
        counted = (mask != 0).int().cumprod(1).sum(1, dtype=torch.int32)
    return normalized(node, total, scale, shift), counted, total


def embedded_axes(flow: Flow) -> None:
    """Flow of EmbedLayerNormalization: tables are looked up, and the normalisation takes the last axis whole."""
    batch, length = flow.axes(0)
    width = flow.fresh(flow.out_shape()[-1], flow.node.op)
    for place in (2, 3, 4):
        if flow.has(place):
            entries, along = flow.axes(place)
            flow.freeze([entries], "entries of a table, which are looked up")
            flow.unify(along, width)
    for place in (5, 6):
        flow.unify(flow.axes(place)[0], width)
    for place, axes in enumerate(([batch, length, width], [batch], [batch, length, width])):
        flow.give(place, axes)


def bias_softmax(node: Node, x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias, and normalise over an axis and all behind it."""
    axis = node.get("axis", 1) % x.ndim
    scores = x + bias
    return torch.softmax(scores.flatten(axis), -1).reshape(scores.shape)


ROWS = (
    Row("Gelu", lambda _, x: functional.gelu(x), same, domain=RUNTIME),
    Row("QuickGelu", lambda node, x: x * torch.sigmoid(x * node.get("alpha", 1.702)), same, domain=RUNTIME),
    Row("FastGelu", lambda _, x, bias=None: fast_gelu(x, bias), aligned, domain=RUNTIME),
    Row("BiasGelu", lambda _, x, bias: functional.gelu(x + bias), aligned, domain=RUNTIME),
    Row("BiasAdd", lambda _, x, bias, skip: x + bias + skip, aligned, domain=RUNTIME),
    Row("BiasSplitGelu", split_gelu, halves, domain=RUNTIME),
    Row("FusedConv", fused_conv, plus(convolved, 3), domain=RUNTIME, factors=(0, 1)),
    Row(
        "FusedGemm", lambda node, *given: activated(node, gemm(node, *given)), gemm_axes, domain=RUNTIME, factors=(0, 1)
    ),
    *(
        Row(name, fused_matmul, fused_matmul_axes, domain=RUNTIME, factors=(0, 1))
        for name in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")
    ),
    Row(
        "GemmFastGelu",
        lambda _, x, weight, bias=None: fast_gelu(x @ weight, bias),
        plus(matmul_axes, 2),
        domain=RUNTIME,
        factors=(0, 1),
    ),
    Row("SimplifiedLayerNormalization", rms_norm, over_last),
    Row("SkipLayerNormalization", skip_layer_norm, skipped, domain=RUNTIME),
    Row("SkipSimplifiedLayerNormalization", skip_rms_norm, skipped, domain=RUNTIME),
    Row("EmbedLayerNormalization", embedded, embedded_axes, domain=RUNTIME),
    Row(
        "BiasSoftmax",
        bias_softmax,
        whole_at(lambda node, rank: range(node.get("axis", 1) % rank, rank), added=True),
        domain=RUNTIME,
    ),
    Row("Inverse", lambda _, x: torch.linalg.inv(x), whole_at(lambda *_: (-2, -1)), domain=RUNTIME),
    *(refused(name, RUNTIME, CHANNELS_LAST) for name in ("NhwcConv", "NhwcFusedConv", "NhwcMaxPool")),
    *(
        refused(name, BLOCKED, LAID_OUT)
        for name in ("ReorderInput", "ReorderOutput", "Conv", "MaxPool", "AveragePool", "Upsample")
    ),
    *(refused(name, BLOCKED, LAID_OUT) for name in ("GlobalMaxPool", "GlobalAveragePool")),
)
