"""Families of networks, one row each: a tiny random model, its inputs, and which of their axes may vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import nn

from benchmarks.zoo.family import VOCABULARY, Family, Input

hf: Any = transformers  # its configs take more names than their types tell

HIDDEN, LAYERS, HEADS, FFN, LABELS = 48, 2, 6, 80, 5


def _ids(name: str = "input_ids", axis: str = "length") -> Input:
    return Input(name, ("batch", axis), "ids")


def _mask(name: str = "attention_mask", axis: str = "length") -> Input:
    return Input(name, ("batch", axis), "mask")


TEXT = (_ids(), _mask())
DECODER_TEXT = (*TEXT, Input("encoder_hidden_states", ("batch", "source", HIDDEN)))
SOUND = (Input("input_features", ("batch", 20, 38)),)


def _image(size: int) -> tuple[Input, ...]:
    return (Input("pixel_values", ("batch", 3, size, size)),)


def _make(cls: Any, config: Any) -> Callable[[], nn.Module]:
    """Make a class from a config, both fresh at each call: transformers writes into configs."""
    return lambda: cls(config())


def _bert_like(config: Any, **more: Any) -> Callable[[], Any]:
    """Config of a network whose sizes have BERT's names."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": FFN, "max_position_embeddings": 64, "num_labels": LABELS,
    }  # fmt: skip
    return lambda: config(**{**sizes, **more})


def _vit_like(config: Any, **more: Any) -> Callable[[], Any]:
    """Config of a network whose sizes have ViT's names: 32 x 32 pixels, 16 patches."""
    sizes = {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN,
        "image_size": 32, "patch_size": 8, "num_labels": LABELS,
    }  # fmt: skip
    return lambda: config(**{**sizes, **more})


def _distilbert() -> Any:
    return hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=FFN, max_position_embeddings=64,
        num_labels=LABELS,
    )  # fmt: skip


def _gpt2() -> Any:
    return hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=FFN,
        use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _mpt() -> Any:
    return hf.MptConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS, max_seq_len=64, use_cache=False
    )  # fmt: skip


def _modernbert() -> Any:
    """Three layers: the first attends to all tokens, the others to their neighbours."""
    return hf.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=FFN, max_position_embeddings=64, local_attention=8, num_labels=LABELS, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


def _t5(ffn: str = "relu") -> Any:
    """Heads are 8 wide; the table of layer 0 is every layer's bias by distance."""
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS,
        feed_forward_proj=ffn, use_cache=False,
    )  # fmt: skip


def _t5_gated() -> Any:
    return _t5("gated-gelu")


def _bart() -> Any:
    return hf.BartConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN + 8,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip


def _whisper() -> Any:
    return hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN,
        num_mel_bins=20, max_source_positions=19, max_target_positions=64, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


def _windows(config: Any) -> Callable[[], Any]:
    """Two stages of 16 x 16 and 8 x 8 patches, the second block of each with shifted windows."""
    return lambda: config(
        image_size=32, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=LABELS
    )


def _mobilevit() -> Any:
    return hf.MobileViTConfig(
        image_size=64, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        num_attention_heads=4, num_labels=LABELS,
    )  # fmt: skip


def _segformer() -> Any:
    return hf.SegformerConfig(
        hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4], depths=[1, 1, 1, 1], decoder_hidden_size=40,
        num_labels=LABELS,
    )  # fmt: skip


def _mask2former() -> Any:
    backbone = hf.SwinConfig(
        image_size=64, patch_size=4, embed_dim=24, depths=[2, 1, 1, 1], num_heads=[3, 6, 12, 24], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=56, hidden_dim=64, encoder_feedforward_dim=FFN,
        encoder_layers=2, decoder_layers=3, num_attention_heads=8, dim_feedforward=72, num_queries=11,
        num_labels=LABELS,
    )  # fmt: skip


def _detr() -> Any:
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 40], depths=[1, 1], layer_type="bottleneck", out_features=["stage2"]
    )
    return hf.DetrConfig(
        backbone_config=backbone, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN + 8,
        num_queries=11, num_labels=LABELS,
    )  # fmt: skip


