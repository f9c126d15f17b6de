"""A row of the architecture table: where a family keeps its heads and FFN neurons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArchSpec:
    """Paths inside one block, relative to it; `blocks` is relative to the base model.

    `qkv`, `attn_out`, `ffn_in` and `ffn_out` name Linears or Conv1Ds. All of `qkv` read one tensor, once a forward, and
    so do all of `ffn_in`: compensation folds one map into them. `residual` may be "" for the block itself.
    """

    name: str
    model_types: frozenset[str]
    """`config.model_type` values that the row serves."""
    tested_with: str
    """Version of transformers whose module paths these are."""
    blocks: str
    """The ModuleList of blocks."""
    qkv: tuple[str, ...]
    """Three paths, or one that is fused: all queries, then all keys, then all values."""
    attn_out: str
    core: str
    """The attention module that returns a tuple; replaced when a layer loses all its heads."""
    ffn_in: tuple[str, ...]
    """One path, or two for a gated FFN."""
    ffn_out: str
    residual: tuple[str, str]
    """For attention and FFN: the module whose first argument is the tensor the branch is added to."""
    layer_scale: tuple[str, str] | None = None
    """Parameters that scale the two branches before they are added."""
    split: str | None = None
    """Attribute of `core` with the width of each part of a fused `qkv`, where the forward reads it there."""
