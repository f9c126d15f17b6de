"""Models to time, as folders: sizes that people use; where only the time matters, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.data import bbc_articles, minilm_folder, write_calibration
from optin_deploy.files.storage import atomic_folder
from optin_deploy.planning.widths import Keep
from optin_deploy.pruning.source import Source
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.labels import DEFAULT_KINDS

CALIBRATION = 256


def minilm(folder: Path) -> Source:
    """all-MiniLM-L6-v2 (6 layers, 12 heads, hidden 384, FFN 1536) on BBC news."""
    rows = bbc_articles()[: CALIBRATION + 64]
    calibration = write_calibration(rows, folder / "bbc.jsonl")
    return Source(str(minilm_folder()), calibration=str(calibration), samples=CALIBRATION)


def bert_base(folder: Path) -> Source:
    """BERT-base's size (12 layers, 12 heads, hidden 768, FFN 3072), random weights, MiniLM's tokenizer."""

    def save(into: Path) -> None:
        _random(transformers.BertModel, transformers.BertConfig()).save_pretrained(into)
        transformers.AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(into)

    return Source(str(_made(folder / "bert-base", save)), samples=64)


def vit_small(folder: Path) -> Source:
    """ViT-S/16's size (12 layers, 6 heads, hidden 384, FFN 1536; 197 tokens), random weights."""

    def save(into: Path) -> None:
        config = transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        _random(transformers.ViTModel, config).save_pretrained(into)
        processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True}
        size = {"size": {"height": 224, "width": 224}, "rescale_factor": 1 / 255}
        (into / "preprocessor_config.json").write_text(json.dumps(processor | size))

    return Source(str(_made(folder / "vit-small", save)), samples=64)


MODELS: dict[str, Callable[[Path], Source]] = {"minilm": minilm, "bert-base": bert_base, "vit-small": vit_small}
"""Each takes the folder that keeps what is made."""


def _random(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config)


def _made(folder: Path, save: Callable[[Path], None]) -> Path:
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            save(temporary)
    return folder


def first_units(layout: Layout, share: float) -> Keep:
    """The first so many units of each group: which ones makes no difference to the time."""
    return {
        group.name: tuple(range(max(1, round(share * group.units))))
        for group in layout.groups
        if group.kind in DEFAULT_KINDS
    }
