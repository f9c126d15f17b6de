"""The stream of tokens of a network: the blocks in which all tokens attend to each other, and where the stream ends.

Found by the algebra: attention is a Softmax over pairs of one axis, and the values that its branches are added to have
that axis too.
"""

from __future__ import annotations

from dataclasses import dataclass

from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, flat
from optin_deploy.network.graph import SIZES, Node, Port
from optin_deploy.structure.branches import REARRANGING, way_from, weight_place
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.stream import features
from optin_deploy.structure.structure import Structure

HUNDRED = 100
"""Texts have any number of tokens: of how many they are told."""
POINTWISE = ("Add", "Mul", "Div", "Sub", "Where", "Cast", "Identity", "Clip", "Max", "Min")
"""Operators between a product of queries and keys and its Softmax."""


@dataclass(frozen=True)
class SelfAttention:
    """Attention of all tokens to all tokens, and what it leaves in the stream."""

    weights: str
    """What the Softmax gives, (samples, heads, tokens, tokens)."""
    keys: str
    """Value of the keys, (samples, heads, width, tokens)."""
    added: tuple[tuple[str, int], ...]
    """Places at which something else with axes of tokens meets the scores, such as a mask: the node's value, and the
    place."""
    leaves: str
    """The value behind the residual Add, (samples, tokens, features)."""


@dataclass(frozen=True)
class TokenStream:
    """Blocks that share their tokens, in the order of work; values are told by names, which a cut does not change."""

    blocks: tuple[SelfAttention, ...]
    tokens: int
    """A hundred if any number of them may be given: numbers of tokens are percents then."""
    protected: int
    """The first so many tokens are none of the input's own: class, distillation and register tokens."""
    end: str = ""
    """The last value of the stream, (samples, tokens, features); none of a text, which is left with what stays."""

    @property
    def of_text(self) -> bool:
        """Whether the tokens are those of an input, of any number."""
        return not self.end


def token_stream(layout: Layout) -> TokenStream:
    """Find the first stream of tokens whose number is fixed; of a network that has none such, that of its input.

    Raises: BadInput: there is none, with the reason.
    """
    structure = layout.structure
    source = structure.network.source
    every = [block for node in structure.network.nodes if (block := _attention(structure, node)) is not None]
    free = {leaf for port in structure.network.inputs for each in structure.axes[port.name] for leaf in each.leaves()}
    found = [block for block in every if _tokens(structure, block.leaves).root not in free]
    if every and not found:
        axis = _tokens(structure, every[0].leaves)
        same = tuple(block for block in every if alike(_tokens(structure, block.leaves), axis))
        return TokenStream(same, HUNDRED, 1)
    if not found:
        raise BadInput(
            f"{source}: no attention of all tokens to all tokens with a residual Add behind it was found, so that "
            "tokens cannot be merged. Leave out --tokens."
        )
    axis = _tokens(structure, found[0].leaves)
    blocks = tuple(block for block in found if alike(_tokens(structure, block.leaves), axis))
    for port in structure.network.inputs:
        if len(port.shape or ()) > 3 and _free(port):
            raise BadInput(
                f"{source} takes images of any size ({port.name} {port.shape}), so that the number of its tokens is "
                "free. Export it for one size, or leave out --tokens."
            )
    if any(structure.axes[port.name][at] in axis.leaves() for port in structure.network.inputs for at in _free(port)):
        raise BadInput(
            f"{source}: its tokens are those of a text and others beside them, {axis!r}, so that it is not known which "
            "may go. Leave out --tokens."
        )
    *first, largest = parts = flat("sum", [axis])
    if any(part.size > largest.size for part in parts):
        raise BadInput(
            f"{source}: its tokens are {axis!r}; only tokens that stand before all others can be kept apart."
        )
    values = [each.value for each in features(layout)]
    streamed = [value for value in values if _is_stream(structure, value, axis)]
    made, last = structure.network.producer, blocks[-1].leaves
    if not streamed or streamed[-1] == last or made[streamed[-1]].index < made[last].index:
        raise BadInput(
            f"{source}: behind its last attention no more is added to its tokens, so that it is not known where they "
            "end, and they cannot be merged. Leave out --tokens."
        )
    return TokenStream(blocks, axis.size, sum(part.size for part in first), streamed[-1])


