"""A network in a 16-bit type: weights, constants and what is computed; inputs and outputs stay as they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes.exact import exact_nodes
from optin_deploy.exporters.passes.opset import raised
from optin_deploy.exporters.passes.schemas import Signature, fixed, signature, subgraphs, typed_by, types_of
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network

REAL = ir.DataType.FLOAT
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)
BF16_OPSET = 22
"""The first in which Conv and most others take bfloat16."""


@uncollected()
def typed(network: Network, precision: str) -> Network:
    """Return a network that computes in 16 bits what the given one computes in float32.

    Each operator's schema says what it takes: where that is not the 16-bit type (scales of a Resize), or where
    float32 is needed (see `exact`), casts are put around it. Finite numbers beyond the type's range become its largest
    ones. onnxruntime.transformers.float16 does not do it: it has no bfloat16, goes by a list of operators, holds the
    whole file as one message, leaves nodes out of order, and of the positions that rotate heads it makes float16.

    Args: precision: `fp16` or `bf16`.
    Raises: BadInput: float64, or another 16-bit type already; an operator without a schema; for bf16 an operator set
        that cannot be raised to 22.
    """
    to = TYPES[precision]
    stored = {weight.dtype for weight in network.weights.values()}
    other = next((dtype for dtype in TYPES.values() if dtype in stored), None)
    if other == to:
        return network
    wrong = other or (ir.DataType.DOUBLE if REAL not in stored and ir.DataType.DOUBLE in stored else None)
    if wrong is not None:
        raise BadInput(
            f"--precision {precision}: {network.source} holds weights of type {wrong.name}. Give the float32 network."
        )
    if precision == "bf16":
        network = raised(network, BF16_OPSET, precision)
    model = network.model.clone()
    typing = Typing(network, model, to)
    if typing.in_integers:
        raise BadInput(
            f"--precision {precision}: {network.source} computes in 8-bit integers ({typing.in_integers}), and 16-bit "
            "numbers would be rounded to other integers. Give the float32 network, or use this one as it is."
        )
    typing.make()
    return Network(RemoveUnusedNodesPass()(model).model, network.source)


class Typing:
    """The copy of a graph while its types change."""

    def __init__(self, network: Network, model: ir.Model, to: ir.DataType) -> None:
        self.model, self.to = model, to
        self.before = types_of(model.graph)
        """Types of values before the change."""
        self.now = dict(self.before)
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        """What a value became in another type."""
        real = {value.name or "": dtype == REAL for value, dtype in self.before.items() if value.graph is model.graph}
        nodes = list(model.graph)
        self.exact = {nodes[index] for index in exact_nodes(network, real, self._wanted())}
        self.taken = {value.name for value in self.before}

    @property
    def in_integers(self) -> str:
        """A node that rounds real numbers to 8 bits; empty: there is none."""
        for node in self.model.graph:
            rounded = {self.before.get(value) for value in node.outputs} & set(INTEGERS)
            if rounded and node.op_type != "Cast" and any(self.before.get(v) == REAL for v in node.inputs if v):
                return f"{node.op_type} {node.name or ''}".strip()
        return ""

    def _wanted(self) -> set[str]:
        """Names of values that some operator takes in float32 only."""
        found = set()
        for node in self.model.graph:
            declared = signature(node, self.model.graph.opset_imports)
            for place, value in enumerate(node.inputs):
                if value and self.before.get(value) == REAL and not declared.takes(declared.kind(place), self.to):
                    found.add(value.name or "")
        return found

    def make(self) -> None:
        """Change the copy."""
        self._change(self.model.graph)
        for (value, _), new in self.made.items():
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                name, graph = value.name, value.graph
                assert graph is not None
                assert name is not None
                graph.initializers.pop(name)
                new.name = name

    def _change(self, graph: ir.Graph) -> None:
        """Change a graph whose inputs and outputs keep their types."""
        for node in list(graph):
            declared = signature(node, self.model.graph.opset_imports)
            inner = subgraphs(node)
            for each in inner:
                self._change(each)
            kinds = set() if inner or node in self.exact else self._lowered(declared, node)
            for place, value in enumerate(node.inputs):
                if value is not None and self.before.get(value) == REAL:
                    wanted = self.to if declared.kind(place) in kinds else REAL
                    node.replace_input_with(place, self._as(value, wanted))
            for place, value in enumerate(node.outputs):
                if self.before.get(value) == REAL and declared.kind(place, output=True) in kinds:
                    self.now[value] = self.to
                    value.type = ir.TensorType(self.to)  # a new one: copies of a graph share their types
        for place, value in enumerate(graph.outputs):
            if self.before.get(value) == REAL != self.now[value]:
                graph.outputs[place] = self._output(graph, value)

    def _lowered(self, declared: Signature, node: ir.Node) -> set[str]:
        """Names of the sets of types of a node whose values become 16 bits wide."""
        unknown = {
            declared.kind(place) for place, value in enumerate(node.inputs) if value and value not in self.before
        }
        read = {
            declared.kind(place) for place, value in enumerate(node.inputs) if value and self.before.get(value) == REAL
        }
        kinds = {kind for kind in read - unknown if declared.takes(kind, self.to)}
        for place, value in enumerate(node.outputs):
            kind = declared.kind(place, output=True)
            by, dtype = typed_by(declared, node)
            if kind in read or fixed(kind) or self.before.get(value) != REAL or dtype != REAL or not by:
                continue
            if declared.takes(kind, self.to):
                self._tell(node, by)
                kinds.add(kind)
        return kinds

    def _tell(self, node: ir.Node, by: str) -> None:
        """Let an attribute tell the new type."""
        if by == "value":
            node.attributes[by] = ir.AttrTensor(by, self._converted(node.attributes[by].as_tensor()))
        else:
            node.attributes[by] = ir.AttrInt64(by, int(self.to))

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in a type, converted once for all that read it."""
        if self.now[value] == dtype:
            return value
        if (value, dtype) not in self.made:
            stored = value.const_value if value.is_initializer() else None
            name = self._named(f"{value.name}.{dtype.name.lower()}")
            graph = value.graph
            assert graph is not None
            if stored is not None:
                new = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
                new.const_value = self._converted(stored)
                graph.register_initializer(new)
            else:
                cast = self._cast(value, dtype)
                new = cast.outputs[0]
                new.name = name
                producer = value.producer()
                if producer is not None:
                    graph.insert_after(producer, cast)
                else:
                    graph.insert_before(graph[0], cast)
            self.now[new] = dtype
            self.made[value, dtype] = new
        return self.made[value, dtype]

    def _output(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """Let an output of a graph have the type that it had, and its name."""
        cast = self._cast(value, REAL)
        output = cast.outputs[0]
        output.name, value.name = value.name, self._named(f"{value.name}.{self.to.name.lower()}")
        graph.append(cast)
        return output

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Node:
        cast = ir.node("Cast", [value], {"to": int(dtype)})
        cast.name = self._named(f"{value.name}.to_{dtype.name.lower()}")
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
        return cast

    def _named(self, name: str) -> str:
        """Return a name that no value has."""
        while name in self.taken:
            name += "."
        self.taken.add(name)
        return name

    def _converted(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.LazyTensor(
            lambda: _narrow(tensor, self.to), dtype=self.to, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name
        )


def _narrow(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    """A stored tensor in a narrower type; finite numbers stay finite."""
    values = tensor.numpy()
    largest = np.float32(ml_dtypes.finfo(to.numpy()).max)  # type: ignore[no-untyped-call]
    kept = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return ir.Tensor(kept.astype(to.numpy()), dtype=to, name=tensor.name)
