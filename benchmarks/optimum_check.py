"""Prove that Hugging Face Optimum loads what optin-export writes and repeats the outputs that torch recorded.

Optimum's ONNX Runtime classes need transformers 4, so this runs in an environment of its own, without the project:

    python3 -m venv /tmp/optimum-env && /tmp/optimum-env/bin/pip install -r benchmarks/optimum_requirements.txt
    /tmp/optimum-env/bin/python benchmarks/optimum_check.py DIR

DIR is an output folder of an encoder (BertModel, ...) or of a sequence classifier. A small classifier to begin with:

    .venv/bin/python benchmarks/optimum_check.py --make-classifier tiny
    .venv/bin/optin-export tiny --calibration tiny/texts.txt --samples 32 --seq-len 32 --no-dense --out DIR
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

TOLERANCE = 1e-4
"""float32, relative to the largest recorded output: torch and ONNX Runtime sum in another order."""
SMALLEST_VOCABULARY = 100
"""A folder without tokenizer files gives, silently, a tokenizer of five tokens."""
MIXED_TEXT = "Ünited NATIONS, don't re-elect: 3.5% of 1,200"
"""Case, accents, punctuation and digits: where tokenizer settings that were read wrongly show."""
PACKAGES = ("optimum", "optimum-onnx", "transformers", "tokenizers", "onnxruntime", "torch")


def check(folder: Path) -> bool:
    """Load an output folder with Optimum, print a table of errors; True if all are within the tolerance."""
    from optimum import onnxruntime as ort  # type: ignore[import-not-found]  # lives in the second environment
    from transformers import AutoTokenizer, pipeline

    if not (folder / "model.onnx").is_file():  # without it Optimum exports by itself, even with export=False
        raise SystemExit(f"{folder} has no model.onnx; give the output folder of optin-export.")
    make_pipeline: Any = pipeline  # its overloads name only transformers' own model classes
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    classifies = architecture.endswith("ForSequenceClassification")
    if not classifies and not architecture.endswith("Model"):
        raise SystemExit(f"{folder} holds a {architecture}; possible: *Model, *ForSequenceClassification.")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) <= SMALLEST_VOCABULARY:
        raise SystemExit(f"{folder} gives a tokenizer of {len(tokenizer)} tokens: its own files were not read.")
    model = (ort.ORTModelForSequenceClassification if classifies else ort.ORTModelForFeatureExtraction).from_pretrained(
        folder, provider="CPUExecutionProvider"
    )

    recorded = load_file(folder / "samples.safetensors")
    inputs = {name.removeprefix("input."): t for name, t in recorded.items() if name.startswith("input.")}
    output = "logits" if classifies else "last_hidden_state"
    expected, dense = recorded[f"pruned.{output}"], recorded[f"dense.{output}"]
    replayed = model(**inputs)[output]

    row, text = recorded_text(tokenizer, inputs)
    run = make_pipeline("text-classification" if classifies else "feature-extraction", model=model, tokenizer=tokenizer)
    if classifies:
        scores = {label["label"]: label["score"] for label in run(text, top_k=None, function_to_apply="none")}
        piped, wanted = torch.tensor([scores[model.config.id2label[i]] for i in range(len(scores))]), expected[row]
    else:
        piped, wanted = torch.tensor(run(text)[0]), expected[row][inputs["attention_mask"][row].bool()]

    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    same_ids = tokenizer(MIXED_TEXT)["input_ids"] == reference.encode(MIXED_TEXT).ids

    errors = {
        "recorded inputs": relative_error(replayed, expected),
        "text in a pipeline": relative_error(piped, wanted),
    }
    print(f"{folder}: {architecture} in {type(model).__name__} from {model.path.name}")
    for name, error in errors.items():
        print(f"  {name:<20} {error:.1e}  {'ok' if error <= TOLERANCE else f'FAILED: above {TOLERANCE:.0e}'}")
    print(f"  {'dense model':<20} {relative_error(dense, expected):.1e}  for comparison: the size of a real difference")
    print(f"  {'tokenizer':<20} {len(tokenizer)} tokens  {'ok' if same_ids else 'FAILED: ids unlike tokenizer.json'}")
    print("  " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    return same_ids and all(error <= TOLERANCE for error in errors.values())


def recorded_text(tokenizer: Any, inputs: dict[str, Tensor]) -> tuple[int, str]:
    """The first recorded row that is a text: decoded and encoded it gives the same ids again."""
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        real = ids[mask.bool()].tolist()
        text = tokenizer.decode(real, skip_special_tokens=True)
        if tokenizer(text)["input_ids"] == real:
            return row, text
    raise SystemExit(f"none of {len(inputs['input_ids'])} recorded rows decodes to a text that encodes to it again.")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute error, relative to the largest expected value; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_classifier(folder: Path) -> None:
    """Write a tiny BERT of three labels with its tokenizer, and texts.txt to calibrate on (transformers 5)."""
    import transformers as hf

    letters = string.ascii_lowercase
    words = ["".join(pair) for pair in product(letters, "aeiou")]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 192}
    model = hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=len(tokens), id2label=dict(enumerate("xyz")), **shape)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit LayerNorms would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    hf.BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
    draw = random.Random(0)
    texts = (" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(64))
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")


def main() -> int:
    """Exit code 1 on a mismatch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder of optin-export")
    parser.add_argument("--make-classifier", action="store_true", help="write a tiny model into FOLDER instead")
    args = parser.parse_args()
    if args.make_classifier:
        make_classifier(args.folder)
        return 0
    return 0 if check(args.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
