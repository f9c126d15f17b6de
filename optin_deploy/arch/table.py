"""The architecture table: one row a family. Adding a model is adding a row (see CONTRIBUTING)."""

from __future__ import annotations

from dataclasses import replace

from optin_deploy.arch.spec import ArchSpec

BERT = ArchSpec(
    name="bert",
    model_types=frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"}),
    tested_with="transformers 5.23",
    blocks="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attn_out="attention.output.dense",
    core="attention.self",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    residual=("", "intermediate"),
)

DISTILBERT = ArchSpec(
    name="distilbert",
    model_types=frozenset({"distilbert"}),
    tested_with="transformers 5.23",
    blocks="transformer.layer",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attn_out="attention.out_lin",
    core="attention",
    ffn_in=("ffn.lin1",),
    ffn_out="ffn.lin2",
    residual=("", "ffn"),
)

VIT = ArchSpec(
    name="vit",
    model_types=frozenset({"vit", "deit"}),
    tested_with="transformers 5.23",
    blocks="layers",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    attn_out="attention.o_proj",
    core="attention",
    ffn_in=("mlp.fc1",),
    ffn_out="mlp.fc2",
    residual=("", "layernorm_after"),
)

DINOV2 = replace(
    VIT,
    name="dinov2",
    model_types=frozenset({"dinov2", "dinov2_with_registers"}),
    blocks="encoder.layer",
    residual=("", "norm2"),
    layer_scale=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)

DINOV2_SWIGLU = replace(
    DINOV2,
    name="dinov2-swiglu",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
)

GPT2 = ArchSpec(
    name="gpt2",
    model_types=frozenset({"gpt2"}),
    tested_with="transformers 5.23",
    blocks="h",
    qkv=("attn.c_attn",),
    attn_out="attn.c_proj",
    core="attn",
    ffn_in=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    residual=("", "ln_2"),
    split="split_size",
)

TABLE: tuple[ArchSpec, ...] = (BERT, DISTILBERT, VIT, DINOV2, DINOV2_SWIGLU, GPT2)
"""Searched in order; a row fits if it names the model type and all its paths exist."""
