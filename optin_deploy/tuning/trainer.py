"""How a network is trained, by transformers' Trainer; what was killed goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import takes
from optin_deploy.files.storage import sha256_json, sha256_tensors
from optin_deploy.network.hashing import network_hash
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.held_out import stacked
from optin_deploy.tuning.settings import Tuning
from optin_deploy.tuning.student import Student

log = logging.getLogger(__name__)
STEPS = 200
"""The state of a training is kept after so many steps."""


def train(
    student: Student, ready: Ready, classes: Tensor | None, tuning: Tuning, scratch: Path | None, progress: Progress
) -> None:
    """Let Trainer do it; the state that a killed run of the very same training left is gone on from."""
    from transformers import PrinterCallback

    rows, network = ready.rows.calibration, student.graph.network
    labels = {} if classes is None else {"classes": classes}
    key = [asdict(tuning), ready.key, rows.fingerprint, network_hash(network), sha256_tensors(labels)]
    key += [sha256_tensors(student.state_dict()), version("torch"), version("transformers")]
    exact = takes(network).rows
    with TemporaryDirectory() as nowhere:
        folder = Path(nowhere) if scratch is None else scratch / sha256_json(key)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        how = replace(tuning, batch_size=exact or tuning.batch_size)
        data = [{**row, **{k: v[i : i + 1] for k, v in labels.items()}} for i, row in enumerate(rows.rows())]
        trainer = _trainer(student, data, how, folder, kept=scratch is not None, exact=exact is not None)
        trainer.add_callback(_callback(progress))
        trainer.pop_callback(PrinterCallback)
        newest = _newest(folder)
        if newest is not None:
            log.warning("the training goes on after step %s of an earlier run", newest.rpartition("-")[2])
        trainer.train(resume_from_checkpoint=newest)
    student.cpu().eval()
    if not all(bool(value.isfinite().all()) for value in student.parameters()):
        raise BadInput(f"--learning-rate {tuning.learning_rate:g} led to NaN or infinity. Give a lower one.")


def _newest(folder: Path) -> str | None:
    """The newest state that was written whole; what a killed run left half is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (path / "trainer_state.json").is_file():  # is written last
            return str(path)
        shutil.rmtree(path)
    return None


def _trainer(
    student: Student, rows: list[dict[str, Tensor]], tuning: Tuning, folder: Path, *, kept: bool, exact: bool
) -> Any:
    from transformers import Trainer, TrainingArguments

    def collated(some: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: stacked([row[name] for row in some]) for name in some[0]}

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=tuning.epochs,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=tuning.seed,
        save_strategy="steps" if kept else "no",
        save_steps=STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=exact,
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(model=student, args=arguments, train_dataset=rows, data_collator=collated)


def _callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Reporting()
