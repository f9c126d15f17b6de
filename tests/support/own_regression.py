"""Ridge regressions as one least squares, what modules compute by hooks, and distances of outputs: nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from support.tiny_scoring import Batch, image_batch, rows, text_batch

Samples = Sequence[np.ndarray]
"""(rows, ..) each."""


def texts(seed: int = 0) -> list[Batch]:
    """40 texts in five batches."""
    found = [text_batch((3, 7, 5, 6, 9, 4, 8, 10), seed=seed + i) for i in range(5)]
    return [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in found]


def images(seed: int = 0) -> list[Batch]:
    """32 images in two batches."""
    return [image_batch(12, seed=seed), image_batch(20, seed=seed + 1)]


def ridge(a: np.ndarray, y: np.ndarray, strength: float, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """argmin mean |y - a w - b|^2 + strength * (mean variance of a) * |w|^2, as one least squares."""
    mean_a, mean_y = (each.mean(0) if centred else np.zeros(each.shape[1]) for each in (a, y))
    spread = np.sqrt(strength * ((a - mean_a) ** 2).mean(0).mean() * len(a)) if a.shape[1] else 0.0
    left = np.concatenate([a - mean_a, spread * np.eye(a.shape[1])])
    right = np.concatenate([y - mean_y, np.zeros((a.shape[1], y.shape[1]))])
    w = np.linalg.lstsq(left, right, rcond=None)[0] if a.shape[1] else np.zeros((0, y.shape[1]))
    return w, mean_y - mean_a @ w


def best_ridge(a: Samples, y: Samples, ridges: Sequence[float], centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The same from all samples, by the ridge of least error on every fifth."""

    def part(values: Samples, judged: bool) -> np.ndarray:
        return np.concatenate([each for i, each in enumerate(values) if (i % 5 == 4) is judged])

    def error(strength: float) -> float:
        w, b = ridge(part(a, False), part(y, False), strength, centred)
        return float(((part(y, True) - part(a, True) @ w - b) ** 2).sum())

    return ridge(np.concatenate(list(a)), np.concatenate(list(y)), min(ridges, key=error), centred)


def inputs_of(model: nn.Module, path: str, batches: Sequence[Batch]) -> list[np.ndarray]:
    """What goes into a module, real tokens only, (tokens, ..) a sample."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    found = []
    for batch, values in zip(batches, seen, strict=True):
        for i, row in enumerate(values):
            found.append((row[batch["attention_mask"][i].bool()] if "attention_mask" in batch else row).numpy())
    return found


def judged_rows(batches: Sequence[Batch], judged: bool, every: int = 4) -> list[Batch]:
    """Every so many-th sample over all batches, or the others, one a batch."""
    singles = [rows(batch, [i]) for batch in batches for i in range(len(next(iter(batch.values()))))]
    return [one for i, one in enumerate(singles) if (i % every == every - 1) is judged]


def distance(model: nn.Module, dense: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean over samples of KL, or of the squared distance of unit mean states."""
    found = []
    for batch in batches:
        with torch.no_grad():
            before, after = dense(**batch), model(**batch)
        if "logits" in before:
            p, q = before.logits.log_softmax(-1)[0], after.logits.log_softmax(-1)[0]
            found.append(float((p.exp() * (p - q)).sum()))
        else:
            mask = batch.get("attention_mask", torch.ones(before.last_hidden_state.shape[:2]))[0].bool()
            a, b = (x.last_hidden_state[0][mask].mean(0) for x in (before, after))
            found.append(float((a / a.norm() - b / b.norm()).square().sum()))
    return float(np.mean(found))
