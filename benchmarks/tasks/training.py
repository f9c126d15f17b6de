"""Fine-tune a classifier in a plain loop, so that a task's model can be made again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optin_deploy.common.progress import Progress, silent
from optin_deploy.files.storage import atomic_folder
from optin_deploy.reporting.terminal import stage_bar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is fine-tuned: what the recipes of all tasks share."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0


def kept(folder: Path, name: str, make: Callable[[Progress], tuple[Any, Any]]) -> Path:
    """The folder of a model with its preprocessor, which are trained unless they are there."""
    if not folder.exists():
        with stage_bar(f"train {name}") as progress:
            made = make(progress)
        with atomic_folder(folder) as temporary:
            for part in made:
                part.save_pretrained(temporary)
    return folder


def shuffled(samples: Sequence[T], recipe: Training, draw: random.Random) -> list[list[T]]:
    """Batches of all epochs, each epoch in an order of its own."""
    orders = [draw.sample(samples, len(samples)) for _ in range(recipe.epochs)]
    return [order[i : i + recipe.batch_size] for order in orders for i in range(0, len(order), recipe.batch_size)]


def of_labels(model: nn.Module, batch: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
    """Cross-entropy of a classifier for inputs with labels, (rows,)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(**inputs)["logits"], labels)


def train(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int,
    recipe: Training,
    *,
    loss: Callable[[nn.Module, Any], Tensor] = of_labels,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress = silent,
) -> None:
    """Train the parameters that require gradients; the model is left in training mode.

    Args: batches: `steps` of what `loss` takes. optimizer: None: AdamW.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps, recipe.warmup))
    model.train()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)


def _rate(done: float, warmup: float) -> float:
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)
