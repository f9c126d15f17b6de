"""Pool the states of tokens by nodes at the end of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from optin_deploy.network.tensors import stored_in

MASK = "attention_mask"
AXES_GIVEN = {"Unsqueeze": 13, "ReduceSum": 13, "ReduceMean": 18, "ReduceMax": 18}
"""Operator sets from which axes are an input."""
LEAST = {int(ir.DataType.FLOAT): -3.4e38, int(ir.DataType.FLOAT16): -65504.0, int(ir.DataType.DOUBLE): -1e308}
"""Least numbers of real types; of others that of float32."""


class PoolingNodes:
    """Nodes behind the last ones of a graph."""

    def __init__(self, model: ir.Model, taken: set[str]) -> None:
        """Args: model: is changed. taken: names of its values."""
        self.graph, self.taken = model.graph, taken
        self.opset = (model.graph.opset_imports or model.opset_imports)[""]

    def of_some(self, states: ir.Value, mask: ir.Value, how: str) -> ir.Value:
        """Pool the tokens that a mask marks."""
        assert states.dtype is not None
        real = int(states.dtype)
        valid = self.node("Cast", [mask], {"to": real})  # (batch, tokens)
        if how == "max":
            padding = self.node("Equal", [self.along("Unsqueeze", valid, 2), self.number(0, real)])
            return self.along(
                "ReduceMax", self.node("Where", [padding, self.number(LEAST.get(real, -3.4e38), real), states]), 1
            )
        if how in ("cls", "lasttoken"):
            counted = self.node("CumSum", [valid, self.constant(np.array(1))])
            count = self.along("Unsqueeze", self.along("ReduceSum", valid, 1), 1)
            marks = self.node("Equal", [counted, self.number(1, real) if how == "cls" else count])
            valid = self.node("Mul", [valid, self.node("Cast", [marks], {"to": real})])
        elif how == "weightedmean":
            valid = self.node("Mul", [valid, self.node("CumSum", [valid, self.constant(np.array(1))])])
        weights = self.along("Unsqueeze", valid, 2)  # (batch, tokens, 1)
        total = self.along("ReduceSum", self.node("Mul", [states, weights]), 1)  # (batch, hidden)
        count = self.along("ReduceSum", weights, 1)
        return self.node("Div", [total, self.node("Sqrt", [count]) if how == "mean_sqrt_len_tokens" else count])

    def of_all(self, states: ir.Value, how: str) -> ir.Value:
        """Pool all tokens."""
        if how in ("cls", "lasttoken"):
            return self.node("Gather", [states, self.constant(np.array(0 if how == "cls" else -1))], {"axis": 1})
        if how in ("mean", "max"):
            return self.along("ReduceMean" if how == "mean" else "ReduceMax", states, 1)
        first = self.node("Gather", [states, self.constant(np.array(0))], {"axis": 2})
        return self.of_some(states, self.node("Equal", [first, first]), how)

    def layer(self, x: ir.Value, weight: Tensor, bias: Tensor | None, activation: str, real: int) -> ir.Value:
        """Add a dense layer: (batch, in) -> (batch, out).

        Args:
            weight: (out, in).
            activation: one of `feeds.embedding_head.ACTIVATIONS`.
            real: number of the type of the vectors, float32 or float64.
        """
        dtype = torch.float64 if real == ir.DataType.DOUBLE else torch.float32
        named = {"pooling.weight": weight} | ({} if bias is None else {"pooling.bias": bias})
        stored = [self.weight(tensor.to(dtype), name) for name, tensor in named.items()]
        made = self.node("Gemm", [x, *stored], {"transB": 1})
        if activation == "Identity":
            return made
        if activation == "SiLU":
            return self.node("Mul", [made, self.node("Sigmoid", [made])])
        if activation != "GELU":
            return self.node({"ReLU": "Relu"}.get(activation, activation), [made])
        inner = self.node("Erf", [self.node("Mul", [made, self.number(0.5**0.5, real)])])
        half = self.node("Mul", [made, self.number(0.5, real)])
        return self.node("Mul", [half, self.node("Add", [inner, self.number(1, real)])])

    def unit(self, x: ir.Value) -> ir.Value:
        """Add what scales rows to unit length: (batch, size) -> the same."""
        return self.node("LpNormalization", [x], {"axis": -1, "p": 2})

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
        return stored_in(self.graph, ir.tensor(array.astype(np.int64)), self.named("pooling.number"))

    def number(self, value: float, real: int) -> ir.Value:
        """Add one real number of a type."""
        tensor = ir.tensor(np.array(value, ir.DataType(real).numpy()))
        return stored_in(self.graph, tensor, self.named("pooling.number"))

    def weight(self, tensor: Tensor, hint: str) -> ir.Value:
        """Add a weight."""
        name = self.named(hint)
        held = ir.tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name)
        return stored_in(self.graph, held, name)

    def named(self, hint: str) -> str:
        """Return a name that no value has."""
        while hint in self.taken:
            hint += "."
        self.taken.add(hint)
        return hint
