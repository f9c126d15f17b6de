"""Pool the states of tokens by nodes at the end of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

MASK = "attention_mask"
AXES_GIVEN = {"Unsqueeze": 13, "ReduceSum": 13, "ReduceMean": 18}
"""Operator sets from which axes are an input."""


class PoolingNodes:
    """Nodes behind the last ones of a graph."""

    def __init__(self, model: ir.Model, taken: set[str]) -> None:
        """Args: model: is changed. taken: names of its values."""
        self.graph, self.taken = model.graph, taken
        self.opset = (model.graph.opset_imports or model.opset_imports)[""]

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
        return self._stored(ir.tensor(array.astype(np.int64)), self.named("pooling.number"))

    def weight(self, tensor: Tensor, hint: str) -> ir.Value:
        """Add a weight."""
        name = self.named(hint)
        return self._stored(ir.tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name), name)

    def _stored(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor)
        value.shape = ir.Shape(tensor.shape.numpy())
        self.graph.register_initializer(value)
        return value

    def named(self, hint: str) -> str:
        """Return a name that no value has."""
        while hint in self.taken:
            hint += "."
        self.taken.add(hint)
        return hint