def _rtdetr() -> Any:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 20, 28, 36], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return hf.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=HIDDEN, encoder_in_channels=[20, 28, 36],
        encoder_ffn_dim=FFN, encoder_attention_heads=HEADS, d_model=HIDDEN, decoder_in_channels=[HIDDEN] * 3,
        decoder_ffn_dim=FFN + 8, decoder_attention_heads=HEADS, decoder_layers=LAYERS, num_queries=11,
        hidden_expansion=0.5, num_labels=LABELS,
    )  # fmt: skip


def _efficientnet() -> Any:
    """Three stages; widths are halved: a stem of 16, then 16, 24 and 40, and 640 at the end."""
    return hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.5, depth_coefficient=1.0, in_channels=[32, 32, 48],
        out_channels=[32, 48, 80], num_block_repeats=[1, 2, 2], strides=[1, 2, 2], kernel_sizes=[3, 3, 5],
        expand_ratios=[1, 4, 4], hidden_dim=640, num_labels=LABELS,
    )  # fmt: skip


def _resnet() -> Any:
    return hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 40], depths=[2, 2], layer_type="bottleneck", num_labels=LABELS
    )


def _mobilenet() -> Any:
    return hf.MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=LABELS)


def _convnext() -> Any:
    """Four stages; the scales of residual branches start at 1, since at 1e-6 no mask would show."""
    return hf.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], layer_scale_init_value=1.0, num_labels=LABELS
    )


def _half(cls: Any, config: Any, name: str) -> Callable[[], nn.Module]:
    """Make the encoder or the decoder of a pair; a decoder takes the encoder's states as an input."""
    return lambda: getattr(cls(config()), name)


GROUPED = {"num_key_value_heads": 3, "use_cache": False, "pad_token_id": 0, "eos_token_id": 2}
"""Two queries to each of three K/V groups."""
DISENTANGLED = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}  # fmt: skip
HALF_ROTARY = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
WIDE = {"hidden_size": 2 * HIDDEN, "rope_parameters": HALF_ROTARY, "use_cache": False}
"""Heads that are 16 wide, half of it rotated."""
PROJECTED = {"projection_dim": 40}
ENDED = {"bos_token_id": 1, "eos_token_id": 2}

_bert = _make(hf.BertForSequenceClassification, _bert_like(hf.BertConfig))
_roberta = _make(hf.RobertaForSequenceClassification, _bert_like(hf.RobertaConfig))
_electra = _make(hf.ElectraForSequenceClassification, _bert_like(hf.ElectraConfig, embedding_size=24))
_albert = _make(hf.AlbertForSequenceClassification, _bert_like(hf.AlbertConfig, embedding_size=24))
_mpnet = _make(hf.MPNetForSequenceClassification, _bert_like(hf.MPNetConfig))
_deberta = _make(hf.DebertaV2ForSequenceClassification, _bert_like(hf.DebertaV2Config, **DISENTANGLED))
_neox = _make(hf.GPTNeoXForCausalLM, _bert_like(hf.GPTNeoXConfig, **WIDE))
_llama = _make(hf.LlamaForCausalLM, _bert_like(hf.LlamaConfig, **GROUPED))
_qwen2 = _make(hf.Qwen2ForCausalLM, _bert_like(hf.Qwen2Config, num_key_value_heads=2, use_cache=False))
_phi3 = _make(hf.Phi3ForCausalLM, _bert_like(hf.Phi3Config, **GROUPED))
_bloom = _make(hf.BloomForCausalLM, _bert_like(hf.BloomConfig, use_cache=False, **ENDED))
_falcon = _make(hf.FalconForCausalLM, _bert_like(hf.FalconConfig, use_cache=False, **ENDED))
_clip_text = _make(hf.CLIPTextModelWithProjection, _bert_like(hf.CLIPTextConfig, **PROJECTED, **ENDED))
_clip_vision = _make(hf.CLIPVisionModelWithProjection, _vit_like(hf.CLIPVisionConfig, **PROJECTED))
_dinov2 = _make(hf.Dinov2ForImageClassification, _vit_like(hf.Dinov2Config, mlp_ratio=2))
_swiglu = _make(hf.Dinov2ForImageClassification, _vit_like(hf.Dinov2Config, mlp_ratio=2, use_swiglu_ffn=True))
_beit = _make(hf.BeitForImageClassification, _vit_like(hf.BeitConfig, use_relative_position_bias=True))

