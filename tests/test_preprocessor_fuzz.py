"""Whatever stands in the files of a tokenizer or image processor: it is loaded, or refused as bad input."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint as tiny
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_folders import sentence_model

from optin_deploy.errors import BadInput
from optin_deploy.preprocessor import load_beside

FIELDS = {
    "tokenizer_config.json": (
        *("backend", "cls_token", "do_lower_case", "mask_token", "model_max_length", "pad_token", "sep_token"),
        *("strip_accents", "tokenize_chinese_chars", "tokenizer_class", "unk_token", "bos_token", "eos_token"),
        *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "padding_side", "vocab_size"),
        *("truncation_side", "model_input_names", "clean_up_tokenization_spaces", "never_split", "auto_map"),
        *("tokenizer_file", "vocab_file", "vocab", "merges", "name_or_path", "chat_template", "add_prefix_space"),
        *("split_special_tokens", "max_length", "special_tokens_map_file", "processor_class", "is_local"),
        *("pad_token_type_id", "add_bos_token", "add_eos_token", "from_slow", "legacy", "init_inputs", "backend"),
        *("tokenizer_object", "config", "use_fast", "trust_remote_code", "fix_mistral_regex", "post_processor"),
        *("model_specific_special_tokens", "padding", "truncation", "stride", "pad_to_multiple_of", "errors"),
    ),
    "special_tokens_map.json": (
        *("cls_token", "mask_token", "pad_token", "sep_token", "unk_token", "bos_token", "eos_token"),
        *("additional_special_tokens", "extra_special_tokens", "vocab", "tokenizer_class"),
    ),
    "added_tokens.json": ("[UNK]", "[MASK]", "new", ""),
    "modules.json": ("path", "type", "idx", "name"),
    "1_Pooling/config.json": (
        *("pooling_mode", "pooling_mode_cls_token", "pooling_mode_max_tokens", "word_embedding_dimension"),
        *("embedding_dimension", "include_prompt"),
    ),
    "sentence_bert_config.json": ("max_seq_length", "do_lower_case", "transformer_task", "module_output_name"),
    "config_sentence_transformers.json": ("prompts", "default_prompt_name", "__version__", "similarity_fn_name"),
    "preprocessor_config.json": (
        *("image_processor_type", "do_resize", "size", "do_normalize", "image_mean", "image_std", "do_rescale"),
        *("rescale_factor", "resample", "crop_size", "do_center_crop", "do_convert_rgb", "feature_extractor_type"),
        *("data_format", "input_data_format", "default_to_square", "crop_pct", "do_pad", "pad_size", "auto_map"),
        *("device", "return_tensors", "disable_grouping", "processor_class", "size_divisor", "max_pixels", "backend"),
        *("min_pixels", "patch_size", "image_seq_length", "do_flip_channel_order", "do_reduce_labels", "use_fast"),
    ),
}
"""Those that transformers writes or reads."""
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            *("[PAD]", "[nowhere]", "left", "right", "evil", "BertTokenizer", "BertTokenizerFast", "RobertaTokenizer"),
            *("T5Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "BertJapaneseTokenizer"),
            *(
                "PythonBackend",
                "../x",
                "/etc/passwd",
                "http://localhost:1/x",
                "ViTImageProcessor",
                "CLIPImageProcessor",
            ),
            *(
                "DeiTImageProcessor",
                "BitImageProcessor",
                "ConvNextImageProcessor",
                "Pix2StructImageProcessor",
                "\ud800",
            ),
            *("Qwen2VLImageProcessor", "LayoutLMv3ImageProcessor", "SamImageProcessor", "channels_last", "pil", "a"),
        ]
    )
)
KEYS = st.text(max_size=8) | st.sampled_from(
    ["content", "__type", "lstrip", "special", "height", "width", "shortest_edge", "longest_edge", "0", "4", "9999999"]
)
TOKEN = st.fixed_dictionaries({"__type": st.just("AddedToken"), "content": SCALARS, "special": SCALARS})
VALUES = st.recursive(
    SCALARS | TOKEN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
CHANGES = st.sampled_from([(file, field) for file, fields in FIELDS.items() for field in fields])
MANY = os.environ.get("OPTIN_FUZZ") == "1"
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


@cache
def models() -> dict[str, Any]:
    """What the files belong to: nothing of their weights is used."""
    config = transformers.AutoConfig.from_pretrained(tiny.bert())
    image = transformers.AutoConfig.from_pretrained(tiny.vit())
    return {"text": transformers.BertModel(config), "image": transformers.ViTForImageClassification(image)}


@cache
def sentence_folder() -> Path:
    return sentence_model(tiny.root() / "fuzz-sentence")


def loaded_or_refused(file: str, change: Any, folder: Path) -> str:
    """Change a file of a good folder and load it: empty, or what was said against it."""
    kind = "image" if file == "preprocessor_config.json" else "text"
    shutil.rmtree(folder, ignore_errors=True)
    source = tiny.vit() if kind == "image" else sentence_folder()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    change(folder / file)
    try:
        load_beside(str(folder), models()[kind])
    except BadInput as refused:
        return str(refused)
    return ""


def set_field(path: Path, field: str, value: Any) -> None:
    fields = json.loads(path.read_text()) if path.is_file() else {}
    new = [fields[0], {**fields[1], field: value}] if isinstance(fields, list) else {**fields, field: value}
    path.write_text(json.dumps(new))


def check_field(change: tuple[str, str], value: Any, folder: Path) -> None:
    file, field = change
    said = loaded_or_refused(file, lambda path: set_field(path, field, value), folder)
    assert "\n" not in said
    assert len(said) < 2000


@settings(max_examples=150, **QUIET)
@given(CHANGES, VALUES)
def test_any_value_in_any_field_is_loaded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, change: tuple[str, str], value: Any
) -> None:
    check_field(change, value, tmp_path_factory.getbasetemp() / "fuzzed")


@pytest.mark.skipif(not MANY, reason="takes minutes; asked for by OPTIN_FUZZ=1")
@settings(max_examples=3000, **QUIET)
@given(CHANGES, VALUES)
def test_any_value_in_any_field_at_length(
    tmp_path_factory: pytest.TempPathFactory, change: tuple[str, str], value: Any
) -> None:
    check_field(change, value, tmp_path_factory.getbasetemp() / "fuzzed")
