"""Merge tokens that are alike inside a network, and give each its own place back where the stream of tokens ends.

How they are merged is in `cutting.merging`; the numbers of tokens are fixed, so that engines stay static.

At the end of the stream every token is its merged one again: whatever reads tokens there, such as a mean or a class
token, needs to know nothing. It is proven first that all blocks treat tokens alike, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from optin_deploy.cutting.editing import Editor
from optin_deploy.cutting.graph import GraphCut
from optin_deploy.cutting.merging import Merging
from optin_deploy.cutting.same import check_runs, prove_same
from optin_deploy.cutting.texts import shortened
from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, touched
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.structure.find import all_shapes
from optin_deploy.structure.flow import walk
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.structure import Structure
from optin_deploy.structure.tokens import TokenStream, most_merged, token_stream

OPSET = 13
"""Sums take their axes as an input from then on."""


@uncollected()
def merged(
    layout: Layout,
    merges: Sequence[int],
    probes: Sequence[Mapping[str, Tensor]],
    stream: TokenStream | None = None,
    *,
    proven: bool = False,
) -> Network:
    """Return a network that merges tokens; the given one is untouched.

    Args:
        merges: how many tokens go behind the attention of each block of `structure.tokens.token_stream`: they are
            merged into others, or, where the number is negative, dropped.
        probes: inputs on which it is proven that blocks treat tokens alike.
        stream: of the network that this one was cut from, whose values have the same names; None: it is looked for.
        proven: that was done before, for these blocks of this network, maybe for more.
    Raises: BadInput: there is no stream of tokens, a block has too few to merge so many, or it does not treat tokens
        alike.
    """
    stream = stream or token_stream(layout)
    left = counted(stream, merges)
    if not any(merges):
        return layout.structure.network
    _check_opset(layout.structure.network)
    _check_there(layout.structure.network, stream)
    if stream.of_text:
        if any(count > 0 for count in merges):
            raise BadInput(
                f"{layout.structure.network.source}: its tokens are those of a text, which are dropped, not merged. "
                "Add --drop-tokens; in a plan, numbers of dropped tokens are negative."
            )
        return shortened(layout, stream, left, probes, proven=proven)
    if not proven:
        _prove_alike(layout, stream, _used(merges), probes)
    result = _made(layout, stream, merges, probes)
    if not proven:
        check_runs(layout.structure.network, result, probes)
        if any(count > 0 for count in merges):
            _prove_weighed(layout, stream, _used(merges)[0], probes)
    return result


def _used(merges: Sequence[int]) -> tuple[int, ...]:
    return tuple(number for number, count in enumerate(merges) if count)


def _made(
    layout: Layout,
    stream: TokenStream,
    merges: Sequence[int],
    probes: Sequence[Mapping[str, Tensor]],
    directions: np.ndarray | None = None,
) -> Network:
    """The network that merges.

    Args: directions: in place of the keys of the first merge, (tokens, width).
    """
    used, counts = _used(merges), counted(stream, merges)
    gap = broken(layout, stream, used, [np.arange(stream.tokens)] * len(used))
    structure = walk(gap.network, all_shapes(gap.network, probes[0]))
    kept = {structure.axes[name][1].root: np.arange(counts[at]) for name, at in zip(gap.breaks, used, strict=True)}
    _check_apart(structure, kept, len(used))
    return _lowered(gap, GraphCut(structure, gap.network.model.clone(), kept), stream, merges, directions)


def counted(stream: TokenStream, merges: Sequence[int]) -> list[int]:
    """Return the tokens behind the attention of each block.

    Raises: BadInput: a block has too few to merge so many.
    """
    if len(merges) != len(stream.blocks):
        raise BadInput(
            f"merges for {len(merges)} blocks, where there are {len(stream.blocks)}: give a number for each."
        )
    found, left = list[int](), stream.tokens
    some = "% of the tokens" if stream.of_text else " tokens"
    for number, count in enumerate(merges):
        most = most_merged(left, stream.protected)
        if abs(count) > most:
            raise BadInput(
                f"block {number} has {left}{some}: 0 to {most} of them can be merged or dropped, not {abs(count)}."
            )
        left -= abs(count)
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
    value, node = editor.value(name), editor.structure.network.producer[name]
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


def _prove_alike(
    layout: Layout, stream: TokenStream, used: Sequence[int], probes: Sequence[Mapping[str, Tensor]]
) -> None:
    """Let tokens behind these blocks change places: nothing may change.

    Raises: BadInput.
    """
    order = np.random.default_rng(0)
    places = [order.permutation(stream.tokens) for _ in used]
    moved = broken(layout, stream, used, places).network
    why = "its tokens change places: it treats them by where they stand, as with relative positions or windows"
    prove_same(layout.structure.network, moved, probes, why)


def _prove_weighed(layout: Layout, stream: TokenStream, block: int, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Let tokens behind a block be the same as their neighbours, and merge these there: nothing may change.

    It does where something reads merged tokens and does not count how many each of them stands for.
    Raises: BadInput.
    """
    network = layout.structure.network
    editor = Editor(layout.structure, network.model.clone(), {})
    places = doubled(stream)
    name = _picked(editor, stream.blocks[block].leaves, places)
    double = Network(editor.model, network.source)
    merges = [0] * len(stream.blocks)
    merges[block] = most_merged(stream.tokens, stream.protected)
    blocks = [replace(each, leaves=name) if at == block else each for at, each in enumerate(stream.blocks)]
    merging = replace(stream, blocks=tuple(blocks))
    structure = walk(double, all_shapes(double, probes[0]))
    result = _made(Layout(structure, (), ()), merging, merges, probes, np.eye(stream.tokens, dtype=np.float32)[places])
    why = (
        "tokens that are equal become one that stands for them: something between its blocks does not count how many a "
        "token stands for, such as a mean of the tokens"
    )
    prove_same(double, result, probes, why)


