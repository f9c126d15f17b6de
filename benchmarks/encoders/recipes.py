"""Encoders that are trained here: all-MiniLM-L6-v2 fine-tuned in minutes, its embeddings frozen.

Each takes the folder that keeps trained models, and returns the folder of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.data import minilm_folder
from benchmarks.encoders.rows import CALIBRATING, JUDGING, SEARCHES, Article, Row, articles, offered, questions, topics
from benchmarks.tasks.text import R8
from benchmarks.tasks.training import Training, kept, shuffled, train
from optin_deploy.common.progress import Progress
from optin_deploy.files.storage import atomic_folder, sha256_json

T = TypeVar("T")
SCALE = 20.0
"""Factor of cosines in the contrastive loss, as sentence-transformers has it."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How an encoder is fine-tuned; part of its folder name."""

    name: str
    seq_len: int
    learning_rate: float = 1.5e-4


EMBEDDER = Recipe(name="embedder", seq_len=96, epochs=3)
RERANKER = Recipe(name="reranker", seq_len=128, epochs=2)
READER = Recipe(name="reader", seq_len=144, epochs=2)
LABELLER = Recipe(name="labeller", seq_len=R8.seq_len, epochs=4)


def embedder(cache: Path) -> Path:
    """An embedder whose embedding is the state of the first token, trained to find articles by their headlines
    (in-batch negatives: Henderson et al., 2017, arXiv 1705.00652)."""
    from transformers import BertModel

    folder = _folder(cache, EMBEDDER)
    if folder.exists():
        return folder

    def loss(model: nn.Module, batch: Sequence[Article], tokens: Callable[..., Any]) -> Tensor:
        found = [model(**tokens([row[side] for row in batch])).last_hidden_state[:, 0] for side in (0, 1)]
        one, other = (nn.functional.normalize(each, dim=-1) for each in found)
        return nn.functional.cross_entropy(SCALE * one @ other.T, torch.arange(len(batch)))

    model = BertModel.from_pretrained(minilm_folder(), dtype=torch.float32, add_pooling_layer=False)
    trained = _trained(EMBEDDER, folder.with_name(f"{folder.name}-weights"), model, articles()[SEARCHES:], loss)
    with atomic_folder(folder) as made:
        shutil.copytree(minilm_folder(), made, dirs_exist_ok=True)
        shutil.copytree(trained, made, dirs_exist_ok=True)
        _pool(made, "pooling_mode_cls_token")
    return folder


def pooled_by_mean(folder: Path, out: Path) -> Path:
    """A copy of an embedder's folder that says that its embedding is the mean of its tokens."""
    if not out.exists():
        with atomic_folder(out) as made:
            shutil.copytree(folder, made, dirs_exist_ok=True)
            _pool(made, "pooling_mode_mean_tokens")
    return out


def _pool(folder: Path, mode: str) -> None:
    path = folder / "1_Pooling" / "config.json"
    said = json.loads(path.read_text())
    said |= {name: name == mode for name in said if name.startswith("pooling_mode")}
    path.write_text(json.dumps(said))


def reranker(cache: Path) -> Path:
    """A cross-encoder: does an article belong to a headline, or to one that shares words with it?"""
    from transformers import BertForSequenceClassification

    rows = [
        (title, body, float(place == 0))
        for title, bodies in offered(articles()[JUDGING + CALIBRATING :])
        for place, body in enumerate(bodies[:4])
    ]

    def loss(model: nn.Module, batch: Sequence[tuple[str, str, float]], tokens: Callable[..., Any]) -> Tensor:
        titles, bodies, wanted = zip(*batch, strict=True)
        logits = model(**tokens(list(titles), list(bodies))).logits[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(wanted))

    model = BertForSequenceClassification.from_pretrained(minilm_folder(), dtype=torch.float32, num_labels=1)
    return _trained(RERANKER, _folder(cache, RERANKER), model, rows, loss)


def reader(cache: Path) -> Path:
    """A model of answers: which words of a text fill the gap of a sentence?"""
    from transformers import BertForQuestionAnswering

    rows = [row for article in articles()[JUDGING + CALIBRATING :] for row in questions(article)]

    def loss(model: nn.Module, batch: Sequence[Row], tokens: Callable[..., Any]) -> Tensor:
        made = tokens([row["question"] for row in batch], [row["context"] for row in batch])
        places = []
        for number, row in enumerate(batch):
            start = row["answers"]["answer_start"][0]
            ends = start, start + len(row["answers"]["text"][0]) - 1
            found = [made.char_to_token(number, end, 1) for end in ends]
            places.append([-100 if place is None else place for place in found])  # cut off: it teaches nothing
        first, last = torch.tensor(places).T
        loss: Tensor = model(**made, start_positions=first, end_positions=last).loss
        return loss

    model = BertForQuestionAnswering.from_pretrained(minilm_folder(), dtype=torch.float32)
    return _trained(READER, _folder(cache, READER), model, rows, loss)


def labeller(cache: Path) -> Path:
    """Topics of Reuters' newswire, each a yes or a no."""
    from transformers import BertForSequenceClassification

    names = dict(enumerate(R8.classes))

    def loss(model: nn.Module, batch: Sequence[Row], tokens: Callable[..., Any]) -> Tensor:
        wanted = torch.tensor([[float(name in row["label"]) for name in R8.classes] for row in batch])
        logits = model(**tokens([row["text"] for row in batch])).logits
        return nn.functional.binary_cross_entropy_with_logits(logits, wanted)

    model = BertForSequenceClassification.from_pretrained(
        minilm_folder(),
        dtype=torch.float32,
        problem_type="multi_label_classification",
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    return _trained(LABELLER, _folder(cache, LABELLER), model, topics(cache)[0][R8.calibration :], loss)


def _folder(cache: Path, recipe: Recipe) -> Path:
    return cache / f"{recipe.name}-{sha256_json(asdict(recipe))[:8]}"


def _trained(
    recipe: Recipe,
    folder: Path,
    model: Any,
    rows: Sequence[T],
    loss: Callable[[nn.Module, Sequence[T], Callable[..., Any]], Tensor],
) -> Path:
    """The folder of a model that has learned from rows; its embeddings stay as they are.

    Args: loss: of the model for some rows; the third argument is the tokenizer, which cuts and pads.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())

    def tokens(*texts: Sequence[str]) -> Any:
        return tokenizer(*texts, truncation=True, max_length=recipe.seq_len, padding=True, return_tensors="pt")

    def make(progress: Progress) -> tuple[Any, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            batches = shuffled(rows, recipe, Random(recipe.seed))
            model.get_submodule("embeddings" if hasattr(model, "embeddings") else "bert.embeddings").requires_grad_(
                False
            )
            train(
                model,
                batches,
                len(batches),
                recipe,
                loss=lambda one, batch: loss(one, batch, tokens),
                progress=progress,
            )
        return model.eval(), tokenizer

    return kept(folder, recipe.name, make)
