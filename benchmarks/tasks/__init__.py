"""Real labelled tasks on which pruning decisions can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.tasks.convolutions import cifar10_efficientnet, cifar10_resnet
from benchmarks.tasks.deit import cifar10_deit
from benchmarks.tasks.images import cifar10, cifar10_larger
from benchmarks.tasks.task import Task
from benchmarks.tasks.text import newsgroups, r8, sentiment, topics

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Callable[[Path], Task]] = {
    "sentiment": sentiment,
    "r8": r8,
    "cifar10": cifar10,
    "cifar10-196": cifar10_larger,
    "cifar10-deit": cifar10_deit,
    "cifar10-resnet": cifar10_resnet,
    "cifar10-efficientnet": cifar10_efficientnet,
    "topics": topics,
    "newsgroups": newsgroups,
}
"""Each takes the folder that keeps downloads and trained models."""
