"""Write release/model.onnx, which users have, and new/model.onnx, which is to replace it and has fewer channels."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn


def main() -> None:
    """Random weights: the gate looks at time alone."""
    torch.manual_seed(0)
    for folder, channels in (("release", 48), ("new", 32)):
        layers = nn.Conv2d(3, channels, 3, stride=2), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.ReLU()
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()
        file = Path(folder, "model.onnx")
        file.parent.mkdir(exist_ok=True)
        names = {"input_names": ["pixels"], "output_names": ["logits"]}
        free = {"pixels": {0: "batch"}, "logits": {0: "batch"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this exporter is quick, and says that it is the older one
            torch.onnx.export(network, (torch.zeros(1, 3, 64, 64),), file, dynamic_axes=free, dynamo=False, **names)


if __name__ == "__main__":
    main()
