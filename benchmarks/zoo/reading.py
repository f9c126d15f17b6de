"""What users see of a model beside the figure of quality: text that is read, words that are heard, things found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image

from benchmarks.zoo.material import JUDGING, TEACHING, features, names_in, recordings, written
from benchmarks.zoo.models import ppocr, rampart
from benchmarks.zoo.whisper import whisper

Said = Mapping[str, str]
"""What was found, in words, by what it is called."""
Judge = Callable[[Path, Path, Path], Said]
"""Takes the dense network, the smaller one, and the rows that judge."""
BLANK = 0
"""Class of no letter."""
BOXES = 4
"""Rows of a YOLO's output before its classes."""
FIRST = (50257, 50362)
"""Whisper's start of a transcript, without times."""
END, TOKENS = 50256, 16


def _run(path: Path, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: values[i : i + 8]})[0] for i in range(0, len(values), 8)]
    return np.concatenate(parts)


def _pixels(folder: Path, mean: float, std: float, size: tuple[int, int] | None = None) -> np.ndarray:
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    scaled = [image.resize(size, Image.Resampling.BILINEAR) if size else image for image in images]
    values = (np.stack([np.asarray(image) for image in scaled]) / 255 - mean) / std
    return values.astype(np.float32).transpose(0, 3, 1, 2)


def lines_read(dense: Path, smaller: Path, rows: Path) -> Said:
    """Count lines that are read right, spaces aside."""
    told = {each.key: each.value for each in onnx.load(ppocr(), load_external_data=False).metadata_props}
    alphabet = ["", *told["character"].split("\n"), " "]
    values, written = _pixels(rows, 0.5, 0.5), names_in(rows)
    right = []
    for path in (dense, smaller):
        read = [_read(classes, alphabet) for classes in _run(path, values).argmax(-1)]
        right.append(sum(_same(*pair) for pair in zip(read, written, strict=True)))
    return {"lines read right": f"{right[1]} of {len(written)} (dense {right[0]})"}


def _read(classes: np.ndarray, alphabet: Sequence[str]) -> str:
    """Letters without repeats and blanks."""
    kept = classes[np.append(True, classes[1:] != classes[:-1])]
    return "".join(alphabet[one] for one in kept if one != BLANK)


def _same(read: str, written: str) -> bool:
    return read.replace(" ", "") == written.replace(" ", "")


def entities_found(dense: Path, smaller: Path, rows: Path) -> Said:
    """Compare labels where the dense network names an entity."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(rampart())(
        written(rows), padding=True, truncation=True, max_length=64, return_tensors="np"
    )
    first, second = (_labels(path, batch) for path in (dense, smaller))
    named = (first != 0) & (batch["attention_mask"] == 1)
    return {"tokens of entities named as before": f"{float((first == second)[named].mean()):.3f} of {int(named.sum())}"}


def _labels(path: Path, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: batch[each.name].astype(np.int64) for each in session.get_inputs()}
    found: np.ndarray = np.asarray(session.run(None, given)[0]).argmax(-1)
    return found


def words_right(dense: Path, smaller: Path, rows: Path) -> Said:
    """Count recordings whose words come out right, decoded greedily by Whisper's own decoder."""
    from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

    spoken = recordings()
    names = [name for name in (*TEACHING, *JUDGING) if name in spoken]
    values = features([spoken[name] for name in names])
    model: Any = WhisperForConditionalGeneration.from_pretrained(whisper())
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_file=str(whisper() / "tokenizer.json"))
    right = []
    for path in (dense, smaller):
        states = torch.from_numpy(_run(path, values))
        texts = [tokenizer.decode(_heard(model, state)) for state in states]
        heard = [[*filter(str.isalpha, "".join(c if c.isalpha() else " " for c in t).lower().split())] for t in texts]
        right.append(sum(words == name.lower().split("_") for words, name in zip(heard, names, strict=True)))
    return {"recordings right": f"{right[1]} of {len(names)} (dense {right[0]})"}


def _heard(model: Any, state: torch.Tensor) -> list[int]:
    from transformers.modeling_outputs import BaseModelOutput

    ids = list(FIRST)
    with torch.no_grad():
        for _ in range(TOKENS):
            given = {"decoder_input_ids": torch.tensor([ids]), "encoder_outputs": BaseModelOutput(state.unsqueeze(0))}
            best = int(model(**given).logits[0, -1].argmax())
            if best == END:
                break
            ids.append(best)
    return ids[len(FIRST) :]


def things_found(dense: Path, smaller: Path, rows: Path) -> Said:
    """Compare the surest class at each place, and how sure it is."""
    values = _pixels(rows, 0.0, 1.0, (320, 320))
    first, second = (_run(path, values)[:, BOXES:] for path in (dense, smaller))
    same = float((first.argmax(1) == second.argmax(1)).mean())
    together = float(np.corrcoef(first.max(1).ravel(), second.max(1).ravel())[0, 1])
    return {"same surest class at a place": f"{same:.3f}", "correlation of its score": f"{together:.3f}"}
