"""Products of matrices: the contracted axes are one, and each gives a place for masks and a cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.network.axes import Axis
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row


def matmul_axes(
    flow: Flow, *, places: tuple[int, int] = (0, 1), orders: tuple[Sequence[int], Sequence[int]] | None = None
) -> list[Axis]:
    """Flow of a product of two tensors whose last two axes are matrices; returns the axes of the output.

    Args: places: where the two lie.
        orders: which axis of each comes at each place, for tensors that are transposed on the way.
    """
    given = flow.axes(places[0]), flow.axes(places[1])
    first, second = orders or (range(len(given[0])), range(len(given[1])))
    a, b = [given[0][position] for position in first], [given[1][position] for position in second]
    rows, columns = len(a) > 1, len(b) > 1
    a = a if rows else [flow.fresh(1), *a]
    b = b if columns else [*b, flow.fresh(1)]
    flow.unify(a[-1], b[-2])
    flow.contract(places[0], first[-1], (places[1], second[-2] if columns else 0))
    out = list(flow.out_shape())
    batch = flow.align([a[:-2], b[:-2]], out[: len(out) - rows - columns])
    result = [*batch, *([a[-2]] if rows else []), *([b[-1]] if columns else [])]
    flow.give(0, result)
    flow.macs([*batch, a[-2], a[-1], b[-1]])
    return result


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Multiply two matrices, each perhaps transposed, and add a third."""
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if c is not None and a.is_floating_point():
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    product = a @ b if alpha == 1 else (a @ b) * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def gemm_axes(flow: Flow, *, places: tuple[int, int, int] = (0, 1, 2)) -> list[Axis]:
    """Flow of Gemm, whose three tensors lie at these places; returns the axes of the output."""
    one, other, added = places
    a, b = flow.axes(one), flow.axes(other)
    if flow.node.get("transA", 0):
        a.reverse()
    if flow.node.get("transB", 0):
        b.reverse()
    flow.unify(a[1], b[0])
    flow.contract(one, 0 if flow.node.get("transA", 0) else 1, (other, 1 if flow.node.get("transB", 0) else 0))
    out = [a[0], b[1]]
    if flow.has(added):
        flow.align([out, flow.axes(added)], flow.out_shape())
    flow.give(0, out)
    flow.macs([a[0], a[1], b[1]])
    return out


def terms_of(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Write an equation out: a letter for each axis that dots stand for, and the result where it is left out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = max((rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)), default=0)
    letters = "".join(chr(ord("\u0100") + n) for n in range(hidden))
    if not arrow:
        seen = left.replace(",", "").replace(".", "")
        right = "..." + "".join(sorted(letter for letter in set(seen) if seen.count(letter) == 1))
    found = []
    for term, rank in zip(terms, ranks, strict=True):
        found.append(
            term.replace("...", letters[hidden - (rank - len(term.replace("...", ""))) :] if "." in term else "")
        )
    return found, right.replace("...", letters)


def einsum_axes(flow: Flow) -> None:
    """Flow of Einsum: a letter is an axis; what is not in the result is summed over."""
    tensors = [flow.axes(place) for place in range(len(flow.node.inputs))]
    terms, result = terms_of(flow.node.attributes["equation"], [len(axes) for axes in tensors])
    letters: dict[str, Axis] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for place, (term, axes) in enumerate(zip(terms, tensors, strict=True)):
        for position, (letter, axis) in enumerate(zip(term, axes, strict=True)):
            known = letters.get(letter)
            if known is None or known.size == 1:
                letters[letter] = axis
            elif axis.size != 1:
                flow.unify(known, axis)
            if axis.size != 1:
                places.setdefault(letter, []).append((place, position))
    for letter, where in places.items():
        if letter not in result and len(where) < 3 and len({place for place, _ in where}) == len(where):
            flow.contract(*where[0], *where[1:])
            continue
        if letter not in result:
            flow.contract(*where[0])  # where what stays whole is told
        if letter not in result or any(term.count(letter) > 1 for term in terms):
            flow.freeze([letters[letter]], f"Einsum {flow.node.attributes['equation']}")
    flow.give(0, [letters[letter] for letter in result])
    if any(letter not in result for letter in letters):  # else nothing is added up, as in Mul
        flow.macs(list(letters.values()))


ROWS = (
    Row("MatMul", lambda _, a, b: a @ b, matmul_axes, factors=(0, 1)),
    Row("Gemm", gemm, gemm_axes, factors=(0, 1)),
    Row(
        "Einsum", lambda node, *inputs: torch.einsum(node.attributes["equation"], *inputs), einsum_axes, factors=(0, 1)
    ),
)
