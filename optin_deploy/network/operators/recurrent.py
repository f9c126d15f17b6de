"""Recurrent layers, step by step. What they read may lose entries; their own units feed themselves and stay whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.quantized_products import dynamic_product
from optin_deploy.network.operators.row import Flow, Row, Unsupported, only

ITSELF = "units of a recurrent layer feed themselves"
STEPS = "steps of a recurrent layer follow each other"

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
}

ALL = slice(None)
Factor = Callable[[Tensor, slice], Tensor]
"""Multiplies by some rows of a matrix."""


def plain(matrix: Tensor) -> Factor:
    """Make the product with a matrix of (gates x units, entries)."""
    return lambda x, rows: x @ matrix[rows].T


def ranged(matrix: Tensor, scale: Tensor, zero: Tensor | None) -> Factor:
    """Make the product with a matrix of whole numbers (entries, gates x units), by the range of the other factor."""
    return lambda x, _: dynamic_product(x, matrix, scale, zero)


@dataclass(frozen=True)
class Weights:
    """Weights of one direction of one layer; `units` rows belong to each gate."""

    units: int
    """Size of the hidden state."""
    again: Factor
    bias: Tensor
    """Bias of the recurrent product."""
    peepholes: Tensor | None
    functions: Sequence[Callable[[Tensor], Tensor]]
    late: bool
    """GRU: the reset gate comes after the recurrent product."""

    def product(self, hidden: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Multiply the hidden state by the rows of some gates, and add their bias."""
        rows = slice(first * self.units, None if last is None else last * self.units)
        return self.again(hidden, rows) + self.bias[rows]