STATES = ("last_hidden_state",)
BOXES = ("logits", "pred_boxes")
MASKS = ("class_queries_logits", "masks_queries_logits")
ROWS = (
    Family("bert", _bert, TEXT),
    Family("roberta", _roberta, TEXT),
    Family("distilbert", _make(hf.DistilBertForSequenceClassification, _distilbert), TEXT),
    Family("electra", _electra, TEXT),
    Family("albert", _albert, TEXT),
    Family("mpnet", _mpnet, TEXT),
    Family("deberta-v2", _deberta, TEXT),
    Family("modernbert", _make(hf.ModernBertForSequenceClassification, _modernbert), TEXT),
    Family("gpt2", _make(hf.GPT2LMHeadModel, _gpt2), TEXT),
    Family("gpt-neox", _neox, TEXT),
    Family("llama", _llama, TEXT),
    Family("qwen2", _qwen2, TEXT),
    Family("phi-3", _phi3, TEXT),
    Family("bloom", _bloom, TEXT),
    Family("mpt", _make(hf.MptForCausalLM, _mpt), TEXT),
    Family("falcon", _falcon, TEXT),
    Family("t5-encoder", _make(hf.T5EncoderModel, _t5), TEXT, STATES),
    Family("t5-decoder", _half(hf.T5Model, _t5_gated, "decoder"), DECODER_TEXT, STATES),
    Family("bart", _make(hf.BartForConditionalGeneration, _bart), (*TEXT, _ids("decoder_input_ids", "target"))),
    Family("whisper-encoder", _half(hf.WhisperModel, _whisper, "encoder"), SOUND, STATES),
    Family("whisper-decoder", _half(hf.WhisperModel, _whisper, "decoder"), DECODER_TEXT, STATES),
    Family("vit", _make(hf.ViTForImageClassification, _vit_like(hf.ViTConfig)), _image(32)),
    Family("deit", _make(hf.DeiTForImageClassificationWithTeacher, _vit_like(hf.DeiTConfig)), _image(32)),
    Family("dinov2", _dinov2, _image(32)),
    Family("dinov2-swiglu", _swiglu, _image(32)),
    Family("beit", _beit, _image(32)),
    Family("clip-text", _clip_text, TEXT, ("text_embeds",)),
    Family("clip-vision", _clip_vision, _image(32), ("image_embeds",)),
    Family("siglip", _make(hf.SiglipVisionModel, _vit_like(hf.SiglipVisionConfig)), _image(32), ("pooler_output",)),
    Family("swin", _make(hf.SwinForImageClassification, _windows(hf.SwinConfig)), _image(32)),
    Family("swin2", _make(hf.Swinv2ForImageClassification, _windows(hf.Swinv2Config)), _image(32)),
    Family("segformer", _make(hf.SegformerForSemanticSegmentation, _segformer), _image(64)),
    Family("mobilevit", _make(hf.MobileViTForImageClassification, _mobilevit), _image(64)),
    Family("mask2former", _make(hf.Mask2FormerForUniversalSegmentation, _mask2former), _image(64), MASKS),
    Family("detr", _make(hf.DetrForObjectDetection, _detr), _image(64), BOXES),
    Family("rt-detr", _make(hf.RTDetrForObjectDetection, _rtdetr), _image(64), BOXES),
    Family("resnet", _make(hf.ResNetForImageClassification, _resnet), _image(32)),
    Family("mobilenet-v2", _make(hf.MobileNetV2ForImageClassification, _mobilenet), _image(64)),
    Family("efficientnet", _make(hf.EfficientNetForImageClassification, _efficientnet), _image(32)),
    Family("convnext", _make(hf.ConvNextForImageClassification, _convnext), _image(32)),
)
FAMILIES: Mapping[str, Family] = {row.name: row for row in ROWS}
