"""Put the merging of tokens into a graph, by ordinary operators of ONNX.

Bipartite soft matching (Bolya et al., Token Merging, ICLR 2023, arXiv 2210.09461): behind the attention of a block the
tokens at even places look for the most alike one at odd places, by the cosine of their keys; the pairs that are most
alike become one token, a mean weighted by how many tokens each already stands for, and later attention adds the
logarithm of that number to its scores. Where tokens are dropped, those that would have become a part of another leave,
and nothing is weighted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.writing import Writer
from optin_deploy.structure.tokens import TokenStream

APART = -4.0
"""Number that is added to cosines of tokens that are not to be merged."""


@dataclass(frozen=True)
class MergeStep:
    """One merge: places that a run finds, each (samples, places, 1)."""

    tokens: int
    """Tokens before the merge."""
    left: int
    """Tokens after the merge."""
    order: ir.Value
    """Tokens at even places, by their number among those: first those that stay, then those that go."""
    into: ir.Value
    """Token at an odd place that each of the tokens that go becomes a part of."""


class Merging(Writer):
    """The graph while merges are put in."""

    def __init__(self, cut: Editor, real: ir.DataType, stream: TokenStream) -> None:
        """Args: real: type of the values of the stream."""
        super().__init__(cut)
        self._real, self._stream = real, stream
        self._left = stream.tokens
        self._steps: list[MergeStep] = []
        self._sizes: ir.Value | None = None
        """How many tokens each stands for, (samples, tokens, 1)."""
        self._bias: ir.Value | None = None
        """The logarithm of that, (samples, 1, 1, tokens)."""

    def attend(self, softmax: ir.Node, kind: ir.DataType) -> None:
        """Let a token that stands for several count as so many in an attention.

        Args: kind: type of the scores.
        """
        if self._bias is not None:
            bias = self._bias
            if kind != self._real:
                bias = self._put(softmax, "Cast", bias, to=int(kind))
            softmax.replace_input_with(0, self._put(softmax, "Add", softmax.inputs[0], bias))

    def merge(
        self, gap: ir.Node, keys: ir.Value, kind: ir.DataType, count: int, directions: np.ndarray | None = None
    ) -> None:
        """Put the merging of so many tokens in the place of a gap.

        Args: keys: (samples, heads, width, tokens). kind: type of the keys. count: negative: so many are dropped.
            directions: by which tokens are alike in place of their keys, (tokens, width).
        """
        drops, count = count < 0, abs(count)
        before, even, odd = self._left, (self._left + 1) // 2, self._left // 2
        tokens = gap.inputs[0]
        assert tokens is not None
        found, places = self._alike(gap, keys, kind, directions)
        _, order = self._top(gap, found, even)
        goes = self._slice(gap, order, 0, count, 1)
        stays = self._sorted(gap, self._slice(gap, order, count, even, 1), even - count)
        into = self._put(gap, "GatherElements", places, goes, axis=1)
        sizes = self._sizes
        if not drops:
            sizes = sizes or self._ones(gap, tokens)
            tokens = self._put(gap, "Mul", tokens, sizes)
        both = tokens if sizes is None else self._put(gap, "Concat", tokens, sizes, axis=2)
        first, second = (self._slice(gap, both, start, before, 1, 2) for start in (0, 1))
        kept = self._put(gap, "GatherND", first, stays, batch_dims=1)
        if not drops:
            moved = self._put(gap, "GatherND", first, goes, batch_dims=1)
            hot = self._put(gap, "Equal", into, self._cut.constant(np.arange(odd).reshape(1, 1, -1), "places"))
            hot = self._put(gap, "Transpose", self._put(gap, "Cast", hot, to=int(self._real)), perm=[0, 2, 1])
            second = self._put(gap, "Add", second, self._put(gap, "MatMul", hot, moved))
        out = self._put(gap, "Concat", kept, second, axis=1)
        if self._stream.protected > 1:
            front = in_front(even - count, odd, self._stream.protected)
            out = self._put(gap, "Gather", out, self._cut.constant(front, "places"), axis=1)
        if sizes is not None:
            width = self._cut.structure.axes[self._stream.end][2].size
            self._sizes = self._slice(gap, out, width, width + 1, 2)
            out = self._slice(gap, out, 0, width, 2)
            out = out if drops else self._put(gap, "Div", out, self._sizes)
            bias = self._put(gap, "Transpose", self._put(gap, "Log", self._sizes), perm=[0, 2, 1])
            self._bias = self._put(gap, "Unsqueeze", bias, self._whole([1]))
        self._cut.renamed(gap, out)
        self._left = before - count
        self._steps.append(MergeStep(before, self._left, self._put(gap, "Concat", stays, goes, axis=1), into))

    def restore(self, gap: ir.Node) -> None:
        """Give every token of the input the one that it became a part of."""
        tokens, place = gap.inputs[0], self._whole(np.arange(self._left).reshape(1, -1, 1))
        samples = self._put(gap, "Concat", self._size(gap, tokens, 0), self._whole([1, 1]), axis=0)
        place = self._put(gap, "Expand", place, samples)
        for step in reversed(self._steps):
            even, odd = (step.tokens + 1) // 2, step.tokens // 2
            kept = step.left - odd
            if self._stream.protected > 1:
                back = np.argsort(in_front(kept, odd, self._stream.protected))
                place = self._put(gap, "Gather", place, self._cut.constant(back, "places"), axis=1)
            into = self._put(gap, "Add", step.into, self._whole(kept))
            into = self._put(gap, "GatherND", place, into, batch_dims=1)
            stays = self._slice(gap, place, 0, kept, 1)
            by_order = self._put(gap, "Concat", stays, into, axis=1)
            first = self._put(gap, "GatherND", by_order, self._inverse(gap, step.order, even), batch_dims=1)
            second = self._slice(gap, place, kept, kept + odd, 1)
            mixed = np.argsort(np.concatenate([np.arange(0, step.tokens, 2), np.arange(1, step.tokens, 2)]))
            both = self._put(gap, "Concat", first, second, axis=1)
            place = self._put(gap, "Gather", both, self._cut.constant(mixed, "places"), axis=1)
        self._cut.renamed(gap, self._put(gap, "GatherND", tokens, place, batch_dims=1))

    def _alike(
        self, gap: ir.Node, keys: ir.Value, kind: ir.DataType, directions: np.ndarray | None
    ) -> tuple[ir.Value, ir.Value]:
        """Largest cosine of each token at an even place to a token at an odd place, and the number of that token."""
        even, odd, kept = (self._left + 1) // 2, self._left // 2, self._stream.protected
        if kind != ir.DataType.FLOAT:  # narrow types round, and squares overflow
            keys = self._put(gap, "Cast", keys, to=int(ir.DataType.FLOAT))
        total = self._put(gap, "ReduceSum", keys, self._whole([1]), keepdims=0)
        total = self._put(gap, "Transpose", total, perm=[0, 2, 1])
        if directions is not None:
            none = self._put(gap, "ReduceSum", total, self._whole([2]), keepdims=1)
            none = self._put(gap, "Mul", none, self._cut.constant(np.zeros(1, np.float32), "none"))
            total = self._put(gap, "Add", none, self._cut.constant(directions[None], "directions"))
        square = self._put(gap, "ReduceSum", self._put(gap, "Mul", total, total), self._whole([2]), keepdims=1)
        total = self._put(gap, "Div", total, self._put(gap, "Sqrt", square))
        first, second = (self._slice(gap, total, start, self._left, 1, 2) for start in (0, 1))
        cosines = self._put(gap, "MatMul", first, self._put(gap, "Transpose", second, perm=[0, 2, 1]))
        if kept:
            apart = np.zeros((1, even, odd))
            apart[:, : (kept + 1) // 2] = apart[:, :, : kept // 2] = APART
            cosines = self._put(gap, "Add", cosines, self._cut.constant(apart.astype(np.float32), "apart"))
        return self._top(gap, cosines, 1, axis=2)

    def _ones(self, gap: ir.Node, tokens: ir.Value | None) -> ir.Value:
        shape = self._put(gap, "Concat", self._size(gap, tokens, 0), self._whole([self._left, 1]), axis=0)
        ones = self._cut.constant(np.ones((1, 1, 1), self._real.numpy()), "ones")
        return self._put(gap, "Expand", ones, shape)

    def _inverse(self, gap: ir.Node, order: ir.Value, count: int) -> ir.Value:
        """The inverse of an order: the position of each number in it."""
        return self._top(gap, self._put(gap, "Cast", order, to=int(ir.DataType.INT32)), count, largest=0)[1]


def in_front(kept: int, odd: int, protected: int) -> np.ndarray:
    """Return an order of those that stay and then those at odd places, in which protected ones are in front again."""
    first = [place // 2 + (kept if place % 2 else 0) for place in range(protected)]
    return np.concatenate([first, np.setdiff1d(np.arange(kept + odd), first)])
