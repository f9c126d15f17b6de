"""Fine-tune a classifier in a plain loop, so that a task's model can be made again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.progress import Progress, silent


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


def train(
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    steps: int,
    recipe: Training,
    *,
    progress: Progress = silent,
) -> None:
    """AdamW on the parameters that require gradients; the model is left in training mode.

    Args: batches: `steps` pairs of inputs and labels, (rows,).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps, recipe.warmup))
    model.train()
    for step, (batch, labels) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(**batch)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)


def _rate(done: float, warmup: float) -> float:
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)
