"""`optin finetune`: train the cut model on rows of one's own, towards labels and the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.options import Eval, Folder, Writing
from optin_deploy.commands.source import Columns, Seed
from optin_deploy.commands.values import options
from optin_deploy.reporting.terminal import print_table, stage_bar
from optin_deploy.tuning.settings import TrainingRows, Tuning

FINETUNE_EXAMPLES = """
Examples:

    optin finetune work --data labelled.jsonl --epochs 1

    optin finetune work --data texts.txt --epochs 2   # no labels: towards the dense model's outputs alone

    optin finetune backbone --data pictures/ --epochs 0   # an embedder gets a classifier of the folder's classes

    optin build work-tuned && optin bench work-tuned   # engines and times, as of any output folder
"""


@dataclass(frozen=True)
class LearnedRows:
    """Rows that are learned from, and rows that judge."""

    data: Annotated[
        Path,
        typer.Option(
            help="Rows to learn from, as --calibration takes them, with or without labels; some of them judge."
        ),
    ]
    columns: Columns
    samples: Annotated[int, typer.Option(help="Rows to learn from, drawn by --seed.")] = TrainingRows.samples
    evaluation: Eval = None


@dataclass(frozen=True)
class Learning:
    """How weights are trained."""

    epochs: Annotated[
        float, typer.Option(help="Times that all rows are learned from; 0: only a classifier is fitted.")
    ] = Tuning.epochs
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate; it rises over a tenth of the steps, then falls.")
    ] = Tuning.learning_rate
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = Tuning.batch_size
    distill: Annotated[
        float, typer.Option(help="Weight of the distance to the dense outputs, from 0 to 1; labels have the rest.")
    ] = Tuning.distill
    seed: Seed = Tuning.seed


@options
def finetune(
    folder: Folder,
    rows: LearnedRows,
    learning: Learning,
    writing: Writing,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained model. [default: DIR-tuned]")] = None,
) -> None:
    """Fine-tune the model in DIR; writes a new output folder, whose model.onnx keeps the smaller sizes."""
    learned = TrainingRows(rows.data, rows.evaluation, rows.samples, **vars(rows.columns))
    place = out or folder.resolve().with_name(f"{folder.resolve().name}-tuned")
    tuning = Tuning(**vars(learning))
    from optin_deploy.jobs.tuned_folder import finetune_folder

    force, dry_run = writing.force, writing.dry_run
    found = finetune_folder(folder, place, learned, tuning, force=force, dry_run=dry_run, stage=stage_bar)
    if found is None:
        typer.echo(f"would train {folder / 'model.onnx'} and write {place / 'model.onnx'}")
        return
    before, after = found.record.before, found.record.after
    row = (before.metric, *(f"{value:.4f}" for value in (before.dense, before.pruned, after.pruned)))
    print_table(("", "dense", "pruned", "tuned"), [row], f"{after.samples} rows that nothing learned from")
    if found.record.classes is not None:
        typer.echo(f"classes: {', '.join(found.record.classes)}")
    typer.echo(f"{'Found finished' if found.reused else 'Wrote'} {place / 'model.onnx'}. Next: optin build {place}")
