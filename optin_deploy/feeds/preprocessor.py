"""The tokenizer or image processor that was saved with a model: loaded and tried out; every failure is bad input."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from optin_deploy.common.extras import require
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.feeds.inputs import gives_logits, input_names, takes_images, takes_text
from optin_deploy.feeds.pooling import set_pooling
from optin_deploy.feeds.raw_tokenizer import PROBES, as_in_file, raw_tokenizer, without_warnings
from optin_deploy.feeds.sentence_modules import (
    SentenceModules,
    read_sentence_modules,
    sentence_root,
    transformer_folder,
)
from optin_deploy.feeds.text_feeds import encoded
from optin_deploy.files.opening import short
from optin_deploy.files.support_files import (
    IMAGE_SETTINGS,
    TEXT_SETTINGS,
    TEXT_VOCABULARIES,
    check_settings,
    support_file,
    support_folder,
)
from optin_deploy.files.wall import NO_FAULT, wall

CAPITALS = "The Quick BROWN Fox"
TRIED_LENGTH = 32
"""Tokens of the texts that a tokenizer is tried with."""
LARGEST_NUMBER = 4096
"""Bound of the numbers of an image processor: sizes in pixels, means and factors are all below."""
BLAME_SECONDS = 10.0
"""How long the field that breaks a tokenizer is looked for."""


class Beside(NamedTuple):
    """What lies beside the weights of a model."""

    preprocessor: Any
    """Tokenizer for text, image processor for images; None: it takes sound, whose feature extractor
    is loaded where recordings come."""
    files: Mapping[str, bytes]
    """What travels along unchanged with every model that is made of this one, by path in its folder."""
    sentence: SentenceModules | None
    """What a folder of sentence-transformers says."""


def load_beside(name: str, model: nn.Module) -> Beside:
    """Read what lies beside the weights, of a folder or of a hub id, and note in the config how states are pooled.

    Raises: BadInput: as `load_preprocessor`, or modules of sentence-transformers that are not understood.
    """
    folder = root = support_folder(name)
    embeds = takes_text(model) and not gives_logits(model)
    if embeds:
        root = sentence_root(folder)
        folder = transformer_folder(root)
    if not embeds and not takes_text(model) and not takes_images(model):  # of sound
        found = [path for name in IMAGE_SETTINGS if (path := support_file(folder, name)) is not None]
        return Beside(None, {path.name: path.read_bytes() for path in found}, None)
    preprocessor, files = load_preprocessor(folder, model), {}
    if takes_text(model) and (path := support_file(folder, "tokenizer.json")) is not None:
        files["tokenizer.json"] = path.read_bytes()
    config: Any = model.config
    modules = read_sentence_modules(root, config.hidden_size) if embeds else None
    if modules is not None:
        set_pooling(config, modules.head.pooling)
        files |= modules.files
        if modules.lower_case and preprocessor(CAPITALS)["input_ids"] != preprocessor(CAPITALS.lower())["input_ids"]:
            raise BadInput(
                f"{root}: sentence_bert_config.json says do_lower_case, but the tokenizer tells capitals from small "
                "letters. Put a Lowercase normalizer into tokenizer.json, as sentence-transformers does when it loads."
            )
    return Beside(preprocessor, files, modules)


def load_preprocessor(folder: Path, model: nn.Module) -> Any:
    """The tokenizer or image processor in a folder, proven on a few samples.

    Raises: BadInput: its files are missing, damaged or do not fit; names file, field and value where one is to blame.
    """
    if not takes_text(model):
        settings = check_settings(folder, IMAGE_SETTINGS)
        for name, fields in settings.items():
            check_numbers(folder / name, fields)
        kind, built = "preprocessor_config.json", _image_processor
    else:
        settings = check_settings(folder, TEXT_SETTINGS)
        names = (*TEXT_VOCABULARIES, *(path.name for path in folder.glob("*.model")))
        vocabularies = [support_file(folder, name) for name in names]
        if not settings and not any(vocabularies):
            raise BadInput(f"{folder} has no tokenizer: save it beside the weights, as tokenizer.json or vocab.txt.")
        kind, built = "tokenizer (tokenizer.json or vocab.txt)", _tokenizer

    def step() -> str:
        return _sentencepiece(folder) or _blame(folder, model, settings, built) or "Save it beside the weights."

    with wall(f"{folder} has no usable {kind}", step):
        return built(folder, model)


def _tokenizer(folder: Path, model: nn.Module) -> Any:
    config: Any = model.config
    path, probes = support_file(folder, "tokenizer.json"), [Sample(text=text, source="a probe") for text in PROBES]
    if path is not None:
        raw_tokenizer(path.read_bytes(), str(path))  # first, as transformers does not name the file
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if path is not None:
        tokenizer = as_in_file(tokenizer, path.read_bytes(), probes, config, str(path))
    check_tokenizer(tokenizer, config)
    encoded(probes, tokenizer, input_names(model)[1:], TRIED_LENGTH)
    return tokenizer


def _image_processor(folder: Path, model: nn.Module) -> Any:
    require("PIL")
    from PIL import Image

    kind: Any = transformers.AutoImageProcessor
    processor = kind.from_pretrained(folder, config=model.config, trust_remote_code=False)
    grey = getattr(model.config, "num_channels", 3) == 1
    image = Image.new("L" if grey else "RGB", (60, 40), 100 if grey else (200, 100, 50))
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    if not (pixels.dim() == 4 and pixels.is_floating_point() and bool(torch.isfinite(pixels).all())):
        raise ValueError(f"it makes {tuple(pixels.shape)} of {pixels.dtype}, or values that are not finite")
    return processor


def check_numbers(path: Path, value: object, field: str = "", *, most: int = LARGEST_NUMBER) -> None:
    """Refuse sizes that no memory holds, before an image or a spectrum is made of them."""
    if isinstance(value, dict):
        for name, each in value.items():
            check_numbers(path, each, f"{field}.{name}" if field else str(name), most=most)
    elif isinstance(value, list):
        for each in value:
            check_numbers(path, each, field, most=most)
    elif isinstance(value, int | float) and not abs(value) <= most and not field.startswith("max_"):
        raise BadInput(
            f"{path}: {field!r} is {short(value)}; numbers here are sizes, means and factors, and at most {most} is "
            "read. Correct it."
        )


def _blame(
    folder: Path, model: nn.Module, settings: Mapping[str, Mapping[str, object]], built: Callable[[Path, Any], Any]
) -> str:
    """Name the field without which the files work; empty: it is none of them alone."""
    end = time.monotonic() + BLAME_SECONDS
    for name, fields in settings.items():
        for field in fields:
            if time.monotonic() > end:
                return ""
            with tempfile.TemporaryDirectory() as copy:
                for path in folder.iterdir():
                    if path.is_file() and path.name != name and path.suffix in (".json", ".txt", ".model", ".jinja"):
                        shutil.copyfile(path, Path(copy) / path.name)
                rest = {key: value for key, value in fields.items() if key != field}
                (Path(copy) / name).write_text(json.dumps(rest))
                try:
                    with without_warnings():
                        built(Path(copy), model)
                except BaseException as err:  # as in the wall: this field is not the only fault
                    if isinstance(err, NO_FAULT):
                        raise
                    continue
            return f"The cause is {field!r} in {name}, which is {short(fields[field])}: correct it, or delete it."
    return ""


def _sentencepiece(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.model"))
    if not found or (folder / "tokenizer.json").exists():
        return ""
    return (
        f"It has only {found[0]}, of SentencePiece. Where `sentencepiece` is installed, load it with transformers' "
        "AutoTokenizer and save_pretrained it beside the weights: that writes tokenizer.json, which is read here."
    )


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that cannot belong to the model.

    transformers builds one of a few special tokens, silently, when the vocabulary files are missing.
    Raises: BadInput: hardly any ordinary token, or ids beyond `config.vocab_size`.
    """
    vocab = tokenizer.get_vocab()
    size = getattr(config, "vocab_size", None)
    ordinary = len(set(vocab) - set(tokenizer.all_special_tokens))
    # 4 letters are a vocabulary (DNA models), but not beside an embedding many times as large.
    if ordinary < 4 or (size is not None and ordinary < 100 and 4 * len(vocab) < size):
        raise BadInput(
            f"The tokenizer knows {len(vocab)} tokens, {ordinary} of them ordinary ones, and the model {size}: its"
            " vocabulary files are missing. Put tokenizer.json (or vocab.txt, merges.txt, *.model) beside config.json."
        )
    needed = max(vocab.values()) + 1
    if size is not None and needed > size:
        raise BadInput(
            f"The tokenizer needs {needed} embeddings, but config.vocab_size is {size}. Use the tokenizer saved"
            " with this model, or resize the model's embeddings before pruning."
        )
