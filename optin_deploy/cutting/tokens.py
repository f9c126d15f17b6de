"""Merge tokens that are alike inside a network, and give each its own place back where the stream of tokens ends.

Bipartite soft matching (Bolya et al., Token Merging, ICLR 2023, arXiv 2210.09461): behind the attention of a block the
tokens at even places look for the most alike one at odd places, by the cosine of their keys; the pairs that are most
alike become one token, a mean weighted by how many tokens each already stands for, and later attention adds the
logarithm of that number to its scores. The numbers of tokens are fixed, so that engines stay static.

At the end of the stream every token is its merged one again: whatever reads tokens there, such as a mean or a class
token, needs to know nothing. It is proven first that all blocks treat tokens alike, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.graph import Cut
from optin_deploy.cutting.proof import TOLERANCE, difference
from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, touched
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.run import REAL_TYPES, Program
from optin_deploy.network.shapes import shapes_of
from optin_deploy.structure.flow import Structure, walk
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.tokens import TokenStream, most_merged, token_stream

OPSET = 13
"""Sums take their axes as an input from then on."""
APART = -4.0
"""Is added to cosines of tokens that are not to be merged."""


@uncollected()
def merged(
    layout: Layout,
    merges: Sequence[int],
    probes: Sequence[Mapping[str, Tensor]],
    stream: TokenStream | None = None,
) -> Network:
    """Return a network that merges tokens; the given one is untouched.

    Args:
        merges: how many tokens go behind the attention of each block of `structure.tokens.token_stream`.
        probes: inputs on which it is proven that blocks treat tokens alike.
        stream: of the network that this one was cut from, whose values have the same names; None: it is looked for.
    Raises: BadInput: there is no stream of tokens, a block has too few to merge so many, or it does not treat tokens
        alike.
    """
    stream = stream or token_stream(layout)
    counts = counted(stream, merges)
    if not any(merges):
        return layout.structure.network
    _check_opset(layout.structure.network)
    _check_there(layout.structure.network, stream)
    used = tuple(number for number, count in enumerate(merges) if count)
    order = np.random.default_rng(0)
    places = [order.permutation(stream.tokens) for _ in used]
    _prove_alike(layout.structure.network, broken(layout, stream, used, places).network, probes)
    gap = broken(layout, stream, used, [np.arange(stream.tokens)] * len(used))
    structure = walk(gap.network, shapes_of(gap.network, probes[0]))
    kept = {structure.axes[name][1].root: np.arange(counts[at]) for name, at in zip(gap.breaks, used, strict=True)}
    _check_apart(structure, kept, len(used))
    result = _lowered(gap, Cut(structure, gap.network.model.clone(), kept), stream, merges)
    _check_runs(layout.structure.network, result, probes)
    return result


def counted(stream: TokenStream, merges: Sequence[int]) -> list[int]:
    """Return the tokens behind the attention of each block.

    Raises: BadInput: a block has too few to merge so many.
    """
    if len(merges) != len(stream.blocks):
        raise BadInput(f"{len(merges)} numbers of merged tokens for {len(stream.blocks)} blocks: give one a block.")
    found, left = list[int](), stream.tokens
    for number, count in enumerate(merges):
        most = most_merged(left, stream.protected)
        if not 0 <= count <= most:
            raise BadInput(f"block {number} has {left} tokens: 0 to {most} of them can be merged, not {count}.")
        left -= count
        found.append(left)
    return found


@dataclass(frozen=True)
class Gap:
    """A network in which tokens behind some blocks are picked by their places, as nothing else is."""

    network: Network
    breaks: tuple[str, ...]
    """Values of the picked tokens."""
    end: str
    """The value that has the tokens in their first order again."""


def broken(layout: Layout, stream: TokenStream, used: Sequence[int], places: Sequence[np.ndarray]) -> Gap:
    """Return the network with a Gather behind the attention of the blocks `used`, and one that undoes all at the end.

    What meets the scores behind the first of them is picked by its own places, always in order.
    """
    network = layout.structure.network
    editor = Editor(layout.structure, network.model.clone(), {})
    names, order = list[str](), np.arange(stream.tokens)
    for number, picked in zip(used, places, strict=True):
        names.append(_picked(editor, stream.blocks[number].leaves, picked))
        order = order[picked]
    same = editor.constant(np.arange(stream.tokens), "places")
    for block in stream.blocks[used[0] + 1 :]:
        for name, place in block.added:
            node = network.producer[name]
            copy, axes = editor.nodes[node.index], layout.structure.axes[node.inputs[place]]
            for axis in range(max(0, len(axes) - 2), len(axes)):
                if axes[axis].size == stream.tokens:
                    value = copy.inputs[place]
                    copy.replace_input_with(place, editor.before(copy, "Gather", [value, same], {"axis": axis}))
    end = _picked(editor, stream.end, np.argsort(order))
    return Gap(Network(editor.model, network.source), tuple(names), end)


def _picked(editor: Editor, name: str, places: np.ndarray) -> str:
    """Let all readers of a value read it by these places of its tokens; returns the name of what they read."""
    node = editor.structure.network.producer[name]
    value = next(each for each in editor.nodes[node.index].outputs if each.name == name)
    behind = ir.node("Gather", [value, editor.constant(places, "places")], {"axis": 1})
    picked = behind.outputs[0]
    if value.is_graph_output():
        value.name, picked.name = editor.named("before"), name
        picked.type, picked.shape = value.type, value.shape
    else:
        picked.name = editor.named("tokens")
    value.replace_all_uses_with(picked, replace_graph_outputs=True)
    editor.model.graph.insert_after(editor.nodes[node.index], behind)
    behind.replace_input_with(0, value)
    assert picked.name is not None
    return picked.name


def _prove_alike(network: Network, permuted: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises: BadInput: outputs depend on where tokens stand in the stream."""
    one, other = (Program(each, dtype=torch.float64) for each in (network, permuted))
    with torch.no_grad():
        for feeds in probes:
            wanted, found = one(feeds).outputs, other(feeds).outputs
            worst = max(difference(found[name], value) for name, value in wanted.items())
            if not worst <= TOLERANCE:
                raise BadInput(
                    f"{network.source}: outputs change by {worst:.1e} of the largest one when its tokens change "
                    "places: it treats them by where they stand, as with relative positions or windows, and tokens "
                    "cannot be merged. Leave out --tokens."
                )


