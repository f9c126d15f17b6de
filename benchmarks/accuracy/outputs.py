"""What a network puts out on rows, by ONNX Runtime: the file is judged as it is served."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from benchmarks.accuracy.rival import arrays
from optin_deploy.network.graph import Network
from optin_deploy.network.write import write


def outputs_of(
    network: Network | onnx.ModelProto, output: str, batches: Sequence[Mapping[str, Tensor]], longest: int
) -> Tensor:
    """One output of a network on all rows, (rows, ...).

    Args: longest: tokens of a text that a file of fixed sizes takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        fed = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
        if isinstance(network, Network):
            write(network, path)
        else:
            onnx.save(network, path)
            fed = arrays(batches, longest)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of folds that it leaves out
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        found = [session.run([output], {name: batch[name] for name in names})[0] for batch in fed]
    rows = [len(next(iter(batch.values()))) for batch in batches]
    return torch.cat([torch.from_numpy(each[:count]) for each, count in zip(found, rows, strict=True)])


def divergence(dense: Tensor, given: Tensor) -> float:
    """Mean over rows, of logits."""
    p, q = (values.double().log_softmax(-1) for values in (dense, given))
    return float((p.exp() * (p - q)).sum(-1).mean())
