"""Element-wise operators: axes are aligned as broadcasting does, and stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row
from optin_deploy.network.tensors import torch_dtype


def same(flow: Flow) -> None:
    """Each output has the axes of the first input."""
    for place in range(len(flow.node.outputs)):
        flow.give(place, flow.axes(0))


def aligned(flow: Flow) -> None:
    """The output has the axes of all inputs."""
    flow.give(0, together(flow))


def together(flow: Flow) -> list[Axis]:
    """Unify the axes of all inputs that are there, as broadcasting aligns them; returns those of the result."""
    return flow.broadcast([place for place in range(len(flow.node.inputs)) if flow.has(place)], flow.out_shape())


def whole_at(positions: Callable[[Node, int], Iterable[int]], *, added: bool = False) -> Callable[[Flow], None]:
    """Make the flow of what keeps all axes of a tensor, of which some stay whole.

    Args: positions: of these axes, by the node and the number of axes. added: other inputs are added to the first.
    """

    def flow(flow: Flow) -> None:
        axes = together(flow) if added else flow.axes(0)
        flow.freeze([axes[position] for position in positions(flow.node, len(axes))])
        flow.give(0, axes)

    return flow


def unary(name: str, compute: Callable[[Tensor], Tensor], domain: str = "") -> Row:
    """Make the row of a function of one tensor, entry by entry."""
    return Row(name, lambda _, x: compute(x), same, domain=domain)


def binary(name: str, compute: Callable[[Tensor, Tensor], Tensor]) -> Row:
    """Make the row of a function of two tensors."""
    return Row(name, lambda _, a, b: compute(a, b), aligned)


def many(name: str, compute: Callable[[Tensor, Tensor], Tensor], mean: bool = False) -> Row:
    """Make the row of a function of any number of tensors, taken two by two."""

    def folded(_: Node, first: Tensor, *others: Tensor) -> Tensor:
        result = reduce(compute, others, first)
        return result / (1 + len(others)) if mean else result

    return Row(name, folded, aligned)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(a: Tensor, b: Tensor) -> Tensor:
    """Raise to a power; the result has the type of the base."""
    return torch.pow(a, b).to(a.dtype)


def shift(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Move bits to one side; whole numbers without a sign go through a wider type, which torch can shift."""
    move = torch.bitwise_left_shift if node.attributes["direction"] == "LEFT" else torch.bitwise_right_shift
    return move(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)


def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bound every entry; a bound that is left out is none."""
    lowest, highest = (node.get(key) if bound is None else bound for key, bound in (("min", low), ("max", high)))
    if isinstance(lowest, float):
        x = x.clamp(min=lowest)
    elif lowest is not None:
        x = torch.maximum(x, lowest)
    if isinstance(highest, float):
        x = x.clamp(max=highest)
    elif highest is not None:
        x = torch.minimum(x, highest)
    return x


def infinite(node: Node, x: Tensor) -> Tensor:
    """Tell what is infinite, perhaps of one sign only."""
    above = torch.isposinf(x) if node.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return above | torch.isneginf(x) if node.get("detect_negative", 1) else above


def shrink(node: Node, x: Tensor) -> Tensor:
    """Pull towards zero."""
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    return torch.where(x > limit, x - bias, torch.where(x < -limit, x + bias, torch.zeros_like(x)))


def selu(node: Node, x: Tensor) -> Tensor:
    """Return the scaled exponential linear unit."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    result: Tensor = gamma * torch.where(x > 0, x, alpha * torch.expm1(x))
    return result


def dropout(_: Node, x: Tensor, *__: Tensor | None) -> tuple[Tensor, Tensor]:
    """Change nothing, as in inference."""
    return x, torch.ones_like(x, dtype=torch.bool)


ROWS = (
    *(unary(name, getattr(torch, name.lower())) for name in ("Relu", "Erf", "Tanh", "Sigmoid", "Sqrt", "Neg", "Exp")),
    *(unary(name, getattr(torch, name.lower())) for name in ("Log", "Abs", "Reciprocal", "Sin", "Cos", "Tan", "Sign")),
    *(unary(name, getattr(torch, name.lower())) for name in ("Floor", "Ceil", "Round", "Asin", "Acos", "Atan", "Sinh")),
    *(unary(name, getattr(torch, name.lower())) for name in ("Cosh", "Asinh", "Acosh", "Atanh", "IsNaN")),
    unary("Identity", lambda x: x),
    unary("Not", torch.logical_not),
    unary("BitwiseNot", torch.bitwise_not),
    unary("Softplus", functional.softplus),
    unary("Softsign", functional.softsign),
    unary("Mish", functional.mish),
    unary("HardSwish", functional.hardswish),
    Row("IsInf", infinite, same),
    Row("Gelu", lambda node, x: functional.gelu(x, approximate=node.get("approximate", "none")), same),
    Row("Swish", lambda node, x: x * torch.sigmoid(x * node.get("alpha", 1.0)), same),
    Row("HardSigmoid", lambda node, x: (x * node.get("alpha", 0.2) + node.get("beta", 0.5)).clamp(0, 1), same),
    Row("LeakyRelu", lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01)), same),
    Row("Elu", lambda node, x: functional.elu(x, node.get("alpha", 1.0)), same),
    Row("Celu", lambda node, x: functional.celu(x, node.get("alpha", 1.0)), same),
    Row("Selu", selu, same),
    Row("ThresholdedRelu", lambda node, x: torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x)), same),
    Row("Shrink", shrink, same),
    Row("Clip", clip, same),
    Row("Cast", lambda node, x: x.to(torch_dtype(node.attributes["to"])), same),
    Row("CastLike", lambda _, x, like: x.to(like.dtype), same),
    Row("Dropout", dropout, same),
    Row("PRelu", lambda _, x, slope: torch.where(x < 0, x * slope, x), aligned),
    Row("Where", lambda _, condition, a, b: torch.where(condition, a, b), aligned),
    Row("Mod", lambda node, a, b: torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b), aligned),
    binary("Add", torch.add),
    binary("Sub", torch.sub),
    binary("Mul", torch.mul),
    binary("Div", divide),
    binary("Pow", power),
    binary("Equal", torch.eq),
    binary("Less", torch.lt),
    binary("LessOrEqual", torch.le),
    binary("Greater", torch.gt),
    binary("GreaterOrEqual", torch.ge),
    binary("And", torch.logical_and),
    binary("Or", torch.logical_or),
    binary("Xor", torch.logical_xor),
    Row("BitShift", shift, aligned),
    binary("BitwiseAnd", torch.bitwise_and),
    binary("BitwiseOr", torch.bitwise_or),
    binary("BitwiseXor", torch.bitwise_xor),
    many("Max", torch.maximum),
    many("Min", torch.minimum),
    many("Sum", torch.add),
    many("Mean", torch.add, mean=True),
)
