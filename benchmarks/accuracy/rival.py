"""onnxsim, another pruner of ONNX files, at a share of the MACs: its cut, its ranking and its ridge on the same rows.

It cuts heads and FFNs by one part of each, its option `sparsity`; that part is searched for. It ranks by norms of
weights, or by these times norms of activations (`wanda`), within each layer or all neurons at once; then it fits the
products that it cut by ridge regression to what they give in the dense network. It is given what torch exports, and
help: sizes of Reshapes as numbers, without which it leaves heads alone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks.accuracy.case import Case
from optin_deploy.errors import MissingDependency
from optin_deploy.network.examples import example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import prepared
from optin_deploy.network.run import Program
from optin_deploy.planning.costs import costs_of
from optin_deploy.structure.find import find

Batches = Sequence[Mapping[str, Tensor]]
STEPS = 12
"""Halvings of the interval of `sparsity`: heads are few, and channels at most some thousands."""
OPSET = 20
BATCH = 32
"""Rows at once, as the tasks make them."""
FUSES = ("fuse_qkv", "fuse_attention")
"""Passes of its simplifier that make products of attention which its own cut does not know in this form."""


@dataclass(frozen=True)
class Ranking:
    """How it ranks units."""

    wanda: bool = False
    """Norms of weights times norms of activations; else the former alone."""
    norm: str = "l2"
    everywhere: bool = False
    """All neurons of the network in one ranking, its `global_sparsity`; heads are always ranked within a layer."""

    def __str__(self) -> str:
        words = ["wanda" if self.wanda else "magnitude", self.norm, *(["global"] if self.everywhere else [])]
        return " ".join(words)


def pruned(case: Case, flops: float, ranking: Ranking) -> onnx.ModelProto:
    """Its file at a share of the MACs; it takes the sizes of `arrays` alone."""
    rows = arrays(case.batches, case.seq_len)
    dense = case.shared("export", lambda: exported(case.model, rows[0]))
    most = flops * macs(dense)
    # The counts follow from the part that goes alone, but for one ranking of all neurons.
    guess = case.shared(
        f"sparsity {flops:g} {ranking.everywhere}",
        lambda: least_sparsity(lambda part: macs(cut(dense, replace(ranking, wanda=False), part, rows)), most),
    )
    smaller = cut(dense, ranking, guess, rows)
    while macs(smaller) > most:
        guess += 2**-STEPS
        smaller = cut(dense, ranking, guess, rows)
    return repaired(dense, smaller, rows)


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of a file whose sizes are fixed."""
    return costs_of(find(read(model))).macs.dense


def exported(model: nn.Module, batch: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A classifier as torch exports it, then simplified by onnxsim for inputs of these sizes.

    Without fixed sizes its simplifier leaves head counts to be computed, and then no head is cut.
    """
    example: Any = example_of(model)
    free = {name: {place: torch.export.Dim(size, min=1, max=512) for place, size in axes.items()}
            for name, axes in example.axes.items()}  # fmt: skip
    with prepared(model), torch.no_grad(), quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        torch.onnx.export(
            _Logits(model, tuple(example.inputs)),
            tuple(example.inputs.values()),
            path,
            input_names=list(example.inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(free[name] for name in example.inputs),),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            external_data=False,
            verbose=False,
        )
        numbered = with_numbers(onnx.load(path), {name: torch.from_numpy(value) for name, value in batch.items()})
    sizes = {name: list(batch[name].shape) for name in example.inputs}
    how = {"overwrite_input_shapes": sizes, "skipped_optimizers": list(FUSES)}
    found: onnx.ModelProto = _onnxsim().simplify(numbered, **how)[0]
    return found


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.training = False

    def forward(self, *values: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, values, strict=True)))["logits"]
        return found


def with_numbers(model: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Write the sizes of all Reshapes as numbers, but for the one that grows with the rows, which becomes -1."""
    network = read(model)
    named = {node.outputs[0]: node for node in network.nodes if node.op == "Reshape"}
    both = [_shapes(network, list(named), some) for some in (inputs, {n: v[:1] for n, v in inputs.items()})]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        if node.op_type != "Reshape" or node.output[0] not in named:
            continue
        sizes = [
            one if one == other else -1 for one, other in zip(*(some[node.output[0]] for some in both), strict=True)
        ]
        name = f"{node.output[0]}.sizes"
        changed.graph.initializer.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), name))
        node.input[1] = name
        del node.attribute[:]
    return _alive(changed)


def _shapes(network: Network, names: Sequence[str], feeds: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Sizes of values in a run."""
    with torch.no_grad():
        run = Program(network)(feeds, watch=names)
    return {name: tuple(value.shape) for name, value in {**run.outputs, **run.watched}.items()}


def _alive(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove nodes whose results nobody reads."""
    while True:
        read_names = {name for node in model.graph.node for name in node.input}
        read_names |= {output.name for output in model.graph.output}
        dead = [node for node in model.graph.node if not read_names.intersection(node.output)]
        if not dead:
            return model
        for node in dead:
            model.graph.node.remove(node)


def cut(
    model: onnx.ModelProto, ranking: Ranking, sparsity: float, rows: Sequence[Mapping[str, np.ndarray]]
) -> onnx.ModelProto:
    """Its cut at a part of each group that goes."""
    onnxsim = _onnxsim()
    how: dict[str, Any] = {"importance_norm": ranking.norm}
    heads, structured = "apply_attention_head_pruning", "apply_structured_pruning"
    if ranking.wanda:
        heads, structured = "apply_attention_head_wanda_pruning", "apply_structured_wanda_pruning"
        how["calibration_data"] = rows
    smaller = getattr(onnxsim, heads)(model, sparsity=sparsity, **how)
    found: onnx.ModelProto = getattr(onnxsim, structured)(
        smaller, sparsity=sparsity, global_sparsity=ranking.everywhere, **how
    )
    return found


def repaired(
    dense: onnx.ModelProto, smaller: onnx.ModelProto, rows: Sequence[Mapping[str, np.ndarray]]
) -> onnx.ModelProto:
    """Its ridge regression, at its own strength."""
    found: onnx.ModelProto = _onnxsim().apply_pruning_finetune(dense, smaller, calibration_data=rows)
    return found


def least_sparsity(cost: Callable[[float], float], most: float) -> float:
    """The least part that goes at which no more than `most` is spent."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= most else (middle, high)
    return high


def arrays(batches: Batches, longest: int) -> list[dict[str, np.ndarray]]:
    """Rows in batches of one size: texts padded to the longest, batches filled with rows of their own."""
    found = []
    for batch in batches:
        one = {}
        for name, value in batch.items():
            padded = nn.functional.pad(value, (0, longest - value.shape[1])) if value.dim() == 2 else value
            one[name] = torch.cat([padded, *[padded[:1]] * (BATCH - len(padded))]).numpy()
        found.append(one)
    return found


def _onnxsim() -> Any:
    try:
        return import_module("onnxsim")
    except ImportError as err:
        raise MissingDependency("onnxsim is not installed. Run: pip install 'optin-deploy[peers]'") from err


@contextmanager
def quiet() -> Iterator[None]:
    """Silence notes of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