def doubled(stream: TokenStream) -> np.ndarray:
    """Return places of tokens by which all that may go are the same as one beside them."""
    places = np.arange(stream.tokens)
    for place in range(2 * ((stream.protected + 1) // 2), stream.tokens, 2):
        places[place] = place + 1 if place + 1 < stream.tokens else place - 1
    return places


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
    gone = [name for name in (*blocks, stream.end) if name and name not in network.producer]
    if gone:
        raise BadInput(
            f"{network.source}: the value {gone[0][:80]!r} is gone, with the whole branch that made it, so that tokens "
            "cannot be merged there. Keep a unit of each attention, or leave out --tokens."
        )


def _check_opset(network: Network) -> None:
    imports = network.model.graph.opset_imports or network.model.opset_imports
    opset = imports.get("", OPSET)
    if opset < OPSET:
        raise BadInput(f"{network.source} has opset {opset}: tokens are merged from opset {OPSET} on. Export it anew.")


def _lowered(
    gap: Gap, cut: GraphCut, stream: TokenStream, merges: Sequence[int], directions: np.ndarray | None
) -> Network:
    """Cut the numbers of tokens, and put the merging itself into the gaps."""
    producer, tensors = gap.network.producer, cut.structure.shapes.tensors

    def type_of(name: str) -> ir.DataType:
        return from_torch_dtype(tensors[name].dtype)

    gaps = iter([cut.nodes[producer[name].index] for name in gap.breaks])
    end = cut.nodes[producer[gap.end].index]
    keys = [cut.value(block.keys) for block in stream.blocks]
    cut.make()
    work = Merging(cut, type_of(gap.end), stream)
    for block, key, count in zip(stream.blocks, keys, merges, strict=True):
        softmax = producer[block.weights]
        work.attend(cut.nodes[softmax.index], type_of(softmax.inputs[0]))
        if count:
            work.merge(next(gaps), key, type_of(block.keys), count, directions)
    work.restore(end)
    return Network(RemoveUnusedNodesPass()(cut.model).model, gap.network.source)
