"""A convolutional network, trained here for a few seconds, keeps half of its multiply-accumulates, and its accuracy."""

from __future__ import annotations

import torch
from torch import nn

import optin_deploy
from made_pictures import CLASSES, accuracy, pictures, train

FOLDER = "out/cnn"


def trained() -> nn.Module:
    """Three convolutions and a classifier that has learned the made pictures."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES))),
    )
    train(network, steps=120, rate=1e-2)
    return network


def main() -> None:
    """Train, prune, save, load, compare."""
    dense = trained()
    unlabeled, _ = pictures(256, seed=2)  # a stand-in for some hundred pictures of yours; labels are not needed
    pruned = optin_deploy.prune(dense, list(unlabeled.split(64)), flops=0.5)
    pruned.save(FOLDER)
    smaller = optin_deploy.load(FOLDER)  # in any later process; it takes a tensor and gives a dict of outputs
    macs, params = pruned.report["macs"], pruned.report["params"]
    print(f"MACs:       {macs['dense']:,} -> {macs['pruned']:,} ({macs['kept']:.1%})")
    print(f"parameters: {params['dense']:,} -> {params['pruned']:,}")
    print(f"accuracy:   {accuracy(dense):.1%} -> {accuracy(smaller):.1%}")
    for name, kept in pruned.plan.keep.items():  # what is not named stays whole
        print(f"{name}: {len(kept)} stay")


if __name__ == "__main__":
    main()
