"""A text network that also gives one vector a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from exporters.passes.schemas import types_of
from optin_deploy.errors import BadInput
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network, Port
from optin_deploy.pooling import POOLED, POOLINGS

STATES, LOGITS, MASK = "last_hidden_state", "logits", "attention_mask"
AXES_GIVEN = {"Unsqueeze": 13, "ReduceSum": 13, "ReduceMean": 18}
"""Operator sets from which axes are an input."""


@uncollected()
def pooled(network: Network, how: str) -> Network:
    """Return a network with one more output, `sentence_embedding`: what `optin_deploy.pooling.pooled_states` gives.

    Its weights for the tokens are the input `attention_mask`; without one, all tokens count. In 16 bits a network is to
    be typed first and pooled then: the sums are in float32, as its outputs are.

    Args: how: one of `POOLINGS`.
    Raises: BadInput: unknown pooling; no output of states, (batch, tokens, hidden).
    """
    if how not in POOLINGS:
        raise BadInput(f"unknown --pool {how!r}; possible: {', '.join(POOLINGS)}.")
    model = network.model.clone()
    opset = model.graph.opset_imports[""]
    states = model.graph.outputs[_states(network, how)]
    pooling = _Pooling(model, opset, {value.name or "" for value in types_of(model.graph)})
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    result = pooling.of_all(states, how) if mask is None else pooling.of_some(states, mask, how)
    result.name, result.type = POOLED, states.type
    result.shape = None if states.shape is None else ir.Shape([states.shape[0], states.shape[2]])
    model.graph.outputs.append(result)
    return Network(model, network.source)


def check_pool(network: Network, how: str, own: str | None) -> None:
    """Refuse a pooling that a network cannot have, or another one than it is judged by.

    Args: own: how its own files say that it is pooled; None: they say nothing.
    Raises: BadInput.
    """
    if how in POOLINGS and own not in (None, how):
        why = "its modules.json says so" if own != POOLINGS[0] else f"no modules.json beside it says {how}"
        raise BadInput(f"--pool {how}: this model is scored and judged by its {own} ({why}). Give --pool {own}.")
    pooled(network, how)


def _states(network: Network, how: str) -> int:
    """Place of the output that holds the states of all tokens."""
    names = [port.name for port in network.outputs]
    if POOLED in names:
        raise BadInput(f"--pool {how}: {network.source} gives {POOLED} already. Leave --pool out.")
    places = [place for place, port in enumerate(network.outputs) if _holds_states(port)]
    place = names.index(STATES) if STATES in names else next(iter(places), None)
    if place is None or not _holds_states(network.outputs[place]):
        raise BadInput(
            f"--pool {how} is for feature-extraction, with an output (batch, tokens, hidden); {network.source} gives "
            f"{', '.join(f'{port.name} {_sizes(port)}' for port in network.outputs)}."
        )
    return place


def _holds_states(port: Port) -> bool:
    if port.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        return False
    return port.name == STATES if port.shape is None else len(port.shape) == 3 and port.name != LOGITS


def _sizes(port: Port) -> str:
    return f"({', '.join(map(str, port.shape))})" if port.shape is not None else "of unknown sizes"


class _Pooling:
    """Nodes behind the last ones of a graph."""

    def __init__(self, model: ir.Model, opset: int, taken: set[str]) -> None:
        self.graph, self.opset, self.taken = model.graph, opset, taken

    def of_some(self, states: ir.Value, mask: ir.Value, how: str) -> ir.Value:
        """Pool the tokens that a mask marks."""
        assert states.dtype is not None
        valid = self.node("Cast", [mask], {"to": int(states.dtype)})  # (batch, tokens)
        if how == "cls":
            counted = self.node("CumSum", [valid, self.constant(np.array(1))])
            one = self.node("Cast", [self.constant(np.array(1))], {"to": int(states.dtype)})
            first = self.node("Cast", [self.node("Equal", [counted, one])], {"to": int(states.dtype)})
            valid = self.node("Mul", [valid, first])
        weights = self.along("Unsqueeze", valid, 2)  # (batch, tokens, 1)
        total = self.along("ReduceSum", self.node("Mul", [states, weights]), 1)  # (batch, hidden)
        return self.node("Div", [total, self.along("ReduceSum", weights, 1)])

    def of_all(self, states: ir.Value, how: str) -> ir.Value:
        """Pool all tokens."""
        if how == "cls":
            return self.node("Gather", [states, self.constant(np.array(0))], {"axis": 1})
        return self.along("ReduceMean", states, 1)

    def along(self, op: str, value: ir.Value, axis: int) -> ir.Value:
        """Add a node that works along one axis."""
        more: dict[str, int | Sequence[int]] = {} if op == "Unsqueeze" else {"keepdims": 0}
        if self.opset >= AXES_GIVEN[op]:
            return self.node(op, [value, self.constant(np.array([axis]))], more)
        return self.node(op, [value], {"axes": [axis], **more})

    def node(
        self, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int | Sequence[int]] | None = None
    ) -> ir.Value:
        """Add a node; returns its output."""
        node = ir.node(op, inputs, attributes or {})
        node.name = node.outputs[0].name = self.named(f"pooling.{op.lower()}")
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add whole numbers."""
        stored = ir.tensor(array.astype(np.int64))
        value = ir.Value(name=self.named("pooling.number"), type=ir.TensorType(stored.dtype), const_value=stored)
        value.shape = ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def named(self, hint: str) -> str:
        """Return a name that no value has."""
        while hint in self.taken:
            hint += "."
        self.taken.add(hint)
        return hint
