"""Recurrent layers, step by step. What they read may lose entries; their own units feed themselves and stay whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row, Unsupported, only

ITSELF = "units of a recurrent layer feed themselves"
STEPS = "steps of a recurrent layer follow each other"

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
}


@dataclass(frozen=True)
class Weights:
    """Of one direction of one layer; `units` rows belong to each gate."""

    recurrent: Tensor
    bias: Tensor
    """Of the recurrent product."""
    peepholes: Tensor | None
    functions: Sequence[Callable[[Tensor], Tensor]]
    late: bool
    """GRU: the reset gate comes after the recurrent product."""

    @property
    def units(self) -> int:
        """Size of the hidden state."""
        return self.recurrent.shape[1]

    def product(self, hidden: Tensor, gates: slice = slice(None)) -> Tensor:
        """Multiply the hidden state by the rows of some gates."""
        rows = slice((gates.start or 0) * self.units, None if gates.stop is None else gates.stop * self.units)
        return hidden @ self.recurrent[rows].T + self.bias[rows]


Step = Callable[[Weights, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From what the input gives to all gates, the hidden state and the cell: the next hidden state and cell."""


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
    update_, reset_ = weights.product(hidden, slice(0, 2)).chunk(2, -1)
    update, reset = gate(update + update_), gate(reset + reset_)
    last = slice(2, 3)
    again = reset * weights.product(hidden, last) if weights.late else weights.product(reset * hidden, last)
    return (1 - update) * squash(new + again) + update * hidden, cell


def rnn(weights: Weights, given: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of a plain recurrent layer."""
    return weights.functions[0](given + weights.product(hidden)), cell


def recurrent(step: Step, gates: int, usual: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
    """Make the computation of a layer from one of its steps.

    Args:
        step: one step.
        gates: how many gates it has.
        usual: its activations where the node names none.
    """

    def compute(
        node: Node,
        x: Tensor,
        weight: Tensor,
        again: Tensor,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        hidden: Tensor | None = None,
        cell: Tensor | None = None,
        peepholes: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        only(node, input_forget=0, activation_alpha=None, activation_beta=None, clip=None)
        batch_first = bool(node.get("layout", 0))
        if batch_first:
            x = x.transpose(0, 1)
            hidden, cell = (state if state is None else state.transpose(0, 1) for state in (hidden, cell))
        directions, units = again.shape[0], again.shape[2]
        if bias is None:
            bias = x.new_zeros(directions, 2 * gates * units)
        names = node.get("activations") or list(usual) * directions
        if not set(names) <= set(FUNCTIONS):
            raise Unsupported(f"{node.op} with the activations {', '.join(names)}")
        shown, last_hidden, last_cell = [], [], []
        for side in range(directions):
            first, second = bias[side].chunk(2)
            part = names[side * len(usual) : (side + 1) * len(usual)]
            weights = Weights(
                again[side],
                second,
                None if peepholes is None else peepholes[side],
                [FUNCTIONS[name] for name in part],
                bool(node.get("linear_before_reset", 0)),
            )
            states = [x.new_zeros(x.shape[1], units) if state is None else state[side] for state in (hidden, cell)]
            backwards = side == 1 or node.get("direction", "forward") == "reverse"
            outputs, one, other = _run(step, weights, x @ weight[side].T + first, states, lengths, backwards)
            shown.append(outputs)
            last_hidden.append(one)
            last_cell.append(other)
        y, y_hidden, y_cell = torch.stack(shown, 1), torch.stack(last_hidden), torch.stack(last_cell)
        if batch_first:
            y, y_hidden, y_cell = y.permute(2, 0, 1, 3), y_hidden.transpose(0, 1), y_cell.transpose(0, 1)
        return (y, y_hidden, y_cell)[: len(node.outputs)]

    return compute


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


def recurrent_axes(flow: Flow) -> None:
    """Flow of a recurrent layer."""
    first, second, inner = flow.axes(0)
    sides, gates, read = flow.axes(1)
    flow.unify(inner, read)
    flow.contract(0, 2)
    units = flow.fresh(flow.shape(2)[2], ITSELF)
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
    for place, name in enumerate(flow.node.outputs):
        if name:
            flow.give(place, state if place else shown)


ROWS = (
    Row("LSTM", recurrent(lstm, 4, ("Sigmoid", "Tanh", "Tanh")), recurrent_axes, factors=(0, 1)),
    Row("GRU", recurrent(gru, 3, ("Sigmoid", "Tanh")), recurrent_axes, factors=(0, 1)),
    Row("RNN", recurrent(rnn, 1, ("Tanh",)), recurrent_axes, factors=(0, 1)),
)
