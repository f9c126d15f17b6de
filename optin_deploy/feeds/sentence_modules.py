"""What a sentence-transformers folder does after the model: read of modules.json, understood as far as it is judged.

Understood are Transformer, Pooling, Dense and Normalize: that is what scores, quality and `--pool` are of. Anything
else is refused, so that no figure is of another embedding than the folder's own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.feeds.embedding_head import SAVE, WEIGHTS, EmbeddingHead, read_layer
from optin_deploy.feeds.pooling import POOLINGS
from optin_deploy.files.opening import short
from optin_deploy.files.storage import read_json
from optin_deploy.files.support_files import support_file

log = logging.getLogger(__name__)

MODULES, ABOUT = "modules.json", "config_sentence_transformers.json"
TRANSFORMER, POOLING, DENSE, NORMALIZE = "Transformer", "Pooling", "Dense", "Normalize"
UNDERSTOOD = f"Understood are {TRANSFORMER}, {POOLING}, any number of {DENSE}, and {NORMALIZE}, in this order."
ORDER = re.compile(f"{TRANSFORMER} {POOLING}(?: {DENSE})*(?: {NORMALIZE})?")
LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of older versions, where one field named `pooling_mode` holds the names now."""
UNDERSTOOD_SETTINGS: dict[str, tuple[object, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "do_lower_case": (None, False, True),
}
"""Settings in sentence_bert_config.json that change the embedding, and the values that are understood."""
STATES = "last_hidden_state"
"""The output of a model that is pooled."""
PACKAGE = "sentence_transformers."
MANY_MODULES = 16
MODULES_LIMIT_BYTES = 2**20
QUERY_PROMPTS, DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")
"""Names of the prompts that sentence-transformers puts before queries and before what they search."""


@dataclass(frozen=True)
class Prompts:
    """What is put before texts."""

    usual: str = ""
    query: str = ""
    document: str = ""
    """What is put before texts that are searched."""
    pooled: bool = True
    """Whether an embedding is of their tokens too."""


NONE = Prompts()


@dataclass(frozen=True)
class SentenceModules:
    """How a sentence-transformers folder makes one vector of a text."""

    head: EmbeddingHead
    lower_case: bool
    """Are texts lower-cased before they are tokenized?"""
    longest: int | None
    """Tokens of a text at most; None: not said."""
    prompts: Prompts
    files: Mapping[str, bytes]
    """The files that say so, by path, as they belong into a folder whose model lies at its top."""


def sentence_root(folder: Path) -> Path:
    """The folder of modules.json for a model's folder: itself, or the one above where that names it."""
    home = folder.resolve()
    if (folder / MODULES).exists() or not re.fullmatch(r"\d+_Transformer", home.name):
        return folder
    modules = modules_in(home.parent)
    return home.parent if modules and modules[0][0] == home.name else folder


def embeds(folder: Path) -> bool:
    """Whether the folder of a model has a modules.json, by which sentence-transformers makes embeddings."""
    return (sentence_root(folder) / MODULES).is_file()


def transformer_folder(folder: Path) -> Path:
    """Find the folder of the transformers model inside a folder: `0_Transformer/` in old layouts, else the folder
    itself.

    Raises: BadInput: modules.json is damaged, or leads out of the folder.
    """
    modules = modules_in(folder)
    if not modules or not modules[0][0]:
        return folder
    inside = folder / modules[0][0]
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{inside}, the model's folder by {MODULES}, is a link that leaves {folder}. {SAVE}")
    return inside


def read_sentence_modules(folder: Path, hidden: int) -> SentenceModules | None:
    """Read modules.json and what it names; None: the folder has none.

    Args: hidden: width of the model.
    Raises: BadInput: damaged, leading out of the folder, or something that is not understood.
    """
    modules = modules_in(folder)
    if not modules:
        return None
    kinds = [full.rsplit(".", 1)[-1] if full.startswith(PACKAGE) else full for _, full in modules]
    if not ORDER.fullmatch(" ".join(kinds)):
        raise BadInput(
            f"{folder / MODULES} lists {', '.join(map(short, kinds))}. {UNDERSTOOD} Scores and quality would be of "
            f"another embedding than the folder's own. To prune the transformers model alone, judged by the mean over "
            f"its tokens, give a copy of the folder without {MODULES}."
        )
    (inside, _), (pool, _), *rest = modules
    mode, with_prompt = _pooling(folder, pool, hidden)
    width, layers = hidden, []
    for (path, _), kind in zip(rest, kinds[2:], strict=True):
        if kind == DENSE:
            layers.append(read_layer(folder, path, width))
            width = len(layers[-1].weight)
    settings, about = _settings(transformer_folder(folder)), _object(folder, ABOUT) or {}
    names = [MODULES, ABOUT, f"{pool}/config.json"]
    names += [f"{path}/{name}" for path, _ in rest if path for name in ("config.json", WEIGHTS)]
    files = {name: content for name in names if (content := _bytes(folder, name)) is not None}
    # A saved model lies at the top, and each version knows these names; ONNX's backend needs an older one than 6.
    types = [f"{PACKAGE}models.{kind}" for kind in kinds]
    if inside or types != [full for _, full in modules]:
        paths = ["", *(path for path, _ in modules[1:])]
        listed = [{"idx": i, "name": str(i), "path": paths[i], "type": each} for i, each in enumerate(types)]
        files[MODULES] = json.dumps(listed, indent=2).encode()
    files |= {name: _bytes(transformer_folder(folder), name) or b"{}" for name in settings}
    prompts = _prompts(folder, about, pooled=with_prompt)
    head = EmbeddingHead(mode, tuple(layers), kinds[-1] == NORMALIZE, after_prompt=not prompts.pooled)
    _check_similarity(folder, about, head)
    lengths = [each["max_seq_length"] for each in settings.values() if isinstance(each.get("max_seq_length"), int)]
    lower_case = any(each.get("do_lower_case") for each in settings.values())
    return SentenceModules(head, lower_case, min(lengths, default=None), prompts, files)


def modules_in(folder: Path) -> list[tuple[str, str]]:
    """(path, type) of each module; empty: there is no modules.json."""
    file = support_file(folder, MODULES)
    if file is None:
        return []
    try:
        if file.stat().st_size > MODULES_LIMIT_BYTES:
            raise ValueError(f"it is {file.stat().st_size} bytes")
        modules = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(modules, list) or not 0 < len(modules) <= MANY_MODULES:
            raise ValueError(f"it holds {short(modules)}, not a list of 1 to {MANY_MODULES} modules")
        for each in modules:
            if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("path", "type")):
                raise ValueError(f"a module is {short(each)}, without path and type")
            if not re.fullmatch(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,99})?", each["path"]):
                raise ValueError(f"the path {short(each['path'])} is not the name of a folder inside")
    except (ValueError, RecursionError) as err:
        raise BadInput(f"{file} cannot be used: {err}. {SAVE}") from err
    return [(each["path"], each["type"]) for each in modules]


