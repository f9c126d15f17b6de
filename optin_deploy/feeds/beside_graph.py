"""What lies beside an ONNX file, or in a folder of its own: tokenizer, processor or extractor, names of classes.

A graph has no config of transformers: tokenizer.json is taken as it is, and nothing is looked up by a model's type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from optin_deploy.common.extras import require
from optin_deploy.data.samples import Sample
from optin_deploy.data.sounds import HIGHEST_RATE
from optin_deploy.errors import BadInput
from optin_deploy.feeds.preprocessor import LARGEST_NUMBER, check_numbers
from optin_deploy.feeds.raw_tokenizer import PROBES, SPECIAL, first_difference, of_file, raw_tokenizer
from optin_deploy.files.storage import read_json
from optin_deploy.files.support_files import (
    IMAGE_SETTINGS,
    TEXT_SETTINGS,
    TEXT_VOCABULARIES,
    check_settings,
    support_file,
    support_folder,
)
from optin_deploy.files.wall import shown, wall

TOKENIZER = "--tokenizer takes a folder with tokenizer.json (or vocab.txt), a tokenizer.json itself, or a hub id."
PROCESSOR = "--preprocessor takes a folder with preprocessor_config.json, that file itself, or a hub id."
UNLIMITED = 10**30
"""What transformers notes as the longest text of a tokenizer that knows none."""
FEWEST = 4
"""Ordinary tokens of the smallest vocabulary, DNA's; transformers silently makes one without any from missing files."""
MOST_CLASSES = 2**20
MOST_OF_SOUND = 2**24
"""Bound of the numbers of a feature extractor: samples in a minute at 256 kHz."""


def folders_beside(source: str) -> list[Path]:
    """Folders that may hold the files of a network: its own, and the one above if its own is called `onnx`."""
    path = Path(source)
    if not path.is_file():
        return []
    home = path.resolve().parent
    return [home, home.parent] if home.name == "onnx" else [home]


def load_tokenizer(name: str | None, source: str) -> Any:
    """The tokenizer that is named, or the one that lies beside the network.

    Args: source: of the network.
    Raises: BadInput: there is none, or it cannot be used.
    """
    if name is None:
        files = ("tokenizer.json", "vocab.txt", "vocab.json")
        for folder in folders_beside(source):
            if any((folder / file).is_file() for file in files):
                return _tokenizer_in(folder)
        raise BadInput(f"{source}: texts need a tokenizer, and none lies beside the network. {TOKENIZER}")
    path = Path(name)
    if path.is_file():
        if path.suffix != ".json":
            raise BadInput(f"--tokenizer {name}: a {path.suffix or 'nameless'} file is not read alone. {TOKENIZER}")
        return _tokenizer_of(path.parent, path.name)
    return _tokenizer_in(_folder(name, "--tokenizer", TOKENIZER))


def _folder(name: str, option: str, step: str) -> Path:
    hub_id = name.count("/") < 2 and not name.startswith((".", "/", "~"))
    if not name.strip() or (not Path(name).exists() and not hub_id):
        raise BadInput(f"{option} {name}: there is no such file or folder. {step}")
    with wall(f"{option} {name} cannot be had", step):
        return support_folder(name)


def _tokenizer_in(folder: Path) -> Any:
    if support_file(folder, "tokenizer.json") is not None:
        return _tokenizer_of(folder, "tokenizer.json")
    settings = check_settings(folder, TEXT_SETTINGS)
    found = [name for name in TEXT_VOCABULARIES if support_file(folder, name) is not None]
    if not found:
        pieces = sorted(path.name for path in folder.glob("*.model"))
        what = f"only {pieces[0]}, of SentencePiece: convert it to tokenizer.json" if pieces else "no vocabulary"
        raise BadInput(f"{folder} holds {what}. {TOKENIZER}")
    kind: Any = transformers.AutoTokenizer
    said = settings.get("tokenizer_config.json", {})
    if found == ["vocab.txt"] and not (folder / "config.json").is_file() and "tokenizer_class" not in said:
        kind = transformers.BertTokenizer  # what writes this file
    with wall(f"{folder} has no usable tokenizer ({', '.join(found)})", TOKENIZER):
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        tokenizer.model_max_length = _longest(said)
        return _checked(tokenizer, str(folder))


def _tokenizer_of(folder: Path, name: str) -> Any:
    """A tokenizer that is its file, with the special tokens and limits that the settings beside it name."""
    path = support_file(folder, name)
    assert path is not None
    content = path.read_bytes()
    settings = check_settings(folder, TEXT_SETTINGS)
    said = {**settings.get("special_tokens_map.json", {}), **settings.get("tokenizer_config.json", {})}
    special = {each: _token(said.get(each)) for each in SPECIAL}
    side = said.get("padding_side")
    like = SimpleNamespace(
        **special,
        model_max_length=_longest(said),
        padding_side=side if side in ("left", "right") else "right",
        truncation_side="left" if said.get("truncation_side") == "left" else "right",
    )
    with wall(f"{path} cannot be used", TOKENIZER):
        raw = raw_tokenizer(content, str(path))
        tokenizer = _checked(of_file(content, raw, like), str(path))
        odd = first_difference(tokenizer, raw, [Sample(text=text) for text in PROBES])
    if odd is not None:
        raise BadInput(
            f"{path}: transformers gives other ids than the file itself, first for {shown(odd.text)}. Save it"
            " again with save_pretrained."
        )
    return tokenizer


