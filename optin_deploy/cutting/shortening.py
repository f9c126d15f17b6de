"""The copy of a graph while tokens leave it: what reads values with all tokens gets those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.writing import Writer
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import SIZES, Network, Node
from optin_deploy.network.pooling_nodes import MASK
from optin_deploy.structure.structure import Structure
from optin_deploy.structure.tokens import HUNDRED, POINTWISE, SelfAttention

FIRST, LAST, PADDING = 2e9, 1e9, -1e9
"""Numbers that are added to the attention that a token receives."""
MEETING = (*POINTWISE, "MatMul", "And", "Or")
"""Operators that align their inputs from the right."""
RESIZING = ("Reshape", "Expand")
"""Operators whose second input holds sizes."""


@dataclass(frozen=True)
class DropStep:
    """What is left behind a block."""

    count: ir.Value
    """Tokens that stay, (1,)."""
    places: ir.Value
    """Original places of these tokens, (samples, count, 1)."""
    standing: ir.Value
    """What is added to the attention that they receive, (samples, count)."""


class Shortening(Writer):
    """The copy of a graph while tokens leave it."""

    def __init__(self, structure: Structure, cuts: Mapping[SelfAttention, int], *, moves: bool = False) -> None:
        """Args: cuts: percents that stay behind blocks. moves: all stay, twice and in another order."""
        super().__init__(Editor(structure, structure.network.model.clone(), {}))
        self._structure, self._moves = structure, moves
        self._cuts = {block.leaves: (block, share) for block, share in cuts.items()}
        samples, tokens, _ = structure.axes[next(iter(self._cuts))]
        self._samples, self._tokens = samples.root, tokens.root
        self._nodes = self._cut.nodes  # of the network, before any is put in
        self._length: ir.Value
        """How many tokens there are at first, (1,); known from the first step on."""
        self._steps: list[DropStep] = []
        self._behind: dict[str, int] = {}
        """Steps that values lie behind."""
        self._resized: set[str] = set()
        """Numbers that follow from the sizes of values behind a step."""
        self._of_tokens: set[str] = set()
        """Values that follow from such with tokens."""
        self._picked: dict[tuple[str, int, int], ir.Value] = {}
        """Values with all tokens, by what stays behind a step, for so many axes."""

    def made(self) -> Network:
        """The network that goes on with fewer tokens."""
        network = self._structure.network
        for node in network.nodes:
            self._follow(node)
            for name in node.outputs:
                if name in self._cuts:
                    self._drop(node, *self._cuts[name])
        return Network(RemoveUnusedNodesPass()(self._cut.model).model, network.source)

    def _follow(self, node: Node) -> None:
        """Let a node take what stays."""
        step = max((self._behind.get(name, 0) for name in node.inputs), default=0)
        counts = node.op in SIZES
        if (counts and step) or not self._resized.isdisjoint(node.inputs):
            self._resized.update(node.outputs)
        if not counts and any(name in self._of_tokens or self._places(name) for name in node.inputs):
            self._of_tokens.update(node.outputs)
        if not step or counts:
            return
        self._check_reads(node)
        for place, name in enumerate(node.inputs):
            if name not in self._behind:
                self._nodes[node.index].replace_input_with(place, self._fewer(node, place, step))
            elif self._places(name) and self._behind[name] < step:
                raise self._unknown(node, name)
        if node.op in RESIZING and node.inputs[1] not in self._resized:
            self._resize(node, step)
        self._behind |= dict.fromkeys(node.outputs, step)

    def _places(self, name: str) -> list[int]:
        """Axes of a value that tokens run along."""
        return [place for place, axis in enumerate(self._structure.axes.get(name, ())) if self._tokens in axis.leaves()]

    def _resize(self, node: Node, step: int) -> None:
        """Let the sizes that a node gives be those of the tokens that stay."""
        copy, places = self._nodes[node.index], self._places(node.outputs[0])
        known = self._structure.shapes.known(node.inputs[1])
        fixed = known if node.inputs[1] in self._structure.network.fixed else None
        if not places or (fixed is not None and all(fixed[place] < 2 for place in places)):
            return  # -1, 0 and 1 speak of whatever is there
        rank = len(self._structure.axes[node.outputs[0]])
        ours = self._cut.constant(np.isin(np.arange(rank), places), "tokens")
        sizes, whole = copy.inputs[1], self._length
        less = self._put(copy, "Div", self._put(copy, "Mul", sizes, self._steps[step - 1].count), whole)
        ours = self._put(copy, "And", ours, self._put(copy, "GreaterOrEqual", sizes, whole))
        copy.replace_input_with(1, self._put(copy, "Where", ours, less, sizes))

    def _fewer(self, node: Node, place: int, step: int, before: ir.Node | None = None) -> ir.Value | None:
        """What a node reads, of the tokens that stay: picked where it has tokens, made anew where it follows from them.

        Args: before: where that is put in; None: before the node, which aligns it with what else it reads.
        """
        name, copy = node.inputs[place], before or self._nodes[node.index]
        if not self._places(name) and name not in self._of_tokens:
            return self._nodes[node.index].inputs[place]
        aligned = node.outputs[0] if node.op in MEETING and before is None else name
        rank = len(self._structure.axes.get(aligned, ()))
        key = (name, step, rank)
        if key not in self._picked:
            value = self._nodes[node.index].inputs[place]
            assert value is not None
            made = (
                self._picked_by(copy, node, place, step, rank) if self._places(name) else self._again(copy, name, step)
            )
            self._picked[key] = made
        return self._picked[key]

    def _again(self, copy: ir.Node, name: str, step: int) -> ir.Value:
        """A value without tokens that follows from such with tokens: from those that stay."""
        node = self._structure.network.producer[name]
        self._check_reads(node)
        old = self._nodes[node.index]
        inputs = [self._fewer(node, place, step, copy) for place in range(len(node.inputs))]
        new = ir.Node(old.domain, old.op_type, inputs, old.attributes.values(), num_outputs=len(old.outputs))
        for value in new.outputs:
            value.name = self._cut.named("again")
        self._cut.model.graph.insert_before(copy, new)
        return new.outputs[node.outputs.index(name)]

    def _picked_by(self, copy: ir.Node, node: Node, place: int, step: int, rank: int) -> ir.Value:
        """A value that has all tokens, with those that stay, with axes of 1 in front of its own."""
        name = node.inputs[place]
        axes = self._structure.axes[name]
        missing = rank - len(axes)
        alone = all(axes[at].root is self._tokens for at in self._places(name))
        shared = missing or axes[0].size == 1
        if not alone or (not shared and axes[0].size != self._samples.size):
            raise self._unknown(node, name)
        value = self._nodes[node.index].inputs[place]
        assert value is not None
        if missing:
            value = self._put(copy, "Unsqueeze", value, self._whole(range(missing)))
        places = self._steps[step - 1].places
        if shared:
            shape = self._put(copy, "Concat", self._size(copy, places, 0), self._whole([1] * (rank - 1)), axis=0)
            value = self._put(copy, "Expand", value, shape)
        for at in self._places(name):
            order = [0, at + missing, *(n for n in range(1, rank) if n != at + missing)]
            value = self._put(copy, "Transpose", value, perm=order)
            value = self._put(copy, "GatherND", value, places, batch_dims=1)
            value = self._put(copy, "Transpose", value, perm=np.argsort(order).tolist())
        return value

    def _check_reads(self, node: Node) -> None:
        """Raises: BadInput: a graph inside of a node reads values of this one."""
        if len(self._nodes[node.index].inputs) < len(node.inputs):
            raise BadInput(
                f"{self._structure.network.source}: {node} holds a graph that reads values from outside of it, beside "
                "which tokens cannot leave. Leave out --tokens."
            )

    def _unknown(self, node: Node, name: str) -> BadInput:
        return BadInput(
            f"{self._structure.network.source}: {node} reads {name[:80]!r}, which has all tokens, beside what has "
            "fewer, in a way that is not known here. Leave out --tokens."
        )

    def _drop(self, node: Node, block: SelfAttention, share: int) -> None:
        """Let only a share of the tokens go on behind a node."""
        after = self._nodes[node.index + 1]
        value = self._cut.value(block.leaves)
        if self._behind.get(block.leaves, 0) < len(self._steps):
            raise BadInput(
                f"{self._structure.network.source}: its blocks do not follow on each other, so that their tokens "
                "cannot leave one after the other. Leave out --tokens."
            )
        if not self._steps:
            self._length = self._size(after, value, 1)
        before = self._steps[-1].standing if self._steps else self._standing(after, value)
        wanted = self._put(after, "Mul", self._length, self._whole([share]))
        wanted = self._put(after, "Add", wanted, self._whole([HUNDRED - 1]))  # rounded up
        both = self._put(after, "Min", self._length, self._whole([2]))  # the first and the last
        count = self._put(after, "Max", self._put(after, "Div", wanted, self._whole([HUNDRED])), both)
        if self._moves:
            count = self._put(after, "Mul", self._length, self._whole([2]))
        places = self._moved(after, before) if self._moves else self._most(after, block, before, count)
        column = self._put(after, "Unsqueeze", places, self._whole([2]))
        standing = self._put(after, "GatherND", before, column, batch_dims=1)
        first = column
        if self._steps:
            first = self._put(after, "GatherND", self._steps[-1].places, column, batch_dims=1)
        fewer = self._put(after, "GatherND", value, column, batch_dims=1)
        for reader, place in self._structure.network.consumers[block.leaves]:
            self._check_reads(reader)
            self._nodes[reader.index].replace_input_with(place, fewer)
        self._steps.append(DropStep(count, first, standing))
        self._behind[block.leaves] = len(self._steps)

    def _most(self, after: ir.Node, block: SelfAttention, standing: ir.Value, count: ir.Value) -> ir.Value:
        """Places of those that receive most attention, in order, (samples, count)."""
        weights = self._put(after, "Cast", self._cut.value(block.weights), to=int(ir.DataType.FLOAT))
        asked = self._put(after, "ReduceSum", weights, self._whole([1]), keepdims=0)
        real = self._put(after, "Greater", standing, self._real(PADDING / 2))
        real = self._put(after, "Cast", real, to=int(ir.DataType.FLOAT))
        asked = self._put(after, "MatMul", self._put(after, "Unsqueeze", real, self._whole([1])), asked)
        total = self._put(after, "Add", self._put(after, "Squeeze", asked, self._whole([1])), standing)
        return self._sorted(after, self._top(after, total, count)[1], count)

    def _moved(self, after: ir.Node, standing: ir.Value) -> ir.Value:
        """All places, the first one first and the others in another order; the first time twice, (samples, tokens)."""
        length = self._put(after, "Squeeze", self._size(after, standing, 1), self._whole([0]))
        zero, one, two = (self._whole(number) for number in (0, 1, 2))
        evens, odds = (self._put(after, "Range", start, length, two) for start in (two, one))
        order = [self._put(after, "Unsqueeze", zero, self._whole([0])), evens, odds]
        places = self._put(after, "Concat", *order, *([] if self._steps else order), axis=0)
        rows = self._put(after, "Concat", self._size(after, standing, 0), self._whole([1]), axis=0)
        return self._put(after, "Expand", places, rows)

    def _real(self, number: float) -> ir.Value:
        return self._cut.constant(np.array([number], np.float32), "standing")

    def _standing(self, after: ir.Node, value: ir.Value) -> ir.Value:
        """What is added to the attention that each token receives, (samples, tokens)."""
        shape = self._slice(after, self._put(after, "Shape", value), 0, 2, 0)
        length = self._put(after, "Squeeze", self._length, self._whole([0]))
        places = self._put(after, "Range", self._whole(0), length, self._whole(1))
        ones = self._put(after, "Expand", self._whole([[1]]), shape)
        given = next((port for port in self._cut.model.graph.inputs if port.name == MASK), None)
        sizes = [axis.size for axis in self._structure.axes.get(MASK, ())]  # what gathers from it ties no axes
        if given is not None and sizes == [self._samples.size, self._tokens.size]:
            if given.dtype is None or given.dtype.is_floating_point():
                raise BadInput(
                    f"{self._structure.network.source}: its {MASK} holds real numbers, of which it is not known what "
                    "marks padding. Export it with whole numbers, or leave out --tokens."
                )
            real = self._put(after, "Cast", given, to=int(ir.DataType.BOOL))
            ones = self._put(after, "Cast", real, to=int(ir.DataType.INT64))
        first, last = (self._put(after, "ArgMax", ones, axis=1, keepdims=1, select_last_index=at) for at in (0, 1))
        add = [self._real(number) for number in (FIRST, LAST, PADDING, 0.0)]
        found = self._put(after, "Where", self._put(after, "Equal", places, last), add[1], add[3])
        found = self._put(after, "Where", self._put(after, "Equal", places, first), add[0], found)
        return self._put(after, "Where", self._put(after, "Cast", ones, to=int(ir.DataType.BOOL)), found, add[2])
