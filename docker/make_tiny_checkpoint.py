"""Write a random two-layer BERT with its tokenizer to a folder: a checkpoint for trying an image without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

POSITIONS = 40


def main(folder: Path) -> None:
    """Save model and tokenizer; the tokenizer knows letters only, so that any text becomes many tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        max_position_embeddings=POSITIONS,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=96,
        initializer_range=0.3,  # with transformers' 0.02 a tiny model hardly depends on its weights
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    BertTokenizer(vocab=vocabulary, model_max_length=POSITIONS).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
