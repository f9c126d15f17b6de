"""Tiny checkpoints on disk, as a user has them: weights, config, tokenizer or image processor, and calibration data."""

from __future__ import annotations

import atexit
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from optin_deploy import cli
from optin_deploy.files.names import LOCK
from optin_deploy.files.ownership import RECORD

HIDDEN, LAYERS, HEADS, FFN = 48, 2, 6, 96
SEQ_LEN = 16
"""Calibration length of the text jobs."""
POSITIONS = 40
"""Position table of the text models."""
CLASSES = ("arts", "business", "sport")
ROWS = 60
"""Calibration rows: 12 of them are held out."""
WORDS = """
    a about after again all and artist at bank before bill bridge by car city coach company council court
    dance deal early every film final fire for from game goal gold he her house in into it king last late law lost
    market match money more museum music new night no of off oil old on opera out over owner paint play poem price
    profit quick rain record rise river road sale second share she song stage stock summer team tennis that the their
    they time to town trade train tuesday under up voice vote walk was water week when winter with work world year
    young
"""
VOCABULARY = 160


@cache
def root() -> Path:
    """Where everything of this session lies; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="optin-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def texts() -> tuple[str, ...]:
    """ROWS texts of 5 to 30 words about different things."""
    rng = random.Random(0)
    return tuple(" ".join(rng.choices(WORDS.split(), k=rng.randint(5, 30))) + "." for _ in range(ROWS))


@cache
def bert() -> Path:
    """A BertModel with its pooler."""
    return _save_text(transformers.BertModel, "bert", seed=1)


@cache
def classifier() -> Path:
    """A BertForSequenceClassification over CLASSES, whose predictions are not all the same."""
    return _save_text(transformers.BertForSequenceClassification, "classifier", seed=2, **_classes())


@cache
def gpt2() -> Path:
    """A GPT2ForSequenceClassification over CLASSES, as people save them: with a cache for keys and values."""
    kind = transformers.GPT2ForSequenceClassification
    return _save_text(kind, "gpt2", seed=4, pad_token_id=0, n_inner=FFN, **_classes())


@cache
def vit() -> Path:
    """A ViTForImageClassification of 32 x 32 images over CLASSES."""
    config = transformers.ViTConfig(image_size=32, patch_size=8, **_classes(), **_sizes())
    model = _spread(transformers.ViTForImageClassification, config, seed=3)
    folder = root() / "vit"
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "do_normalize": True}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | mean))
    return folder


@cache
def lines() -> Path:
    """texts() as a .txt file."""
    path = root() / "lines.txt"
    path.write_text("".join(f"{text}\n" for text in texts()))
    return path


@cache
def labelled() -> Path:
    """texts() as a .jsonl file; the labels are the classifier's own predictions, so its accuracy is 1."""
    model = transformers.BertForSequenceClassification.from_pretrained(classifier()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier())
    rows = []
    for text in texts():
        encoded = tokenizer(text, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
        with torch.inference_mode():
            rows.append({"text": text, "label": CLASSES[int(model(**encoded).logits.argmax())]})
    path = root() / "labelled.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@cache
def photos() -> Path:
    """An image folder with a subfolder a class."""
    rng = np.random.default_rng(0)
    folder = root() / "photos"
    for index in range(30):
        path = folder / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(10, 0).repeat(10, 1)).save(path)  # (40, 40, 3)
    return folder


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, as their entry points do, but times and measures memory in fewer rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, program: str, *arguments: object) -> Ran:
        self._capsys.readouterr()
        code = run(program, *arguments, monkeypatch=self._monkeypatch)
        said = self._capsys.readouterr()
        return Ran(code, said.out, said.err)


def run(program: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of `optin ...` or `optin-export ...`."""
    from optin_deploy.jobs import bench
    from optin_deploy.measuring import artifacts as measuring
    from optin_deploy.measuring.device_time import measure_device_time
    from optin_deploy.measuring.timing import measure_pair
    from optin_deploy.scoring import unit_parts

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
        patch.setattr(measuring, "measure_pair", partial(measure_pair, blocks=2))
        patch.setattr(bench, "measure_device_time", partial(measure_device_time, blocks=2))
        patch.setattr(unit_parts, "MOST_PROBES", unit_parts.FIRST_PROBES)  # in work while memory is measured
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, {"TRANSFORMERS_VERBOSITY": "error"}.get(name, "1"))
        patch.setenv("COLUMNS", "200")  # tables and messages unbroken
        before = signal.getsignal(signal.SIGINT)
        with one_thread(), pytest.raises(SystemExit) as stopped:
            {"optin": cli.main, "optin-export": cli.export_main}[program]()
        signal.signal(signal.SIGINT, before)  # a command ends its process with the signal ignored
    return int(stopped.value.code or 0)


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads than free cores make tiny matrix products wait for each other, up to a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def text_options(calibration: Path, out: Path) -> list[object]:
    """The flags that all text jobs share: seconds, not minutes."""
    return ["--calibration", calibration, "--seq-len", SEQ_LEN, "--align", 8, "--out", out]


@cache
def finished_job() -> Path:
    """The output folder of one `optin-export` of the labelled classifier; copy it, do not change it."""
    out = root() / "finished"
    with pytest.MonkeyPatch.context() as patch:
        code = run("optin-export", classifier(), *text_options(labelled(), out), "--threads", 1, monkeypatch=patch)
    assert code == 0
    return out


def copy_of(folder: Path, target: Path) -> Path:
    """A copy with the same modification times."""
    return Path(shutil.copytree(folder, target))


def temporary_files(folder: Path) -> list[str]:
    """What must never be left behind, in a folder or beside it."""
    found = (*folder.parent.glob(f".{folder.name}*"), *folder.rglob(".*"), *folder.rglob("*.tmp*"))
    return sorted(str(path) for path in found if path.name not in (RECORD, LOCK))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file besides our records and locks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, LOCK))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _sizes() -> dict[str, Any]:
    return {
        "initializer_range": 0.3,  # with transformers' 0.02 a tiny model hardly depends on its weights
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
    }


def _save_text(kind: Any, name: str, *, seed: int, **options: Any) -> Path:
    sizes = _sizes() | {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    config = kind.config_class(**(sizes | options))
    folder = root() / name
    _spread(kind, config, seed=seed).save_pretrained(folder)
    tokenizer = transformers.BertTokenizer(vocab=_vocabulary(texts()), model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    return folder


def _spread(kind: Any, config: Any, *, seed: int) -> Any:
    """A model whose weights are large enough that inputs matter, and whose vectors are not all 0 or 1."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _vocabulary(corpus: Sequence[str]) -> dict[str, int]:
    """WordPiece: the letters at the start and inside of a word, and the most frequent words whole."""
    counts = Counter(re.findall(r"\w+|[^\w\s]", " ".join(corpus).lower()))
    letters = sorted(set("".join(counts)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = (word for word, _ in counts.most_common() if len(word) > 1)
    return {piece: i for i, piece in enumerate([*pieces, *words][:VOCABULARY])}


def _classes() -> dict[str, Any]:
    return {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
