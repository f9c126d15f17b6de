"""Text classifiers through the whole job, with tokens that go on their way and without: accuracy and measured speed.

MiniLM-L6 fine-tuned on Reuters' newswire (benchmarks/tasks/text.py), every text padded to the model's 64 tokens, as a
server with static shapes takes them. What is finished is not done again, but measured in every run. Run:
`python -m benchmarks.texts --record`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import SPEED, quality, reported, speed
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks import TASKS
from optin_deploy.data.samples import Sample
from optin_deploy.files.storage import atomic_folder
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries
from optin_deploy.structure.labels import DEFAULT_KINDS, TOKENS

NAME = "texts"
HEADER = ("what goes", "MACs kept", "right", "dense", "points", *SPEED)
UNITS: Mapping[str, tuple[str, ...]] = {"widths": DEFAULT_KINDS, "widths and tokens": (*DEFAULT_KINDS, TOKENS)}
"""Kinds of units by what a person calls them."""


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="r8", choices=("r8", "sentiment", "topics"))
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--samples", type=int, default=512, help="texts that score and repair; no label is looked at")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps texts and the trained model")
    parser.add_argument("--out", type=Path, default=Path("out/texts"), help="keeps the jobs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    files = prepared(options.task, options.cache, options.out)
    found = [
        done(files, flops, what, options.samples, options.out / f"{options.task}-{flops:g}-{number}-{options.samples}")
        for flops in options.flops
        for number, what in enumerate(UNITS)
    ]
    text = page(options.task, found)
    print(text)
    command = command_of("benchmarks.texts")
    write_result(RESULTS if options.record else options.out, NAME, {"jobs": found}, text, command)


def prepared(task: str, cache: Path, out: Path) -> Path:
    """A folder with the model, and the texts that calibrate and judge it as JSON lines."""
    folder = out / task
    if not folder.exists():
        made = TASKS[task](cache)
        with atomic_folder(folder) as temporary:
            model: Any = made.model
            for part in (model, made.preprocessor):
                part.save_pretrained(temporary / "model")
            (temporary / "seq_len").write_text(f"{made.seq_len}\n", encoding="utf-8")
            for name, rows in (("calibration", made.calibration), ("test", made.test)):
                (temporary / f"{name}.jsonl").write_text(_lines(rows), encoding="utf-8")
    return folder


def _lines(rows: Sequence[Sample]) -> str:
    return "".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)


def done(files: Path, flops: float, what: str, samples: int, out: Path) -> dict[str, Any]:
    """One job, as a user would do it."""
    source = Source(
        str(files / "model"), calibration=str(files / "calibration.jsonl"), evaluation=str(files / "test.jsonl"),
        seq_len=int((files / "seq_len").read_text(encoding="utf-8")), samples=samples,
        units=UNITS[what], drop_tokens=TOKENS in UNITS[what],
    )  # fmt: skip
    return {"what": what, **reported(source, flops, out)}


def page(task: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The result for people."""
    rows = [(each["what"], f"{each['macs']['kept']:.3f}", *quality(each), *speed(each)) for each in found]
    count, longest = found[0]["quality"]["samples"], found[0]["latency"][0]["seq_len"]
    return (
        f"# Texts whose tokens go on their way\n\nMiniLM-L6 fine-tuned on {task}, {count:,} texts that nothing learned "
        f"from, {longest} tokens. ONNX Runtime, batch 1, 1 thread.\n\n"
        f"{to_table(HEADER, rows)}"
    )


if __name__ == "__main__":
    main()
