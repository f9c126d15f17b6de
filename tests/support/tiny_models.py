"""Tiny transformers models of many architectures and their batches: what the tests of whole jobs run on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# initializer_range: about 1 / sqrt(hidden). With transformers' 0.02 a tiny model hardly depends on its weights.
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "initializer_range": 0.15,
    "num_labels": 4,
}
TEXT = {**SIZES, "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
# Released models of the RoBERTa family have one token type, so they take no token_type_ids.
ROBERTA = {**TEXT, "type_vocab_size": 1, "pad_token_id": 1}
IMAGE = {**SIZES, "intermediate_size": 80, "image_size": 32, "patch_size": 8}
DINOV2 = {**SIZES, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}
DISTILBERT = {
    **{"dim": 48, "n_layers": 3, "n_heads": 6, "hidden_dim": 80, "initializer_range": 0.15, "num_labels": 4},
    **{"vocab_size": 100, "max_position_embeddings": 64},
}
GPT2 = {
    **{"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 80, "initializer_range": 0.15, "num_labels": 4},
    **{"vocab_size": 100, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    "use_cache": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", TEXT),
    "roberta": ("Roberta", ROBERTA),
    "xlm-roberta": ("XLMRoberta", ROBERTA),
    "camembert": ("Camembert", ROBERTA),
    "electra": ("Electra", {**TEXT, "embedding_size": 24}),
    "distilbert": ("DistilBert", DISTILBERT),
    "vit": ("ViT", IMAGE),
    "vit-no-qkv-bias": ("ViT", {**IMAGE, "qkv_bias": False}),
    "deit": ("DeiT", IMAGE),
    "dinov2": ("Dinov2", DINOV2),
    "dinov2-swiglu": ("Dinov2", {**DINOV2, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegisters", DINOV2),
    "dinov2-registers-swiglu": ("Dinov2WithRegisters", {**DINOV2, "use_swiglu_ffn": True}),
    "gpt2": ("GPT2", GPT2),
}
"""Family -> prefix of its transformers classes, and the settings of a tiny config."""

HEADS = ("ForSequenceClassification", "ForImageClassification")


def class_names(family: str) -> tuple[str, ...]:
    """The base class of a family, and its classifier where transformers has one."""
    prefix = FAMILIES[family][0]
    return (f"{prefix}Model", *(f"{prefix}{head}" for head in HEADS if hasattr(transformers, f"{prefix}{head}")))


BASES = tuple(FAMILIES)
CLASSIFIERS = tuple(f"{family}+head" for family in FAMILIES if len(class_names(family)) > 1)
ALL = (*BASES, *CLASSIFIERS)
"""Names that `tiny_model` takes."""


def tiny_model(name: str) -> Any:
    """A model of its own for each call: `family`, or `family+head` for the classifier; in evaluation mode."""
    return copy.deepcopy(_built(name))


@cache
def _built(name: str) -> nn.Module:
    family, _, head = name.partition("+")
    prefix, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model: nn.Module = getattr(transformers, class_names(family)[-1 if head else 0])(config)
    # Fresh biases are 0 and fresh scales are 1: a lost bias or a forgotten LayerScale would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.8 * torch.rand_like(parameter) - 0.4
    return model.eval()


def tiny_batch(model: Any, *, batch: int, seq_len: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs; text rows but the first end in padding, images have the model's size."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)}
    ids = torch.randint(5, config.vocab_size, (batch, seq_len), generator=generator)
    lengths = torch.randint(2, seq_len, (batch, 1), generator=generator)
    lengths[0] = seq_len
    real = torch.arange(seq_len) < lengths  # (batch, seq_len)
    inputs = {"input_ids": ids.where(real, torch.tensor(config.pad_token_id)), "attention_mask": real.long()}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(seq_len) >= lengths // 2).long() * real
    return inputs


def tiny_batches(model: Any) -> list[dict[str, Tensor]]:
    """Calibration data: two batches that differ in size and length."""
    return [tiny_batch(model, batch=6, seq_len=16, seed=1), tiny_batch(model, batch=4, seq_len=9, seed=2)]


def probes(model: Any) -> list[dict[str, Tensor]]:
    """Inputs that no calibration saw: several samples, and a single one of another length."""
    return [tiny_batch(model, batch=3, seq_len=16, seed=3), tiny_batch(model, batch=1, seq_len=7, seed=4)]


def outputs(model: Any, batch: Mapping[str, Tensor], *, states: bool = True) -> dict[str, Tensor]:
    """Everything a model puts out, by name; with `states` also the hidden states after each layer."""
    with torch.no_grad():
        found = model(**batch, output_hidden_states=states)
    flat: dict[str, Tensor] = {}
    for name, value in found.items():
        flat |= {name: value} if isinstance(value, Tensor) else {f"{name}.{i}": each for i, each in enumerate(value)}
    return flat


def main_name(found: Collection[str]) -> str:
    """`logits` or `last_hidden_state`, by CONTRACT."""
    return "logits" if "logits" in found else "last_hidden_state"


def error(expected: Tensor, found: Tensor) -> float:
    """max |expected - found| / max(1, max |expected|), as CONTRACT defines parity; shapes must agree."""
    assert expected.shape == found.shape
    return float((expected - found).abs().max() / max(1.0, float(expected.abs().max())))


def largest_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest `error` over all outputs; both must have the same ones."""
    assert expected.keys() == found.keys()
    return max(error(expected[name], found[name]) for name in expected)
