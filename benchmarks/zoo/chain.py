"""Real ONNX files through the whole job: scored, planned, compensated, cut and proven by data, measured beside dense.

Texts are BBC articles, the last 128 of them judge; lines to be read are rendered from their words.
Run: python -m benchmarks.zoo.chain --record
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.data import bbc_articles, minilm_folder, write_calibration
from benchmarks.record import RESULTS, write_result
from benchmarks.zoo.faster import MADE
from benchmarks.zoo.real import REAL, Real, Unavailable
from exporters.network_job import Request, export_network
from optin_deploy.bench.report import to_table
from optin_deploy.budget import Limits
from optin_deploy.data.feeds import Drawing, Preparation
from optin_deploy.jobs.pruning import Recipe
from optin_deploy.planning.widths import Choice
from optin_deploy.terminal import stage_bar

SEQ_LEN, CALIBRATION, HELD_OUT = 128, 256, 128
LINE = (48, 240)
"""Height and width of a line of text."""
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")


@dataclass(frozen=True)
class Data:
    """What a network learns from, and what judges it."""

    calibration: Path
    judging: Path
    preparation: Preparation


def articles(folder: Path) -> Data:
    """News as texts."""
    rows = bbc_articles()
    return Data(
        write_calibration(rows[:CALIBRATION], folder / "calibration.jsonl"),
        write_calibration(rows[-HELD_OUT:], folder / "judging.jsonl"),
        Preparation(tokenizer=str(minilm_folder()), seq_len=SEQ_LEN),
    )


def lines(folder: Path) -> Data:
    """Words of the news, rendered in several fonts and colours."""
    words = " ".join(text for text, _ in bbc_articles()[:200]).split()
    paths = []
    for seed, count in enumerate((CALIBRATION, HELD_OUT)):
        random = Random(seed)
        pixels = np.stack([_line(words, random) for _ in range(count)])
        paths.append(folder / f"lines_{seed}.npz")
        np.savez(paths[-1], x=((pixels / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2))
    return Data(paths[0], paths[1], Preparation())


def _line(words: Sequence[str], random: Random) -> np.ndarray:
    start = random.randrange(len(words) - 4)
    height, width = LINE
    image = Image.new("RGB", (width, height), tuple(random.randrange(180, 256) for _ in range(3)))
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{random.choice(FONTS)}.ttf"
    ImageDraw.Draw(image).text(
        (random.randrange(4, 10), random.randrange(4, 12)),
        " ".join(words[start : start + 3])[:18],
        fill=tuple(random.randrange(90) for _ in range(3)),
        font=ImageFont.truetype(str(font), random.randrange(20, 28)),
    )
    return np.asarray(image)


ROWS: Mapping[str, tuple[Real, Callable[[Path], Data]]] = {
    "minilm-l6": (REAL["minilm-l6"], articles),
    MADE.name: (MADE, articles),
    "minilm-l3": (REAL["minilm-l3"], articles),
    "ppocr-recognition": (REAL["ppocr-recognition"], lines),
}
KEPT = ("quality", "macs", "params", "size_bytes", "parity", "latency", "groups", "seconds")
HEADER = ("file", "MACs kept", "allocation", "quality", "dense p50 ms", "cut p50 ms", "speed-up [95%]", "seconds")


@dataclass(frozen=True)
class Setting:
    """How all files are made smaller."""

    flops: float
    allocation: str
    align: int = 16
    threads: int = 1


def row(real: Real, make: Callable[[Path], Data], setting: Setting, folder: Path) -> dict[str, Any]:
    """Do the whole job on one file."""
    data = make(folder)
    request = Request(
        str(real.path()),
        data.calibration,
        data.judging,
        data.preparation,
        Drawing(CALIBRATION),
        Recipe(Limits(flops=setting.flops), Choice(align=setting.align, allocation=setting.allocation)),
        threads=setting.threads,
    )
    report = export_network(request, folder / "out", stage=stage_bar)
    assert report is not None
    told = report.to_json()
    return {
        "file": real.name,
        "what": real.what,
        "allocation": setting.allocation,
        **{
            key: told[key]
            for key in ("quality", "macs", "params", "size_bytes", "parity", "latency", "groups", "seconds")
        },
    }


def words(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    measured, quality = found["latency"][0], found["quality"]
    low, high = measured["ci95"]
    return (
        found["file"],
        f"{found['macs']['kept']:.3f}",
        found["allocation"],
        f"{quality['metric']} {quality['pruned']:.4f}",
        f"{measured['dense']['p50_ms']:.2f}",
        f"{measured['pruned']['p50_ms']:.2f}",
        f"{measured['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        f"{sum(found['seconds'].values()):.0f}",
    )


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--allocation", default="curves")
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    found = []
    for name in options.only:
        try:
            with tempfile.TemporaryDirectory() as folder:
                found.append(row(*ROWS[name], Setting(options.flops, options.allocation), Path(folder)))
            print(json.dumps({"file": name, "quality": found[-1]["quality"]}))
        except Unavailable as err:
            print(f"{name}: {err}")
    table = to_table(HEADER, [words(each) for each in found])
    text = (
        f"# Real files through the whole job, {options.flops:.0%} of their MACs\n\n{table}\n\n"
        f"{CALIBRATION} articles of {SEQ_LEN} tokens, or rendered lines, to score and compensate, {HELD_OUT} others "
        "judge; ONNX Runtime, 1 thread."
    )
    command = f"python -m benchmarks.zoo.chain --flops {options.flops} --allocation {options.allocation}"
    write_result(RESULTS if options.record else options.out, "zoo_chain", {"files": found}, text, command)


if __name__ == "__main__":
    main()
