"""What tuning without labels gives back: classifiers cut to a quarter of their MACs, tuned for five minutes.

One `optin-export --tune` a task, as a user would do it; its report tells what is right before the tuning and after it.
What is finished is not done again. Run: `python -m benchmarks.tuning --record`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks import TASKS
from benchmarks.tasks.images import save_pictures
from optin_deploy.data.samples import Sample
from optin_deploy.files.storage import atomic_folder
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.tuning.settings import LabelFree

NAME = "tuning"
HEADER = ("task", "rows", "steps", "minutes", "distance before", "after", "dense", "cut", "tuned", "of the loss back")


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", choices=[*TASKS], nargs="+", default=["sentiment", "cifar10"])
    parser.add_argument("--flops", type=float, default=0.25)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=2048, help="calibration rows; no label is looked at")
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps the fine-tuned models")
    parser.add_argument("--out", type=Path, default=Path("out/tuning"), help="keeps the jobs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    found = [done(name, options) for name in options.tasks]
    text = page(found, options.flops)
    print(text)
    command = command_of("benchmarks.tuning")
    write_result(RESULTS if options.record else options.out, NAME, {"jobs": found}, text, command)


def done(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One task, as a user would do it."""
    files = prepared(name, options.cache, options.out / name, options.rows, options.test_rows)
    out = options.out / f"{name}-{options.flops:g}-{options.rows}-{options.minutes:g}"
    if not (out / "report.json").is_file():
        (calibration,), (test,) = files.glob("calibration*"), files.glob("test*")
        seq_len = int((files / "seq_len").read_text(encoding="utf-8")) if calibration.is_file() else None
        model = str(files / "model")
        source = Source(model, None, str(calibration), seq_len=seq_len, samples=options.rows, evaluation=str(test))
        limits, tuning = Limits(flops=options.flops), LabelFree(options.minutes)
        export_model(Job(source, limits, points=(), dense=False, tuning=tuning), out, stage=stage_bar)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"task": name, **{key: report[key] for key in ("quality", "tuned", "macs", "seconds")}}


def prepared(name: str, cache: Path, folder: Path, rows: int, test_rows: int) -> Path:
    """A folder with the model and the rows that calibrate and judge it, as files."""
    if not folder.exists():
        made = TASKS[name](cache)
        model: Any = made.model
        with atomic_folder(folder) as temporary:
            for part in (model, made.preprocessor):
                part.save_pretrained(temporary / "model")
            (temporary / "seq_len").write_text(f"{made.seq_len}\n", encoding="utf-8")
            _write(made.calibration[:rows], temporary / "calibration", model.config.id2label)
            _write(made.test[:test_rows], temporary / "test", model.config.id2label)
    return folder


def _write(rows: Sequence[Sample], place: Path, names: Mapping[int, str]) -> None:
    """Texts as JSON lines, images as a folder with a subfolder for each class."""
    if rows[0].text is not None:
        lines = "".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)
        place.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
        return
    save_pictures(rows, names, place)


def page(found: Sequence[Mapping[str, Any]], flops: float) -> str:
    """Write the table."""
    rows = []
    for each in found:
        tuned, before, after = each["tuned"], each["tuned"]["quality_before"], each["quality"]["pruned"]
        lost = before["dense"] - before["pruned"]
        back = f"{1 - (before['dense'] - after) / lost:.0%}" if lost > 0 else "nothing was lost"
        counts = (f"{tuned['rows']:,}", f"{tuned['steps']:,}", f"{tuned['seconds'] / 60:.1f}")
        distances = (f"{tuned['before']:.4f}", f"{tuned['after']:.4f}")
        right = (f"{value:.1%}" for value in (before["dense"], before["pruned"], after))
        rows.append((each["task"], *counts, *distances, *right, back))
    return (
        f"# Tuning without labels\n\nCut to {flops:.0%} of the MACs, repaired in closed form, then `--tune`: AdamW "
        "towards the dense outputs on calibration rows without their labels. Distances are KL divergences from "
        "the dense outputs on calibration rows that are held out; right of test rows that nothing learned from.\n\n"
        f"{to_table(HEADER, rows)}"
    )


if __name__ == "__main__":
    main()
