"""Write network.onnx and rows.npz: stand-ins for a file of yours, and for rows of yours."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from cnn import trained
from made_pictures import SIDE, pictures


def main() -> None:
    """Train the network of cnn.py, and write it as an ONNX file whose batch may have any size."""
    names = {"input_names": ["pixels"], "output_names": ["logits"]}
    free = {"pixels": {0: "batch"}, "logits": {0: "batch"}}
    network, example = trained(), torch.zeros(1, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is quick, and says that it is the older one
        torch.onnx.export(network, (example,), "network.onnx", dynamic_axes=free, dynamo=False, **names)
    images, labels = pictures(400, seed=2)
    np.savez("rows.npz", pixels=images.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    main()
