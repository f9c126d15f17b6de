"""What the OPTIN score compares: token Grams of the blocks, and the model's outputs. Tensors in, tensors out.

Source: Khaki & Plataniotis, ICLR 2024 (arXiv 2403.17921), section 3; the normalisations are ours: Grams are per
sample over its own tokens and divided by the token count, so that long texts do not dominate.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

OutputKind = Literal["logits", "regression", "embedding"]
"""How two outputs are compared: KL divergence, squared error, squared distance of unit vectors."""


def valid_tokens(batch: Any, features: Tensor) -> Tensor:
    """Which tokens are real: the attention mask, or all for images. Shape (batch, tokens), 0 or 1."""
    mask = batch.get("attention_mask")
    return torch.ones(features.shape[:2]).to(features) if mask is None else mask.to(features)


def token_gram(features: Tensor, valid: Tensor) -> Tensor:
    """Cosine of every pair of a sample's tokens, divided by its token count.

    Args: features (batch, tokens, hidden); valid (batch, tokens).
    Returns: (batch, tokens, tokens); rows and columns of padding are zero.
    """
    unit = torch.nn.functional.normalize(features, dim=-1) * valid.unsqueeze(-1)
    return unit @ unit.transpose(1, 2) / valid.sum(1).view(-1, 1, 1)


def trajectory_distance(gram: Tensor, masked_gram: Tensor) -> Tensor:
    """Squared Frobenius distance of token Grams, (batch,): 0 when the masked unit changes nothing."""
    return (gram - masked_gram).square().sum((1, 2))


def output_kind(output: Any, problem_type: str | None = None) -> OutputKind:
    """Which comparison fits a model's output."""
    logits = output.get("logits")
    if logits is None:
        return "embedding"
    return "regression" if problem_type == "regression" or logits.shape[-1] == 1 else "logits"


def readout(output: Any, valid: Tensor) -> Tensor:
    """The vector that is compared: logits (batch, classes), or the unit mean over tokens (batch, hidden)."""
    logits: Tensor | None = output.get("logits")
    return pooled(output["last_hidden_state"], valid) if logits is None else logits


def pooled(states: Tensor, valid: Tensor) -> Tensor:
    """Mean over real tokens, scaled to unit length: (batch, tokens, hidden) -> (batch, hidden)."""
    weights = valid.unsqueeze(-1)
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def output_distance(kind: OutputKind, dense: Tensor, masked: Tensor) -> Tensor:
    """How far the output moved, per sample: (batch, classes or hidden) twice -> (batch,), never negative."""
    if kind == "logits":
        p, q = dense.log_softmax(-1), masked.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return (dense - masked).square().sum(-1)


def output_directions(kind: OutputKind, dense: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """Directions v with factor * sum of <v, J>^2 = the second-order output distance (exactly or on average).

    Args:
        dense: the readout, (batch, classes or hidden).
        noise: standard normal, (batch, probes, classes or hidden); used where exact directions would be too many.
    Returns: (batch, directions, classes or hidden), and the factor.
    KL(p || p_m) ~ 1/2 J^T (diag(p) - p p^T) J, and sqrt(p) * e - p <sqrt(p), e> has that covariance for
    random e; summed over unit vectors e it is exact, and for two classes one vector is.
    """
    classes = dense.shape[-1]
    if kind == "regression" and classes <= noise.shape[1]:
        return torch.eye(classes).to(dense).expand(len(dense), -1, -1), 1.0
    if kind != "logits":
        return noise, 1.0 / noise.shape[1]
    p = dense.softmax(-1).unsqueeze(1)  # (B, 1, C)
    root = p.sqrt()
    if classes == 2:
        draws, factor = torch.stack((root[..., 1], -root[..., 0]), -1), 0.5
    elif classes <= max(8, noise.shape[1]):
        draws, factor = torch.eye(classes).to(dense).expand(len(dense), -1, -1), 0.5
    else:
        draws, factor = noise, 0.5 / noise.shape[1]
    return root * draws - p * (root * draws).sum(-1, keepdim=True), factor