def _check_apart(structure: Structure, kept: Mapping[Axis, np.ndarray], blocks: int) -> None:
    """Raises: BadInput: tokens of several blocks are one axis, or weights have tokens."""
    weights = [
        use.weight
        for use in structure.uses
        if (structure.network.nodes[use.node].op, use.place) != ("Gather", 1)
        and any(touched(axis, kept) for axis in use.axes)
    ]
    tied = [port.name for port in structure.network.inputs for axis in structure.axes[port.name] if touched(axis, kept)]
    if len(kept) < blocks or weights or tied or any(leaf.kind != "leaf" for leaf in kept):
        what = ", ".join(dict.fromkeys([*weights, *tied])) or "several blocks"
        raise BadInput(
            f"{structure.network.source}: the number of tokens in one block is tied to {what[:200]}, so that tokens "
            "cannot be merged. Leave out --tokens."
        )


def _check_there(network: Network, stream: TokenStream) -> None:
    """Raises: BadInput: a cut left out an attention."""
    blocks = [name for block in stream.blocks for name in (block.weights, block.keys, block.leaves)]
    gone = [name for name in (*blocks, stream.end) if name not in network.producer]
    if gone:
        raise BadInput(
            f"{network.source}: the value {gone[0][:80]!r} is gone, with the whole branch that made it, so that tokens "
            "cannot be merged there. Keep a unit of each attention, or leave out --tokens."
        )


