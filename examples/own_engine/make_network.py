"""Write network.onnx and rows.npz: a small network with random weights, and rows of random numbers."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn


def main() -> None:
    """Three layers; the batch may have any size."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 768), nn.ReLU(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10)
    names = {"input_names": ["features"], "output_names": ["logits"]}
    free = {"features": {0: "batch"}, "logits": {0: "batch"}}
    network, example = nn.Sequential(*layers).eval(), torch.zeros(1, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is quick, and says that it is the older one
        torch.onnx.export(network, (example,), "network.onnx", dynamic_axes=free, dynamo=False, **names)
    np.savez("rows.npz", features=torch.randn(200, 64).numpy())


if __name__ == "__main__":
    main()