def _pooling(folder: Path, path: str, hidden: int) -> tuple[str, bool]:
    """The one pooling mode, and whether tokens of prompts are pooled.

    Raises: BadInput: several, or one that is not understood.
    """
    name = f"{path}/config.json" if path else ""
    config = _object(folder, name) if name else None
    if config is None:
        raise BadInput(f"{folder / path}/config.json, which says how tokens are pooled, is missing. {SAVE}")
    modes = config.get("pooling_mode")
    if modes is None:
        default = [] if "pooling_mode_mean_tokens" in config else ["mean"]
        modes = [mode for field, mode in LEGACY_MODES.items() if config.get(field)] or default
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        raise BadInput(
            f"{folder / name}: pooling is {short(modes)}; possible: one of {', '.join(POOLINGS)}. Scores and quality "
            "would be of another embedding than the model's own."
        )
    with_prompt = config.get("include_prompt", True)
    if not isinstance(with_prompt, bool):
        raise BadInput(f"{folder / name}: include_prompt is {short(with_prompt)}; possible: true or false. {SAVE}")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", hidden))
    if width != hidden or isinstance(width, bool):
        raise BadInput(f"{folder / name}: embeddings of {short(width)} numbers, but the model makes {hidden}. {SAVE}")
    return str(modes[0]), with_prompt


def _settings(home: Path) -> dict[str, dict[str, Any]]:
    """What the Transformer module does around the model, by file name; several names were used over time."""
    names = sorted(path.name for path in home.glob("sentence_*_config.json"))
    found = {name: _object(home, name) or {} for name in names if re.fullmatch(r"[a-z_]+\.json", name)}
    for name, settings in found.items():
        for field, possible in UNDERSTOOD_SETTINGS.items():
            if settings.get(field) not in possible:
                known = ", ".join(map(repr, possible[1:]))
                raise BadInput(f"{home / name}: {field} is {short(settings[field])}; possible: {known}.")
        modalities = settings.get("modality_config")
        for each in modalities.values() if isinstance(modalities, dict) else ():
            output = each.get("method_output_name") if isinstance(each, dict) else None
            if output not in (None, STATES):
                raise BadInput(f"{home / name}: method_output_name is {short(output)}; possible: {STATES!r}.")
    return found


def _prompts(folder: Path, about: Mapping[str, Any], *, pooled: bool) -> Prompts:
    """What sentence-transformers puts before texts by itself.

    Raises: BadInput: the default prompt is none of the prompts.
    """
    prompts, name = about.get("prompts") or {}, about.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(each, str) for each in prompts.values()):
        raise BadInput(f"{folder / ABOUT}: prompts is {short(prompts)}, not texts by name. {SAVE}")
    if name is not None and not (isinstance(name, str) and name in prompts):
        raise BadInput(f"{folder / ABOUT}: default_prompt_name is {short(name)}, which is none of its prompts. {SAVE}")
    usual = prompts.get(name, "")
    query, document = (
        next((prompts[each] for each in names if each in prompts), usual) for names in (QUERY_PROMPTS, DOCUMENT_PROMPTS)
    )
    return Prompts(usual, query, document, pooled or not any((usual, query, document)))


def _check_similarity(folder: Path, about: Mapping[str, Any], head: EmbeddingHead) -> None:
    """Embeddings are judged by their cosine; of unit vectors that is the dot product, and orders as distances do."""
    name = about.get("similarity_fn_name")
    if name not in (None, "cosine") and not (head.normalized and name in ("dot", "dot_product", "euclidean")):
        log.warning(
            "%s: similarity is %s, and embeddings are judged by their cosine here.", folder / ABOUT, short(name)
        )


def _object(folder: Path, name: str) -> dict[str, Any] | None:
    path = support_file(folder, name)
    return None if path is None else read_json(path, SAVE)


def _bytes(folder: Path, name: str) -> bytes | None:
    path = support_file(folder, name)
    return None if path is None else path.read_bytes()
