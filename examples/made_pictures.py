"""Pictures that the examples draw themselves: a bar, a cross or a ring, anywhere and of any size, under noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = ("lying bar", "standing bar", "cross", "ring")
SIDE = 32
"""Pixels of a picture, across and down."""


def pictures(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures.

    Returns: the pictures (count, 3, SIDE, SIDE), and the number of the class of each.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=draw)
    centre = SIDE * (0.35 + 0.3 * torch.rand(2, count, 1, 1, generator=draw))
    reach = 7 + 4 * torch.rand(count, 1, 1, generator=draw)
    half = 1 + torch.rand(count, 1, 1, generator=draw)
    place = torch.arange(SIDE, dtype=torch.float32)
    across, down = (place.view(1, 1, SIDE) - centre[0]).abs(), (place.view(1, SIDE, 1) - centre[1]).abs()
    lying, standing = (down <= half) & (across <= reach), (across <= half) & (down <= reach)
    ring = ((across.square() + down.square()).sqrt() - reach).abs() <= half
    shapes = torch.stack([lying, standing, lying | standing, ring])[labels, torch.arange(count)]
    colours = torch.randn(count, 3, 1, 1, generator=draw).abs()
    colours = 1.5 * colours / colours.norm(dim=1, keepdim=True)
    noise = 0.4 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return shapes[:, None] * colours + noise, labels


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """What a network says of pictures: a plain tensor, or the only entry of what transformers and graphs give."""
    said = network(images)
    return said if isinstance(said, Tensor) else next(iter(said.values()))


def train(network: nn.Module, *, steps: int, rate: float) -> None:
    """Teach a network the classes, each step with pictures that it has not seen."""
    images, labels = pictures(64 * steps, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for some, right in zip(images.split(64), labels.split(64), strict=True):
        loss = functional.cross_entropy(logits(network, some), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def accuracy(network: nn.Module) -> float:
    """Share of a thousand other pictures that a network is right of."""
    images, labels = pictures(1000, seed=1)
    with torch.inference_mode():
        said = torch.cat([logits(network, some) for some in images.split(100)])
    return float((said.argmax(1) == labels).float().mean())
