"""`optin finetune`: train the cut model on rows of one's own, towards labels and the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.options import DryRun, Eval, Folder, Force, LabelColumn, PairColumn, Seed, TextColumn
from optin_deploy.reporting.terminal import print_table, stage_bar

FINETUNE_EXAMPLES = """
Examples:

    optin finetune work --data labelled.jsonl --epochs 1

    optin finetune work --data texts.txt --epochs 2   # no labels: towards the dense model's outputs alone

    optin finetune backbone --data pictures/ --epochs 0   # an embedder gets a classifier of the folder's classes

    optin build work-tuned && optin bench work-tuned   # engines and times, as of any output folder
"""
Data = Annotated[
    Path,
    typer.Option(help="Rows to learn from, as --calibration takes them, with or without labels; some of them judge."),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the trained model. [default: DIR-tuned]")]
Epochs = Annotated[float, typer.Option(help="Times that all rows are learned from; 0: only a classifier is fitted.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate; it rises over a tenth of the steps, then falls.")]
BatchSize = Annotated[int, typer.Option(help="Rows of a step.")]
Distill = Annotated[
    float,
    typer.Option(help="Weight of the distance to the dense outputs, from 0 to 1; labels have the rest."),
]
Samples = Annotated[int, typer.Option(help="Rows to learn from, drawn by --seed.")]


def finetune(
    folder: Folder,
    data: Data,
    out: Out = None,
    epochs: Epochs = 1.0,
    learning_rate: Rate = 2e-5,
    batch_size: BatchSize = 32,
    distill: Distill = 0.5,
    samples: Samples = 2048,
    evaluation: Eval = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    pair_column: PairColumn = "text_pair",
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune the model in DIR; writes a new output folder, whose model.onnx keeps the smaller sizes."""
    from optin_deploy.tuning.folder import Rows, finetune_folder
    from optin_deploy.tuning.trainer import Tuning

    rows = Rows(data, evaluation, samples, text_column, label_column, pair_column)
    place = out or folder.resolve().with_name(f"{folder.resolve().name}-tuned")
    tuning = Tuning(epochs, learning_rate, batch_size, distill, seed)
    tuned = finetune_folder(folder, place, rows, tuning, force=force, dry_run=dry_run, stage=stage_bar)
    if tuned is None:
        typer.echo(f"would train {folder / 'model.onnx'} and write {place / 'model.onnx'}")
        return
    before, after = tuned.before, tuned.after
    row = (before.metric, *(f"{value:.4f}" for value in (before.dense, before.pruned, after.pruned)))
    print_table(("", "dense", "pruned", "tuned"), [row], f"{after.samples} rows that nothing learned from")
    if tuned.names is not None:
        typer.echo(f"classes: {', '.join(tuned.names)}")
    typer.echo(f"{place / 'model.onnx'}; engines: optin build {place}")
