"""Families of networks, one row each: a tiny random model, its inputs, and which of their axes may vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES: Mapping[str, int] = {"batch": 2, "length": 13, "target": 11, "source": 9}
"""Sizes of the free axes at export. Other sizes must work as well; no width of any model equals one of them."""
OUTPUTS = (
    "logits", "class_queries_logits", "masks_queries_logits", "pred_boxes", "pooler_output", "text_embeds",
    "image_embeds", "last_hidden_state",
)  # fmt: skip
VOCABULARY, HIDDEN, LAYERS, HEADS, FFN, LABELS = 97, 48, 2, 6, 80, 5


@dataclass(frozen=True)
class Input:
    """One input of a network."""

    name: str
    shape: tuple[int | str, ...]
    """Numbers are fixed; names, keys of `SIZES`, are free."""
    kind: str = "real"
    """`ids`, `mask` (ones, and zeros at the end of the first row) or `real` (normal)."""

    @property
    def free(self) -> dict[int, str]:
        """Free axes: position to name."""
        return {position: size for position, size in enumerate(self.shape) if isinstance(size, str)}


@dataclass(frozen=True)
class Family:
    """One row."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the model; its weights are drawn anew by `model`."""
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...] = ("logits",)
    """Fields of what the model returns, in the order in which they are exported."""

    def model(self, seed: int = 0) -> Exported:
        """Return the model in eval mode, with random weights in which no two tensors are equal."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            if isinstance(model, hf.PreTrainedModel):
                model.set_attn_implementation("eager")  # the one that Swin and Mask2Former export with
            scatter(model)
        return Exported(model, tuple(one.name for one in self.inputs), self.outputs).eval()

    def feeds(self, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Make inputs; sizes of free axes by name, such as `batch=5, length=17`."""
        generator = torch.Generator().manual_seed(seed)
        sized = {**SIZES, **sizes}
        return {
            one.name: _values(one, tuple(sized[n] if isinstance(n, str) else n for n in one.shape), generator)
            for one in self.inputs
        }

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the free axes."""
        return tuple(dict.fromkeys(name for one in self.inputs for name in one.free.values()))


class Exported(nn.Module):
    """A model with its inputs by position and a tuple of tensors as its output, as exporters want it."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the model; inputs are in the order of the family."""
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


def scatter(model: nn.Module) -> None:
    """Draw weights so that every unit matters and no two tensors are equal.

    As initialised, many biases, tables and normalizations are zeros or ones: exporters would store equal ones once,
    and a mask on what they multiply would change nothing.
    """
    for module in model.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
            nn.init.ones_(module.weight)  # some start near zero, and features would be as good as equal
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.normal_(0, max(parameter[0].numel(), 1) ** -0.5)
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2]
        if last == "running_var":
            buffer.uniform_(0.5, 1.5)
        elif last in ("running_mean", "weight", "bias"):  # frozen BatchNorms hold all of theirs as buffers
            buffer.add_(torch.randn_like(buffer) * 0.1)


def _values(one: Input, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if one.kind == "ids":
        return torch.randint(5, VOCABULARY, shape, generator=generator)
    if one.kind == "mask":
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, -2:] = 0
        return mask
    return torch.randn(shape, generator=generator)


def _ids(name: str = "input_ids", axis: str = "length") -> Input:
    return Input(name, ("batch", axis), "ids")


def _mask(name: str = "attention_mask", axis: str = "length") -> Input:
    return Input(name, ("batch", axis), "mask")


TEXT = (_ids(), _mask())
DECODER_TEXT = (*TEXT, Input("encoder_hidden_states", ("batch", "source", HIDDEN)))


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


def _modernbert() -> Any:
    """Three layers: the first attends to all tokens, the others to their neighbours."""
    return hf.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=FFN, max_position_embeddings=64, local_attention=8, num_labels=LABELS, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


def _t5(**more: Any) -> Any:
    """Heads are 8 wide, as everywhere here, and the bias table is layer 0's."""
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS}
    return hf.T5Config(vocab_size=VOCABULARY, **sizes, use_cache=False, **more)


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


def _swin_sizes() -> dict[str, Any]:
    """Two stages of 16 x 16 and 8 x 8 patches, the second block of each with shifted windows."""
    return {
        "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
        "num_labels": LABELS,
    }  # fmt: skip


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


def _decoder(cls: Any, config: Any) -> Callable[[], nn.Module]:
    """Make the decoder of an encoder-decoder; the encoder's states are an input."""
    return lambda: cls(config()).get_decoder()


GROUPED = {"num_key_value_heads": 3, "use_cache": False}
"""Two queries to each of three K/V groups."""
ROTARY_PART = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}