def _token(said: object) -> str | None:
    """A token of the settings, written plainly or with how it is matched."""
    said = said.get("content") if isinstance(said, Mapping) else said
    return said if isinstance(said, str) and said else None


def _longest(said: Mapping[str, object]) -> int:
    """Most tokens of a text, by the settings."""
    longest = said.get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not 1 <= longest < UNLIMITED:
        return UNLIMITED
    return int(longest)


def _checked(tokenizer: Any, where: str) -> Any:
    """A tokenizer that makes ids of texts."""
    known = tokenizer.get_vocab()
    ordinary = set(known) - set(tokenizer.all_special_tokens)
    if len(ordinary) < FEWEST:
        raise BadInput(
            f"{where} knows {len(known)} tokens, {len(ordinary)} of them ordinary ones: files of the vocabulary are"
            f" missing. {TOKENIZER}"
        )
    tried = copy.deepcopy(tokenizer)
    for text in PROBES:
        tried(text, text, truncation=True, max_length=16, return_attention_mask=True, return_token_type_ids=True)
    return tokenizer


def load_processor(name: str | None, source: str) -> Any | None:
    """The image processor that is named, or the one beside the network; None: none is named and none lies there.

    Args: source: of the network.
    Raises: BadInput: it cannot be used.
    """
    folder = _processor_folder(name, source, LARGEST_NUMBER)
    return None if folder is None else _processor_in(folder)


def load_extractor(name: str | None, source: str) -> Any:
    """The feature extractor of sound that is named, or the one beside the network.

    Args: source: of the network.
    Raises: BadInput: there is none, or it cannot be used.
    """
    folder = _processor_folder(name, source, MOST_OF_SOUND)
    if folder is None:
        raise BadInput(f"{source}: recordings need a feature extractor, and none lies beside the network. {PROCESSOR}")
    with wall(f"{folder} has no usable {IMAGE_SETTINGS[0]}", "Save it again with save_pretrained of its extractor."):
        kind: Any = transformers.AutoFeatureExtractor
        extractor = kind.from_pretrained(folder, trust_remote_code=False)
        if not 0 < extractor.sampling_rate <= HIGHEST_RATE or not extractor.model_input_names:
            raise ValueError(f"it hears {extractor.sampling_rate} samples a second")
    return extractor


def _processor_folder(name: str | None, source: str, most: int) -> Path | None:
    """The folder of the settings that are named, or that lie beside the network; None: none.

    Args: most: the largest number that they may hold.
    """
    if name is None:
        found = [folder for folder in folders_beside(source) if (folder / IMAGE_SETTINGS[0]).is_file()]
        if not found:
            return None
        folder = found[0]
    elif (path := Path(name)).is_file():
        if path.name != IMAGE_SETTINGS[0]:
            raise BadInput(f"--preprocessor {name}: only a file called {IMAGE_SETTINGS[0]} is read. {PROCESSOR}")
        folder = path.parent
    else:
        folder = _folder(name, "--preprocessor", PROCESSOR)
    settings = check_settings(folder, IMAGE_SETTINGS)
    if IMAGE_SETTINGS[0] not in settings:
        raise BadInput(f"{folder} holds no {IMAGE_SETTINGS[0]}. {PROCESSOR}")
    for file, fields in settings.items():
        check_numbers(folder / file, fields, most=most)
    return folder


def _processor_in(folder: Path) -> Any:
    require("PIL")
    from PIL import Image

    step = "Give --image-size with --mean and --std instead, or the processor's folder as save_pretrained wrote it."
    with wall(f"{folder} has no usable {IMAGE_SETTINGS[0]}", step):
        kind: Any = transformers.AutoImageProcessor
        processor = kind.from_pretrained(folder, trust_remote_code=False)
        pixels = processor(images=[Image.new("RGB", (60, 40), (200, 100, 50))], return_tensors="pt")["pixel_values"]
        if not (pixels.dim() == 4 and bool(torch.isfinite(pixels.float()).all())):
            raise ValueError(f"it makes {tuple(pixels.shape)} of {pixels.dtype}, or values that are not finite")
    return processor


def class_names(source: str) -> tuple[str, ...] | None:
    """Names of the classes in their order, from config.json beside a network; None: it has none.

    Raises: BadInput: they are no names for 0 to n - 1.
    """
    for folder in folders_beside(source):
        path = support_file(folder, "config.json")
        if path is None:
            continue
        named = read_json(path, "Correct it, or take it away.").get("id2label")
        if named is None:
            return None
        names = {str(key): value for key, value in named.items()} if isinstance(named, dict) else {}
        if not 0 < len(names) <= MOST_CLASSES or set(names) != set(map(str, range(len(names)))):
            raise BadInput(f"{path}: id2label is {shown(named)}; it needs a name for each of 0 to n - 1.")
        return tuple(str(names[str(i)]) for i in range(len(names)))
    return None
