"""Whatever stands in the files of a tokenizer or image processor: it is loaded, or refused as bad input."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optin_deploy.errors import BadInput
from optin_deploy.feeds.preprocessor import load_beside
from support import tiny_checkpoint as tiny
from support.tiny_folders import sentence_model

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
HEALTH = list(HealthCheck)


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


PLACES = st.lists(st.integers(0, 30), min_size=1, max_size=4)
DAMAGES = st.tuples(st.sampled_from(["cut", "insert", "overwrite"]), st.integers(0, 20_000), st.binary(max_size=4))


def check_value(places: list[int], value: Any, folder: Path) -> None:
    """Put a value at some place of tokenizer.json, as deep as `places` leads."""

    def change(path: Path) -> None:
        node = data = json.loads(path.read_text())
        for place in places[:-1]:
            inner = list(node.values()) if isinstance(node, dict) else node
            deeper = inner[place % len(inner)] if inner else None
            if not isinstance(deeper, dict | list) or not deeper:
                break
            node = deeper
        keys = list(node) if isinstance(node, dict) else range(len(node))
        node[keys[places[-1] % len(keys)]] = value
        path.write_text(json.dumps(data))

    loaded_or_refused("tokenizer.json", change, folder)


def check_damage(damage: tuple[str, int, bytes], folder: Path) -> None:
    kind, place, new = damage

    def change(path: Path) -> None:
        content = path.read_bytes()
        place_inside = place % len(content)
        rest = {"cut": place_inside + 40, "insert": place_inside, "overwrite": place_inside + len(new)}[kind]
        path.write_bytes(content[:place_inside] + new + content[rest:])

    loaded_or_refused("tokenizer.json", change, folder)


FUZZED = {
    "fields": (check_field, CHANGES, VALUES),
    "values of tokenizer.json": (check_value, PLACES, VALUES),
    "damage of tokenizer.json": (check_damage, DAMAGES),
}
USUAL = {"fields": 120, "values of tokenizer.json": 30, "damage of tokenizer.json": 30}


def run(kind: str, examples: int, folder: Path) -> None:
    """Call a check with so many examples, always the same ones."""
    check, *strategies = FUZZED[kind]

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=HEALTH)
    @given(st.tuples(*strategies))
    def checked(case: tuple[Any, ...]) -> None:
        check(*case, folder)

    checked()


@pytest.mark.parametrize("kind", FUZZED)
def test_whatever_the_files_hold_is_loaded_or_refused(kind: str, tmp_path: Path) -> None:
    run(kind, USUAL[kind], tmp_path / "fuzzed")


@pytest.mark.skipif(not MANY, reason="takes minutes; asked for by OPTIN_FUZZ=1")
@pytest.mark.parametrize("kind", FUZZED)
def test_whatever_the_files_hold_at_length(kind: str, tmp_path: Path) -> None:
    run(kind, 20 * USUAL[kind], tmp_path / "fuzzed")