def most_merged(tokens: int, protected: int) -> int:
    """Return how many of some tokens can be merged in one block: those at even places that are not protected, but one
    that stays where none is.
    """
    even, odd = (tokens + 1) // 2, tokens // 2
    return max(0, even - max(1, (protected + 1) // 2)) if odd > protected // 2 else 0


def alike(one: Axis, other: Axis) -> bool:
    """Return whether two axes are the same by what is known of their leaves."""
    return tuple(one.leaves()) == tuple(other.leaves())


def _free(port: Port) -> list[int]:
    """Axes of an input, behind the first, whose sizes are free."""
    return [place for place, size in enumerate(port.shape or ()) if place and isinstance(size, str)]


def _tokens(structure: Structure, value: str) -> Axis:
    return structure.axes[value][1]


def _is_stream(structure: Structure, value: str, axis: Axis) -> bool:
    axes = structure.axes[value]
    return len(axes) == 3 and alike(axes[1], axis)


def _attention(structure: Structure, node: Node) -> SelfAttention | None:
    """The attention around a Softmax; None: it is none of all tokens to all tokens."""
    axes = structure.axes.get(node.inputs[0], ()) if node.op == "Softmax" else ()
    if len(axes) != 4 or node.get("axis", -1) % 4 != 3 or not alike(axes[2], axes[3]):
        return None
    behind, before = _leaves(structure, node), _scores(structure, node.inputs[0])
    if behind is None or before is None or not _is_stream(structure, behind, axes[3]):
        return None
    product, added = before
    keys = product.inputs[1]
    if len(structure.axes.get(keys, ())) != 4 or not alike(structure.axes[keys][3], axes[3]):
        return None
    return SelfAttention(node.outputs[0], keys, added, behind)


def _scores(structure: Structure, value: str) -> tuple[Node, tuple[tuple[str, int], ...]] | None:
    """The product of two activations that scores come from, and what meets them on the way."""
    network, added = structure.network, list[tuple[str, int]]()
    while (node := network.producer.get(value)) is not None:
        if node.op == "MatMul":
            live = network.fixed.isdisjoint(node.inputs)
            return (node, tuple(added)) if live and _pairs(structure, node.outputs[0]) else None
        ways = [place for place, name in enumerate(node.inputs) if name and _pairs(structure, name)]
        made = [place for place in ways if node.inputs[place] not in network.fixed]
        if node.op not in POINTWISE or not made:
            return None
        main = next((place for place in made if _comes_from_product(structure, node.inputs[place])), made[0])
        axes = structure.axes
        added += [
            (node.outputs[0], place)
            for place, name in enumerate(node.inputs)
            if place != main and max((structure.shapes.shape(name) or (1,))[-2:], default=1) > 1 and name in axes
        ]
        value = node.inputs[main]
    return None


def _comes_from_product(structure: Structure, value: str) -> bool:
    node = structure.network.producer.get(value)
    while node is not None and node.op in POINTWISE and node.inputs[0]:
        node = structure.network.producer.get(node.inputs[0])
    return node is not None and node.op == "MatMul"


def _pairs(structure: Structure, value: str) -> bool:
    """Whether a value is (samples, heads, tokens, tokens)."""
    shape = structure.shapes.shape(value) or ()
    return len(shape) == 4 and shape[2] == shape[3]


def _leaves(structure: Structure, softmax: Node) -> str | None:
    """What the residual Add behind an attention gives; None: there is none, or other things are on the way."""
    network, value, mixed = structure.network, softmax.outputs[0], False
    while True:
        readers = [(node, place) for node, place in network.consumers.get(value, ()) if node.op not in SIZES]
        if len(readers) != 1:
            return None
        node, place = readers[0]
        if node.op == "MatMul" and place == 0 and not mixed and weight_place(structure, node) is None:
            mixed = True
        elif mixed and node.op in ("MatMul", "Gemm") and weight_place(structure, node) is not None:
            way = way_from(structure, node.index)
            add = None if way.add is None else network.nodes[way.add[0]]
            return add.outputs[0] if add is not None and add.op == "Add" else None  # others give normalised values
        elif node.op not in REARRANGING or place:
            return None
        value = node.outputs[0]