ROWS = (
    Family("bert", _make(hf.BertForSequenceClassification, _bert_like(hf.BertConfig)), TEXT),
    Family("roberta", _make(hf.RobertaForSequenceClassification, _bert_like(hf.RobertaConfig)), TEXT),
    Family(
        "distilbert",
        _make(
            hf.DistilBertForSequenceClassification,
            lambda: hf.DistilBertConfig(
                vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=FFN,
                max_position_embeddings=64, num_labels=LABELS,
            ),  # fmt: skip
        ),
        TEXT,
    ),
    Family(
        "electra",
        _make(hf.ElectraForSequenceClassification, _bert_like(hf.ElectraConfig, embedding_size=24)),
        TEXT,
    ),
    Family("albert", _make(hf.AlbertForSequenceClassification, _bert_like(hf.AlbertConfig, embedding_size=24)), TEXT),
    Family("mpnet", _make(hf.MPNetForSequenceClassification, _bert_like(hf.MPNetConfig)), TEXT),
    Family(
        "deberta-v2",
        _make(
            hf.DebertaV2ForSequenceClassification,
            _bert_like(
                hf.DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
                norm_rel_ebd="layer_norm", share_att_key=True,
            ),  # fmt: skip
        ),
        TEXT,
    ),
    Family("modernbert", _make(hf.ModernBertForSequenceClassification, _modernbert), TEXT),
    Family(
        "gpt2",
        _make(
            hf.GPT2LMHeadModel,
            lambda: hf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=FFN,
                use_cache=False, bos_token_id=1, eos_token_id=2,
            ),  # fmt: skip
        ),
        TEXT,
    ),
    Family(
        "gpt-neox",
        _make(
            hf.GPTNeoXForCausalLM,
            _bert_like(
                hf.GPTNeoXConfig, hidden_size=2 * HIDDEN, rope_parameters=ROTARY_PART, use_cache=False
            ),
        ),
        TEXT,
    ),
    Family("llama", _make(hf.LlamaForCausalLM, _bert_like(hf.LlamaConfig, **GROUPED)), TEXT),
    Family(
        "qwen2",
        _make(hf.Qwen2ForCausalLM, _bert_like(hf.Qwen2Config, num_key_value_heads=2, use_cache=False)),
        TEXT,
    ),
    Family("phi-3", _make(hf.Phi3ForCausalLM, _bert_like(hf.Phi3Config, pad_token_id=0, eos_token_id=2, **GROUPED)), TEXT),
    Family("t5-encoder", _make(hf.T5EncoderModel, _t5), TEXT, ("last_hidden_state",)),
    Family(
        "t5-decoder",
        _decoder(hf.T5Model, lambda: _t5(feed_forward_proj="gated-gelu")),
        DECODER_TEXT,
        ("last_hidden_state",),
    ),
    Family(
        "bart",
        _make(hf.BartForConditionalGeneration, _bart),
        (*TEXT, _ids("decoder_input_ids", "target")),
    ),
    Family(
        "whisper-encoder",
        lambda: hf.WhisperModel(_whisper()).get_encoder(),
        (Input("input_features", ("batch", 20, 38)),),
        ("last_hidden_state",),
    ),
    Family("whisper-decoder", _decoder(hf.WhisperModel, _whisper), DECODER_TEXT, ("last_hidden_state",)),
    Family("vit", _make(hf.ViTForImageClassification, _vit_like(hf.ViTConfig)), _image(32)),
    Family("deit", _make(hf.DeiTForImageClassificationWithTeacher, _vit_like(hf.DeiTConfig)), _image(32)),
    Family(
        "dinov2",
        _make(hf.Dinov2ForImageClassification, _vit_like(hf.Dinov2Config, mlp_ratio=2)),
        _image(32),
    ),
    Family(
        "dinov2-swiglu",
        _make(hf.Dinov2ForImageClassification, _vit_like(hf.Dinov2Config, mlp_ratio=2, use_swiglu_ffn=True)),
        _image(32),
    ),
    Family(
        "beit",
        _make(hf.BeitForImageClassification, _vit_like(hf.BeitConfig, use_relative_position_bias=True)),
        _image(32),
    ),
    Family(
        "clip-text",
        _make(hf.CLIPTextModelWithProjection, _bert_like(hf.CLIPTextConfig, projection_dim=40, bos_token_id=1, eos_token_id=2)),
        TEXT,
        ("text_embeds",),
    ),
    Family(
        "clip-vision",
        _make(hf.CLIPVisionModelWithProjection, _vit_like(hf.CLIPVisionConfig, projection_dim=40)),
        _image(32),
        ("image_embeds",),
    ),
    Family("siglip", _make(hf.SiglipVisionModel, _vit_like(hf.SiglipVisionConfig)), _image(32), ("pooler_output",)),
    Family(
        "swin", _make(hf.SwinForImageClassification, lambda: hf.SwinConfig(**_swin_sizes())), _image(32)
    ),
    Family(
        "swin2", _make(hf.Swinv2ForImageClassification, lambda: hf.Swinv2Config(**_swin_sizes())), _image(32)
    ),
    Family("segformer", _make(hf.SegformerForSemanticSegmentation, _segformer), _image(64)),
    Family("mobilevit", _make(hf.MobileViTForImageClassification, _mobilevit), _image(64)),
    Family(
        "mask2former",
        _make(hf.Mask2FormerForUniversalSegmentation, _mask2former),
        _image(64),
        ("class_queries_logits", "masks_queries_logits"),
    ),
    Family("detr", _make(hf.DetrForObjectDetection, _detr), _image(64), ("logits", "pred_boxes")),
    Family("rt-detr", _make(hf.RTDetrForObjectDetection, _rtdetr), _image(64), ("logits", "pred_boxes")),
    Family(
        "resnet",
        _make(
            hf.ResNetForImageClassification,
            lambda: hf.ResNetConfig(
                embedding_size=16, hidden_sizes=[32, 40], depths=[2, 2], layer_type="bottleneck", num_labels=LABELS
            ),
        ),
        _image(32),
    ),
    Family(
        "mobilenet-v2",
        _make(
            hf.MobileNetV2ForImageClassification,
            lambda: hf.MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=LABELS),
        ),
        _image(64),
    ),
    Family("efficientnet", _make(hf.EfficientNetForImageClassification, _efficientnet), _image(32)),
    Family(
        "convnext",
        _make(
            hf.ConvNextForImageClassification,
            lambda: hf.ConvNextConfig(
                hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], layer_scale_init_value=1.0, num_labels=LABELS
            ),
        ),
        _image(32),
    ),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {row.name: row for row in ROWS}
