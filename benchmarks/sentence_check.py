"""Prove that sentence-transformers' backends and fastembed make the embeddings of an output folder that torch recorded.

The ONNX backend needs transformers 4, so this runs in the environment of optimum_check.py, without the project:

    /tmp/optimum-env/bin/python benchmarks/sentence_check.py DIR

DIR is an output folder of `optin-export` of a sentence-transformers folder, also with --pool or --precision int8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4
"""float32, of embeddings as the folder makes them: absolute where they have unit length."""
FROM_ONNX = {"export": False, "from_onnx": True, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
"""OpenVINO's backend looks for a file of its own else, and computes in bfloat16 wherever the CPU does."""
POOLED = "sentence_embedding"
PACKAGES = (
    "sentence-transformers",
    "optimum-onnx",
    "optimum-intel",
    "transformers",
    "onnxruntime",
    "openvino",
    "fastembed",
)


def check(folder: Path) -> bool:
    """Compare each backend on the recorded texts, print a table; True if all float32 ones are within the tolerance."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), backend="onnx", device="cpu")
    recorded = load_file(folder / "samples.safetensors")
    rows = list(recorded_texts(model.tokenizer, recorded["input.input_ids"], recorded["input.attention_mask"]))
    if not rows:
        raise SystemExit("no recorded row decodes to a text that encodes to it again.")
    texts, mask = [text for _, text in rows], recorded["input.attention_mask"][[row for row, _ in rows]]
    expected, dense = (
        behind(model, recorded[f"{role}.last_hidden_state"][[row for row, _ in rows]], mask)
        for role in ("pruned", "dense")
    )
    good = True
    print(f"{folder}: {len(texts)} texts, embeddings of {expected.shape[1]}")
    for name, embeddings in found(folder, model, texts):
        error = float(np.abs(embeddings - expected).max()) if embeddings.shape == expected.shape else float("inf")
        exact = "int8" not in name
        good &= error <= TOLERANCE or not exact
        judged = ("ok" if error <= TOLERANCE else f"FAILED: above {TOLERANCE:.0e}") if exact else "not judged"
        print(f"  {name:<18} {error:.1e}  mean cosine {cosine(embeddings, expected):.6f}  {judged}")
    print(f"  {'dense model':<18} {np.abs(dense - expected).max():.1e}  mean cosine {cosine(dense, expected):.6f}")
    print("  " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    return good


def found(folder: Path, model: Any, texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and embeddings of each backend; without the prompts, which the recorded texts have in them."""
    from sentence_transformers import SentenceTransformer

    yield "onnx", model.encode(texts, prompt="")
    for path in sorted(folder.glob("model*.onnx")):
        kind = path.stem.removeprefix("model")
        file: Any = {"file_name": path.name}
        if kind:
            other = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=file)
            yield f"onnx{kind}", other.encode(texts, prompt="")
        other = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs=file | FROM_ONNX)
        yield f"openvino{kind}", other.encode(texts, prompt="")
    if POOLED in [each.name for each in model[0].auto_model.session.get_outputs()]:
        yield "fastembed", by_fastembed(folder, model.get_sentence_embedding_dimension(), texts)


def by_fastembed(folder: Path, size: int, texts: list[str]) -> np.ndarray:
    """Embeddings of a graph with --pool, which holds all that the folder does."""
    from fastembed import TextEmbedding  # type: ignore[import-not-found]  # lives in the second environment
    from fastembed.common.model_description import ModelSource, PoolingType  # type: ignore[import-not-found]

    TextEmbedding.add_custom_model(
        model="cut",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(hf="cut"),
        dim=size,
        model_file="model.onnx",
        output_name=POOLED,
    )
    return np.array(list(TextEmbedding("cut", specific_model_path=str(folder)).embed(texts)))


def behind(model: Any, states: Tensor, mask: Tensor) -> np.ndarray:
    """What the folder's modules behind the model make of recorded states."""
    features: Any = {"token_embeddings": states, "attention_mask": mask}
    with torch.inference_mode():
        for module in list(model)[1:]:
            features = module(features)
    return np.asarray(features[POOLED])


def recorded_texts(tokenizer: Any, ids: Tensor, masks: Tensor) -> Iterator[tuple[int, str]]:
    """Recorded rows that are texts: decoded and encoded they give the same ids again."""
    for row, (each, mask) in enumerate(zip(ids, masks, strict=True)):
        real = each[mask.bool()].tolist()
        text = tokenizer.decode(real, skip_special_tokens=True)
        if tokenizer(text)["input_ids"] == real:
            yield row, text


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the rows."""
    return float(torch.cosine_similarity(torch.from_numpy(one).double(), torch.from_numpy(other).double()).mean())


def main() -> int:
    """Exit code 1 on a mismatch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder of optin-export")
    return 0 if check(parser.parse_args().folder) else 1


if __name__ == "__main__":
    sys.exit(main())
