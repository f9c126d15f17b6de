"""Segmentation models through the whole job: mean IoU, MACs and measured speed, and pictures of what they see.

The models learn shapes on photographs (benchmarks/tasks/scenes.py) once, which takes minutes; what is finished is not
done again, but measured in every run. Run: `python -m benchmarks.segmentation --record`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.jobs import SPEED, quality, reported, speed
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.tasks.scenes import MODELS, NAMES, scenes_folder, trained
from optin_deploy.data.class_maps import ClassMap
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.pruning.source import Source
from optin_deploy.quality.segmentation import largest
from optin_deploy.reporting.pictures import DPI, save_figure
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries
from optin_deploy.scoring.reading import reading_of

NAME = "segmentation"
HEADER = ("model", "MACs kept", "mean IoU", "dense", "points", "pixels right", "dense", *SPEED)
SHOWN = 4
"""Scenes in the picture."""


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--flops", type=float, nargs="+", default=[0.7])
    parser.add_argument("--samples", type=int, default=128, help="scenes that score and repair; no map is looked at")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps scenes and trained models")
    parser.add_argument("--out", type=Path, default=Path("out/segmentation"), help="keeps the jobs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    found = [
        done(name, flops, options.samples, options.cache, options.out)
        for name in options.models
        for flops in options.flops
    ]
    text = page(found)
    print(text)
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.segmentation")
    write_result(folder, NAME, {"jobs": found}, text, command)
    draw([Path(each["folder"]) for each in found], folder / f"{NAME}.png")


def done(name: str, flops: float, samples: int, cache: Path, home: Path) -> dict[str, Any]:
    """One job, as a user would do it."""
    data, out = scenes_folder(cache), home / f"{name}-{flops:g}-{samples}"
    source = Source(str(trained(name, cache)), calibration=str(data), evaluation=str(data), samples=samples)
    return {"model": name, **reported(source, flops, out)}


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The result for people."""
    rows = []
    for each in found:
        before, after = each["quality"]["beside"]["pixel_accuracy"]
        pixels = (f"{after:.1%}", f"{before:.1%}")
        rows.append((each["model"], f"{each['macs']['kept']:.3f}", *quality(each), *pixels, *speed(each)))
    return (
        f"# Segmentation without retraining\n\n{', '.join(NAMES[1:])} cut out of photographs on other photographs, "
        f"{found[0]['quality']['samples']} scenes of 128 x 128 pixels that nothing learned from. ONNX Runtime, batch 1,"
        f" 1 thread.\n\n{to_table(HEADER, rows)}\n\n![Scenes, their maps, and what the models see]({NAME}.png)"
    )


def draw(folders: Sequence[Path], path: Path) -> None:
    """Write a PNG: scenes, the truth, and what dense and cut networks see."""
    from matplotlib.figure import Figure

    prepared = [prepare(Workspace(folder).source(), folder) for folder in folders]
    rows = prepared[0].ready.rows.held_out
    assert rows is not None, "validation scenes judge"
    pixels = rows.batches[0]["pixel_values"][:SHOWN]
    truth = [label.read() for label in rows.labels[:SHOWN] if isinstance(label, ClassMap)]
    columns: dict[str, Sequence[np.ndarray]] = {"": [_shown(each) for each in pixels]}
    columns["truth"] = [each.numpy() for each in truth]
    for folder in folders:
        for title, file in zip(titles(folder.name), (DENSE, PRUNED), strict=True):
            columns[title] = _seen(folder / file, pixels, truth[0].shape)
    figure = Figure((1.5 * len(columns), 1.6 * SHOWN), dpi=DPI, layout="constrained")
    panels = figure.subplots(SHOWN, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        panels[0][column].set_title(title, fontsize=8)
        for axes, image in zip(panels[:, column], images, strict=True):
            axes.imshow(image, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
            axes.set_axis_off()
    save_figure(figure, path)


def titles(job: str) -> tuple[str, str]:
    """Titles of what the dense and the pruned network of a job see: segformer-0.7-128 keeps 70% of its MACs."""
    name, flops, _ = job.rsplit("-", 2)
    return f"{name}, dense", f"{name}, {float(flops):.0%} of the MACs"


def _seen(file: Path, pixels: Tensor, size: Sequence[int]) -> list[np.ndarray]:
    """The class of each pixel."""
    network = read_file(file)
    with torch.inference_mode():
        outputs = Program(network)({"pixel_values": pixels}).outputs
    reading = reading_of(network, {name: value.shape for name, value in outputs.items()})
    pictures = reading.read(outputs).pictures
    assert pictures is not None, "a segmentation model puts out pictures"
    return [largest(picture, size[0], size[1]).numpy() for picture in pictures]


def _shown(pixels: Tensor) -> np.ndarray:
    """A picture for people, (height, width, 3)."""
    low, high = pixels.amin(), pixels.amax()
    return ((pixels - low) / (high - low)).movedim(0, -1).numpy()


if __name__ == "__main__":
    main()