def _check_runs(network: Network, result: Network, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises: BadInput: merging left a graph that cannot be run, or gives outputs of other sizes."""
    one, other = Program(network), Program(result)
    with torch.no_grad():
        for feeds in probes:
            try:
                found = other(feeds).outputs
            except (BadInput, LookupError) as err:
                raise BadInput(f"{network.source}: tokens cannot be merged: {err} Leave out --tokens.") from err
            for name, value in one(feeds).outputs.items():
                if found[name].shape != value.shape:
                    raise BadInput(
                        f"{network.source}: with merged tokens the output {name!r} is {tuple(found[name].shape)}, not "
                        f"{tuple(value.shape)}. Leave out --tokens."
                    )


def _check_opset(network: Network) -> None:
    imports = network.model.graph.opset_imports or network.model.opset_imports
    opset = imports.get("", OPSET)
    if opset < OPSET:
        raise BadInput(f"{network.source} has opset {opset}: tokens are merged from opset {OPSET} on. Export it anew.")


def _lowered(gap: Gap, cut: Cut, stream: TokenStream, merges: Sequence[int]) -> Network:
    """Cut the numbers of tokens, and put the merging itself into the gaps."""

    def made(name: str) -> ir.Value:
        node = cut.nodes[gap.network.producer[name].index]
        return next(value for value in node.outputs if value.name == name)

    gaps = [made(name).producer() for name in gap.breaks]
    end = made(gap.end).producer()
    attentions = [(made(block.weights).producer(), made(block.keys)) for block in stream.blocks]
    cut.make()
    tensors, types = cut.structure.shapes.tensors, {kind: ir.DataType(n) for n, kind in REAL_TYPES.items()}
    scores = [gap.network.producer[block.weights].inputs[0] for block in stream.blocks]
    kinds = [
        (types[tensors[score].dtype], types[tensors[block.keys].dtype])
        for score, block in zip(scores, stream.blocks, strict=True)
    ]
    work, places = Merging(cut, types[tensors[gap.end].dtype], stream), iter(gaps)
    for (softmax, keys), kind, count in zip(attentions, kinds, merges, strict=True):
        assert softmax is not None
        work.attend(softmax, kind[0])
        if count:
            place = next(places)
            assert place is not None
            work.merge(place, keys, kind[1], count)
    assert end is not None
    work.restore(end)
    return Network(RemoveUnusedNodesPass()(cut.model).model, gap.network.source)


@dataclass(frozen=True)
class Step:
    """One merge: places that a run finds, each (samples, places, 1)."""

    tokens: int
    """Before it."""
    order: ir.Value
    """Tokens at even places, by their number among those: first those that stay, then those that go."""
    into: ir.Value
    """Of those that go, the token at an odd place that each becomes a part of."""


class Merging:
    """The graph while merges are put in."""

    def __init__(self, cut: Editor, real: ir.DataType, stream: TokenStream) -> None:
        """Args: real: type of the values of the stream."""
        self._cut, self._real, self._stream = cut, real, stream
        self._left = stream.tokens
        self._steps: list[Step] = []
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

    def merge(self, gap: ir.Node, keys: ir.Value, kind: ir.DataType, count: int) -> None:
        """Put the merging of so many tokens in the place of a gap.

        Args: keys: (samples, heads, width, tokens). kind: type of the keys.
        """
        before, even, odd = self._left, (self._left + 1) // 2, self._left // 2
        tokens = gap.inputs[0]
        found, places = self._alike(gap, keys, kind)
        _, order = self._top(gap, found, even)
        goes = self._slice(gap, order, 0, count, 1)
        stays = self._sorted(gap, self._slice(gap, order, count, even, 1), even - count)
        into = self._put(gap, "GatherElements", places, goes, axis=1)
        sizes = self._sizes or self._ones(gap, tokens)
        both = self._put(gap, "Concat", self._put(gap, "Mul", tokens, sizes), sizes, axis=2)
        first, second = (self._slice(gap, both, start, before, 1, 2) for start in (0, 1))
        kept = self._put(gap, "GatherND", first, stays, batch_dims=1)
        moved = self._put(gap, "GatherND", first, goes, batch_dims=1)
        hot = self._put(gap, "Equal", into, self._cut.constant(np.arange(odd).reshape(1, 1, -1), "places"))
        hot = self._put(gap, "Transpose", self._put(gap, "Cast", hot, to=int(self._real)), perm=[0, 2, 1])
        second = self._put(gap, "Add", second, self._put(gap, "MatMul", hot, moved))
        out = self._put(gap, "Concat", kept, second, axis=1)
        if self._stream.protected > 1:
            out = self._put(gap, "Gather", out, self._cut.constant(self._front(even - count, odd), "places"), axis=1)
        width = self._width(gap)
        self._sizes = self._slice(gap, out, width, width + 1, 2)
        result = self._put(gap, "Div", self._slice(gap, out, 0, width, 2), self._sizes)
        bias = self._put(gap, "Transpose", self._put(gap, "Log", self._sizes), perm=[0, 2, 1])
        self._bias = self._put(gap, "Unsqueeze", bias, self._whole([1]))
        self._cut.renamed(gap, result)
        self._steps.append(Step(before, self._put(gap, "Concat", stays, goes, axis=1), into))
        self._left = before - count

    def restore(self, gap: ir.Node) -> None:
        """Give every token of the input the one that it became a part of."""
        tokens, place = gap.inputs[0], self._whole(np.arange(self._left).reshape(1, -1, 1))
        samples = self._put(gap, "Concat", self._samples(gap, tokens), self._whole([1, 1]), axis=0)
        place = self._put(gap, "Expand", place, samples)
        for step in reversed(self._steps):
            even, odd = (step.tokens + 1) // 2, step.tokens // 2
            kept = self._left_of(step) - odd
            if self._stream.protected > 1:
                back = np.argsort(self._front(kept, odd))
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

    def _front(self, kept: int, odd: int) -> np.ndarray:
        """An order of those that stay and then those at odd places, in which protected ones are in front again."""
        count = self._stream.protected
        first = [place // 2 + (kept if place % 2 else 0) for place in range(count)]
        return np.concatenate([first, np.setdiff1d(np.arange(kept + odd), first)])

    def _left_of(self, step: Step) -> int:
        after = self._steps.index(step) + 1
        return self._steps[after].tokens if after < len(self._steps) else self._left

    def _alike(self, gap: ir.Node, keys: ir.Value, kind: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """For each token at an even place the cosine to the most alike at an odd place, and which that is."""
        even, odd, kept = (self._left + 1) // 2, self._left // 2, self._stream.protected
        if kind != ir.DataType.FLOAT:  # narrow types round, and squares overflow
            keys = self._put(gap, "Cast", keys, to=int(ir.DataType.FLOAT))
        total = self._put(gap, "ReduceSum", keys, self._whole([1]), keepdims=0)
        total = self._put(gap, "Transpose", total, perm=[0, 2, 1])
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
        shape = self._put(gap, "Concat", self._samples(gap, tokens), self._whole([self._left, 1]), axis=0)
        return self._put(gap, "Expand", self._number(np.ones((1, 1, 1))), shape)

    def _samples(self, gap: ir.Node, tokens: ir.Value | None) -> ir.Value:
        return self._slice(gap, self._put(gap, "Shape", tokens), 0, 1, 0)

    def _sorted(self, gap: ir.Node, places: ir.Value, count: int) -> ir.Value:
        values, _ = self._top(gap, self._put(gap, "Cast", places, to=int(ir.DataType.FLOAT)), count, largest=0)
        return self._put(gap, "Cast", values, to=int(ir.DataType.INT64))

    def _inverse(self, gap: ir.Node, order: ir.Value, count: int) -> ir.Value:
        """Where each number stands in an order: what sorts it."""
        return self._top(gap, self._put(gap, "Cast", order, to=int(ir.DataType.FLOAT)), count, largest=0)[1]

    def _top(
        self, gap: ir.Node, value: ir.Value, count: int, *, axis: int = 1, largest: int = 1
    ) -> tuple[ir.Value, ir.Value]:
        how = {"axis": axis, "largest": largest, "sorted": 1}
        node = ir.node("TopK", [value, self._whole([count])], how, num_outputs=2)
        for output in node.outputs:
            output.name = self._cut.named("top")
        self._cut.model.graph.insert_before(gap, node)
        return node.outputs[0], node.outputs[1]

    def _slice(self, gap: ir.Node, value: ir.Value, start: int, end: int, axis: int, step: int = 1) -> ir.Value:
        return self._put(gap, "Slice", value, *(self._whole([each]) for each in (start, end, axis, step)))

    def _put(self, gap: ir.Node, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._cut.before(gap, op, inputs, attributes)

    def _whole(self, numbers: Any) -> ir.Value:
        return self._cut.constant(np.array(numbers, dtype=np.int64), "sizes")

    def _number(self, numbers: np.ndarray) -> ir.Value:
        return self._cut.constant(numbers.astype(self._real.numpy()), "numbers")

    def _width(self, gap: ir.Node) -> int:
        return self._cut.structure.axes[self._stream.end][2].size
