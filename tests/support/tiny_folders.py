"""Folders of the tiny BERT with other files beside its weights, and what becomes of them when they are saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.planning.plan import plan_of
from optin_deploy.pruning.modules import PrunedModel
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.source import Source
from support import tiny_checkpoint as tiny


def model_with(folder: Path, tokenizer: str | None = None, **settings: Any) -> Path:
    """A tiny BERT with another tokenizer.json, or other settings beside its own."""
    shutil.copytree(tiny.bert(), folder)
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "model_max_length": 40,
    }
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
        settings = names | {"model_max_length": 40} | settings
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def prepared_of(folder: Path) -> Prepared:
    return prepare(Source(str(folder), calibration=str(tiny.lines()), seq_len=16, samples=24))


def uncut(folder: Path) -> PrunedModel:
    """The model as it is, saved as a cut one would be."""
    prepared = prepared_of(folder)
    ready, loaded = prepared.ready, prepared.dense.loaded
    assert loaded is not None
    made = make(ready, plan_of(ready.layout, {}), compensation=False)
    beside: Any = {"probes": ready.found.probes, "preprocessor": loaded.preprocessor, "files": loaded.files}
    return PrunedModel(loaded.model, made.network, made.plan, made.proof, **beside)


def sentence_model(folder: Path, pooling: str | dict[str, Any] = "cls", *kinds: str, **settings: Any) -> Path:
    """A sentence-transformers folder around the tiny BERT, as older versions wrote it.

    Args: pooling: legacy mode, or the whole config of the module. kinds: of the modules.
    """
    shutil.copytree(tiny.bert(), folder)
    kinds = kinds or ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    if isinstance(pooling, str):
        modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
        pooling = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    written = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": tiny.HIDDEN, **pooling},
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False, **settings},
        "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    return folder
