"""Transformers models with seeded random weights, and the two pruned forms of each: `ragged` and `aligned`."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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

PRUNED = ("ragged", "aligned")
"""Variants, see `pruning_plan`."""
ALIGN, STEPS = 64, 256
"""Multiple of the aligned variant's neurons, and shares that are tried for a budget."""
FIRST_ID = 5
"""The first few ids are special in most vocabularies."""

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
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if seq is None:
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels.to(device)}
    inputs = {
        "input_ids": torch.randint(FIRST_ID, config.vocab_size, (batch, seq), generator=generator),
        "token_type_ids": torch.zeros(batch, seq, dtype=torch.long),
    }
    if padded:
        lengths = torch.randint(seq // 2, seq, (batch, 1), generator=generator)
        lengths[0] = seq
        inputs["attention_mask"] = (torch.arange(seq) < lengths).long()  # (batch, seq)
    return {name: value.to(device) for name, value in inputs.items()}


@dataclass(frozen=True)
class Costs:
    """MACs of one sample, counted by hand: of what is not cut, of a head, of a neuron."""

    tokens: int
    fixed: int
    head: int
    neuron: int
    recipe: Recipe

    @property
    def dense(self) -> int:
        """MACs of the whole model."""
        layers = self.recipe.layers
        return self.fixed + layers * (self.recipe.heads * self.head + self.recipe.neurons * self.neuron)

    def of(self, plan: Plan) -> int:
        """MACs of what a plan keeps."""
        heads, neurons = (sum(map(len, kept)) for kept in (plan.heads, plan.neurons))
        return self.fixed + heads * self.head + neurons * self.neuron


@dataclass(frozen=True)
class Plan:
    """Kept heads and neurons of each layer."""

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]

    @property
    def hash(self) -> str:
        """sha256 of both."""
        return hashlib.sha256(repr((self.heads, self.neurons)).encode()).hexdigest()


def costs(name: str, seq: int | None) -> Costs:
    """MACs of a model of the table: 4 n d h + 2 n^2 h a head, 2 n d a neuron.

    Args: seq: tokens of a text; images have their own number.
    """
    recipe = MODELS[name]
    patches, fixed = 0, 0
    if is_image(name):
        size, patch = recipe.extra["image_size"], recipe.extra["patch_size"]
        patches = (size // patch) ** 2
        fixed = patches * recipe.hidden * 3 * patch**2
    tokens = patches + (2 if recipe.family == "DeiT" else 1) if patches else seq or 1
    width = recipe.hidden // recipe.heads
    head = 4 * tokens * recipe.hidden * width + 2 * tokens**2 * width
    return Costs(tokens, fixed, head, 2 * tokens * recipe.hidden, recipe)


def pruning_plan(cost: Costs, variant: str, keep: float, *, seed: int = 0) -> Plan:
    """The plan of a pruned variant within a share of the dense MACs: as many units as fit.

    `ragged` has another width in every layer, and no multiples; `aligned` the same in all, neurons in multiples of 64.
    """
    recipe, generator = cost.recipe, torch.Generator().manual_seed(seed)
    levels = 0.75 + 0.5 * torch.rand(2, recipe.layers, generator=generator)

    def at(share: float) -> Plan:
        if variant == "aligned":
            heads = [max(1, int(share * recipe.heads))] * recipe.layers
            neurons = [max(ALIGN, int(share * recipe.neurons) // ALIGN * ALIGN)] * recipe.layers
        else:
            shares = (share * levels).clamp(max=1.0)
            heads = [max(1, int(each * recipe.heads)) for each in shares[0].tolist()]
            neurons = [max(1, int(each * recipe.neurons)) | 1 for each in shares[1].tolist()]
            neurons = [min(count, recipe.neurons - 1) for count in neurons]
        return Plan(
            tuple(_drawn(recipe.heads, count, generator) for count in heads),
            tuple(_drawn(recipe.neurons, count, generator) for count in neurons),
        )

    shares = [step / STEPS for step in range(1, STEPS + 1)]
    within = [plan for plan in map(at, shares) if cost.of(plan) <= keep * cost.dense]
    return max(within, key=cost.of)


def equal_plan(recipe: Recipe, *, heads: int, neurons: int) -> Plan:
    """The plan that keeps the first `heads` and `neurons` of every layer."""
    return Plan((tuple(range(heads)),) * recipe.layers, (tuple(range(neurons)),) * recipe.layers)


def _drawn(units: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(sorted(torch.randperm(units, generator=generator)[:count].tolist()))


def cut(model: nn.Module, recipe: Recipe, plan: Plan) -> nn.Module:
    """A copy with these heads and neurons, of torch alone: the suite runs where the product's packages are not.

    In each layer the projections are told by their sizes and their order: queries, keys, values, output.
    """
    smaller, width = copy.deepcopy(model), recipe.hidden // recipe.heads
    square, into = (recipe.hidden, recipe.hidden), (recipe.hidden, recipe.neurons)
    linear = [each for each in smaller.modules() if isinstance(each, nn.Linear)]
    projections = [each for each in linear if (each.in_features, each.out_features) == square]
    before = [each for each in linear if (each.in_features, each.out_features) == into]
    after = [each for each in linear if (each.out_features, each.in_features) == into]
    counted = [each for each in smaller.modules() if hasattr(each, "num_attention_heads")]
    for i, (heads, neurons) in enumerate(zip(plan.heads, plan.neurons, strict=True)):
        channels = torch.tensor([head * width + j for head in heads for j in range(width)], dtype=torch.long)
        kept = torch.tensor(neurons, dtype=torch.long)
        for each in projections[4 * i : 4 * i + 3]:
            _keep(each, channels, out=True)
        _keep(projections[4 * i + 3], channels, out=False)
        _keep(before[i], kept, out=True)
        _keep(after[i], kept, out=False)
        counted[i].num_attention_heads = len(heads)  # type: ignore[assignment]  # torch takes attributes for modules
    return smaller


def _keep(linear: nn.Linear, kept: Tensor, *, out: bool) -> None:
    """Keep some outputs, or some inputs."""
    kept = kept.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(0 if out else 1, kept), requires_grad=False)
    if not out:
        linear.in_features = len(kept)
        return
    linear.out_features = len(kept)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[kept], requires_grad=False)
