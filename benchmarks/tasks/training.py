"""Fine-tune a classifier in a plain loop, so that a task's model can be made again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from optin_deploy.progress import Progress, silent


def train(
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    steps: int,
    *,
    learning_rate: float,
    warmup: float,
    clip: float,
    progress: Progress = silent,
) -> None:
    """AdamW on the parameters that require gradients; the model is left in training mode.

    Args:
        batches: `steps` pairs of inputs and labels, (rows,).
        warmup: share of the steps over which the learning rate rises; then it falls linearly to 0.
        clip: largest norm of the gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps, warmup))
    model.train()
    for step, (batch, labels) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(**batch)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)


def _rate(done: float, warmup: float) -> float:
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)