Step = Callable[[Weights, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A step takes the input's part of all gates, the hidden state and the cell, and returns the next hidden state and
cell."""


def lstm(weights: Weights, given: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of a long short-term memory; gates lie in the order input, output, forget, cell."""
    gate, squash, show = weights.functions
    into, out, forget, new = (given + weights.product(hidden)).chunk(4, -1)
    of_in, of_out, of_forget = (0.0, 0.0, 0.0) if weights.peepholes is None else weights.peepholes.chunk(3)
    cell = gate(forget + of_forget * cell) * cell + gate(into + of_in * cell) * squash(new)
    return gate(out + of_out * cell) * show(cell), cell


def gru(weights: Weights, given: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of a gated recurrent unit; gates lie in the order update, reset, hidden."""
    gate, squash = weights.functions
    update, reset, new = given.chunk(3, -1)
    update_, reset_ = weights.product(hidden, 0, 2).chunk(2, -1)
    update, reset = gate(update + update_), gate(reset + reset_)
    again = reset * weights.product(hidden, 2, 3) if weights.late else weights.product(reset * hidden, 2, 3)
    return (1 - update) * squash(new + again) + update * hidden, cell


def rnn(weights: Weights, given: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of a plain recurrent layer."""
    return weights.functions[0](given + weights.product(hidden)), cell


@dataclass(frozen=True)
class RecurrentCell:
    """A kind of recurrent layer."""

    step: Step
    gates: int
    usual: tuple[str, ...]
    """Its activations where the node names none."""

    def compute(self, node: Node, x: Tensor, weight: Tensor, again: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        """Run the layer; weights are (directions, gates x units, entries)."""
        factors = [(plain(weight[side]), plain(again[side])) for side in range(len(weight))]
        return self.layer(node, x, again.shape[2], factors, *rest)

    def layer(
        self,
        node: Node,
        x: Tensor,
        units: int,
        factors: Sequence[tuple[Factor, Factor]],
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        *states: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run the layer in all directions.

        Args:
            node: with the form of the layer.
            x: (length, batch, entries), or the batch first where the node says so.
            units: size of the hidden state.
            factors: for each direction, the products with the input and with the hidden state.
            bias: (directions, twice gates x units).
            lengths: steps of each entry of the batch that are real.
            states: first hidden state, first cell, and weights of peepholes, as far as they are given.
        """
        only(node, input_forget=0, activation_alpha=None, activation_beta=None, clip=None)
        hidden, cell, peepholes = (*states, None, None, None)[:3]
        batch_first = bool(node.get("layout", 0))
        if batch_first:
            x = x.transpose(0, 1)
            hidden, cell = (state if state is None else state.transpose(0, 1) for state in (hidden, cell))
        if bias is None:
            bias = x.new_zeros(len(factors), 2 * self.gates * units)
        names = node.get("activations") or self.usual * len(factors)
        if not set(names) <= set(FUNCTIONS):
            raise Unsupported(f"{node.op} with the activations {', '.join(names)}")
        shown, last_hidden, last_cell = [], [], []
        for side, (into, again) in enumerate(factors):
            first, second = bias[side].chunk(2)
            part = names[side * len(self.usual) : (side + 1) * len(self.usual)]
            weights = Weights(
                units,
                again,
                second,
                None if peepholes is None else peepholes[side],
                [FUNCTIONS[name] for name in part],
                bool(node.get("linear_before_reset", 0)),
            )
            start = [x.new_zeros(x.shape[1], units) if state is None else state[side] for state in (hidden, cell)]
            backwards = side == 1 or node.get("direction", "forward") == "reverse"
            outputs, one, other = _run(self.step, weights, into(x, ALL) + first, start, lengths, backwards)
            shown.append(outputs)
            last_hidden.append(one)
            last_cell.append(other)
        y, y_hidden, y_cell = torch.stack(shown, 1), torch.stack(last_hidden), torch.stack(last_cell)
        if batch_first:
            y, y_hidden, y_cell = y.permute(2, 0, 1, 3), y_hidden.transpose(0, 1), y_cell.transpose(0, 1)
        return (y, y_hidden, y_cell)[: len(node.outputs)]


def _run(
    step: Step,
    weights: Weights,
    given: Tensor,
    states: Sequence[Tensor],
    lengths: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take all steps of one direction; rows that are shorter stay at their end, and give zeros behind it."""
    hidden, cell = states
    found: list[Tensor] = []
    for at in reversed(range(given.shape[0])) if backwards else range(given.shape[0]):
        new, new_cell = step(weights, given[at], hidden, cell)
        if lengths is None:
            hidden, cell = new, new_cell
            found.append(hidden)
            continue
        real = (at < lengths)[:, None]
        hidden, cell = torch.where(real, new, hidden), torch.where(real, new_cell, cell)
        found.append(torch.where(real, new, torch.zeros_like(new)))
    return torch.stack(found[::-1] if backwards else found), hidden, cell


def ranged_lstm(node: Node, x: Tensor, weight: Tensor, again: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """Run a long short-term memory with weights of whole numbers, (directions, entries, gates x units).

    Inputs and hidden states are quantised by their range, the latter step by step.
    """
    given, scales = rest[:5], rest[5:9]
    factors = []
    for side in range(len(weight)):
        into_scale, into_zero, again_scale, again_zero = (None if each is None else each[side] for each in scales)
        if into_scale is None or again_scale is None:
            raise Unsupported(f"{node.op} without scales")
        factors.append((ranged(weight[side], into_scale, into_zero), ranged(again[side], again_scale, again_zero)))
    return LSTM.layer(node, x, again.shape[1], factors, *given)


def axes(flow: Flow) -> None:
    """Flow of a recurrent layer, whose weights have the gates first, or last where they are whole numbers."""
    first, second, inner = flow.axes(0)
    whole = flow.node.op == "DynamicQuantizeLSTM"
    sides, *matrix = flow.axes(1)
    gates, read = reversed(matrix) if whole else matrix
    flow.unify(inner, read)
    flow.contract(0, 2)
    if whole:
        flow.ranged(0)
    units = flow.fresh(flow.shape(2)[1 if whole else 2], ITSELF)
    flow.macs([first, second, sides, gates, inner])
    flow.macs([first, second, sides, gates, units])
    flow.freeze([sides, gates], ITSELF)
    for place in range(2, len(flow.node.inputs)):
        if flow.has(place):
            flow.freeze(flow.axes(place), ITSELF)
    if flow.node.get("layout", 0):
        flow.freeze([second], STEPS)
        shown, state = [first, second, sides, units], [first, sides, units]
    else:
        flow.freeze([first], STEPS)
        shown, state = [first, sides, second, units], [sides, second, units]
    for place in range(len(flow.node.outputs)):
        flow.give(place, state if place else shown)


LSTM = RecurrentCell(lstm, 4, ("Sigmoid", "Tanh", "Tanh"))
GRU = RecurrentCell(gru, 3, ("Sigmoid", "Tanh"))
RNN = RecurrentCell(rnn, 1, ("Tanh",))
ROWS = (
    Row("LSTM", LSTM.compute, axes, factors=(0, 1)),
    Row("GRU", GRU.compute, axes, factors=(0, 1)),
    Row("RNN", RNN.compute, axes, factors=(0, 1)),
    Row("DynamicQuantizeLSTM", ranged_lstm, axes, domain="com.microsoft", factors=(0, 1)),
)
RECURRENT = tuple(row.name for row in ROWS)
"""Operators that read a sequence step by step."""
