"""Transformers models with seeded random weights, and the two pruned forms of each: `ragged` and `aligned`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.budget import Budget
from optin_deploy.cost.macs import MacCost
from optin_deploy.inputs import example_inputs
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.scoring.scores import Scores
from optin_deploy.search import make_plan, search


@dataclass(frozen=True)
class Recipe:
    """The sizes of one model."""

    family: str
    """Prefix of its transformers classes."""
    layers: int
    hidden: int
    heads: int
    neurons: int
    extra: Mapping[str, int]
    """Further config entries: image and patch size, or vocabulary and positions."""


TEXT = {"vocab_size": 30522, "max_position_embeddings": 512}
IMAGE = {"image_size": 224, "patch_size": 16}
MODELS = {
    "bert-base": Recipe("Bert", 12, 768, 12, 3072, TEXT),
    "bert-large": Recipe("Bert", 24, 1024, 16, 4096, TEXT),
    "deit-small": Recipe("DeiT", 12, 384, 6, 1536, IMAGE),
    "vit-base": Recipe("ViT", 12, 768, 12, 3072, IMAGE),
    "tiny": Recipe("Bert", 2, 64, 8, 512, {"vocab_size": 100, "max_position_embeddings": 64}),
    "tiny-vit": Recipe("ViT", 2, 64, 8, 512, {"image_size": 32, "patch_size": 8}),
}

PRUNED: dict[str, tuple[str, int]] = {"ragged": ("paper", 1), "aligned": ("uniform", 64)}
"""Name -> (allocation, align) of the search."""

ATTENTION = "optin_suite_sdpa"
"""transformers' sdpa, but without a mask where none is given: see `_register_attention`."""


def is_image(name: str) -> bool:
    """Does this model take pixels (True) or token ids?"""
    return "image_size" in MODELS[name].extra


def build(name: str, device: torch.device, *, seed: int = 0) -> nn.Module:
    """A dense base model (output `last_hidden_state`, no pooler) in float32, evaluation mode; downloads nothing."""
    import transformers

    recipe = MODELS[name]
    config = getattr(transformers, f"{recipe.family}Config")(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.neurons,
        # With transformers' 0.02 every branch is small beside the residual, and parity would hardly see a wrong one.
        initializer_range=1 / math.sqrt(recipe.hidden),
        **recipe.extra,
    )
    _register_attention()
    torch.manual_seed(seed)
    model = getattr(transformers, f"{recipe.family}Model")(config, add_pooling_layer=False)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # fresh biases are 0 and fresh scales 1: a lost one would not show
                parameter += 0.2 * torch.rand_like(parameter) - 0.1
    built: nn.Module = model.eval().to(device)
    return built


def _register_attention() -> None:
    """Make the attention the same in every engine.

    transformers' own sdpa drops a mask of ones when run eagerly, but builds one, even where none was given, while a
    CUDA graph is captured (5.17) or a model is exported: then flash attention is lost, and engines are not comparable.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(attention_mask: Tensor | None = None, **sizes: Any) -> Tensor | None:
        if attention_mask is None:
            return None
        made: Tensor | None = sdpa_mask(attention_mask=attention_mask, **sizes)
        return made

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask)


def model_inputs(
    model: nn.Module, device: torch.device, *, batch: int, seq: int | None, padded: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs on the device: full sequences without a mask, or (text) half to full ones with a mask."""
    inputs = example_inputs(model, batch=batch, seq_len=seq or 1, seed=seed)
    mask = inputs.pop("attention_mask", None)
    if padded and mask is not None and seq is not None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(seq // 2, seq, (batch, 1), generator=generator)
        lengths[0] = seq
        inputs["attention_mask"] = (torch.arange(seq) < lengths).long()  # (batch, seq)
    return {name: value.to(device) for name, value in inputs.items()}


def random_scores(layout: ModelLayout, cost: MacCost, *, seed: int = 0) -> Scores:
    """Scores as uneven as real ones: another level in every layer, and per MAC as high for heads as for neurons.

    (With plain uniform numbers the search would drop all heads: one costs as much as over a hundred neurons.)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(units: int, weight: float) -> Tensor:
        level = 0.75 + 0.5 * torch.rand(1, generator=generator)
        return level * weight * torch.rand(units, generator=generator)

    heads = tuple(draw(x.heads, h / n) for x, h, n in zip(layout.layers, cost.head, cost.neuron, strict=True))
    neurons = tuple(draw(x.neurons, 1.0) for x in layout.layers)
    return Scores(heads, neurons, layout.hash, {"scorer": "random", "seed": seed})


def pruning_plan(layout: ModelLayout, cost: MacCost, variant: str, keep: float, *, seed: int = 0) -> PruningPlan:
    """The plan of a pruned variant at a share of the dense MACs."""
    allocation, align = PRUNED[variant]
    scores = random_scores(layout, cost, seed=seed)
    return make_plan(search(scores, layout, cost, Budget(keep), align=align, allocation=allocation), layout, cost)


def equal_plan(layout: ModelLayout, cost: MacCost, *, heads: int, neurons: int) -> PruningPlan:
    """The plan that keeps the first `heads` and `neurons` of every layer."""

    def first(kept: int, units: int) -> tuple[bool, ...]:
        return tuple(unit < kept for unit in range(units))

    masks = Masks(
        tuple(first(heads, x.heads) for x in layout.layers),
        tuple(first(neurons, x.neurons) for x in layout.layers),
        layout.hash,
    )
    return make_plan(masks, layout, cost)
