"""A pruned model on disk and back: safetensors + config + plan + layout, reloaded with one call, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from typing_extensions import TypedDict  # of typing only from Python 3.12 on, says pydantic

from optin_deploy.arguments import checked
from optin_deploy.checkpoint.config import CONFIG_HINT, make_config, read_config
from optin_deploy.checkpoint.files import Stored, read_header
from optin_deploy.checkpoint.fit import sketch
from optin_deploy.checkpoint.wall import wall
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import PruningPlan
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.storage import atomic_folder, read_tensors, sha256_file, write_json, write_tensors
from optin_deploy.validation import ANY_FIELD, OPEN, read_stored

MANIFEST = "optin.json"
SCHEMA_VERSION = 1
DENSE_RATIO = 256
"""Values that the dense model may have for each one that is left: a bound for configs that cannot be."""
REWRITE_HINT = "Write the model again with `optin-export` or `optin rewrite`."


class Counts(TypedDict):
    """Parameters of both models."""

    dense: int
    pruned: int


class CutReport(TypedDict, total=False):
    """What is known about a cut; `cut` writes all of it, and more."""

    __pydantic_config__ = ANY_FIELD  # type: ignore[misc]  # pydantic reads it of the class

    dense_weights: str
    """sha256 of the dense model's tensors."""
    params: Counts
    parity: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """What is read of the optin.json in a model's folder."""

    __pydantic_config__ = OPEN

    schema_version: int
    plan_hash: str
    weights_sha256: str
    """Of the file model.safetensors."""
    report: CutReport
    key: str = ""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise BadInput(f"schema_version {self.schema_version}; this version of optin-deploy reads {SCHEMA_VERSION}")
        missing = {"dense_weights", "params", "parity"} - set(self.report)
        if self.key and missing:
            raise BadInput(f"report has no {', '.join(sorted(missing))}")


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A physically smaller transformers model with the plan that made it."""

    model: nn.Module
    """Of the original transformers class, with smaller Linear layers."""
    plan: PruningPlan
    layout: ModelLayout
    """Of the dense model; the plan refers to it."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What is known about the cut: MACs, parameters, parity, seconds."""
    preprocessor: Any = None
    """Tokenizer or image processor, saved beside the weights if given."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the dense model that are saved unchanged, by path in the folder: what transformers would write anew."""

    def save(self, folder: str | Path, *, key: str = "") -> Path:
        """Write the model to a folder, whole or not at all.

        Args: key: hash of the settings that made it, kept in the manifest.
        Returns: the folder.
        Raises: BadInput: the folder holds something else than a pruned model.
        """
        folder, _ = _folder(folder), checked(key, str, "key")
        with atomic_folder(folder) as temporary:
            config: Any = self.model.config
            config.architectures = [self.layout.model_class]
            config.save_pretrained(temporary)
            if self.preprocessor is not None:
                self.preprocessor.save_pretrained(temporary)
            for name, content in self.files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_bytes(content)
            # Hugging Face loaders ask for the format in the metadata.
            write_tensors(temporary / "model.safetensors", self.model.state_dict(), {"format": "pt"})
            write_json(temporary / "plan.json", self.plan.to_json())
            write_json(temporary / "layout.json", self.layout.to_json())
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "model_class": self.layout.model_class,
                "plan_hash": self.plan.hash,
                "weights_sha256": sha256_file(temporary / "model.safetensors"),
                "key": key,
                "report": dict(self.report),
            }
            write_json(temporary / MANIFEST, manifest)
        return folder


def load_pruned(folder: str | Path) -> PrunedModel:
    """Read what `PrunedModel.save` wrote, into a transformers model of the original class.

    Args: folder: the saved folder, or an output folder of `optin-export` (then its `model/`).
    Raises: BadInput, PlanMismatch: files are missing, truncated, or do not belong together.
    """
    folder = _folder(folder)
    if (folder / "model" / MANIFEST).is_file():
        folder = folder / "model"
    saved, layout, plan = read_saved(folder)
    tensors = read_tensors(folder / "model.safetensors", REWRITE_HINT)
    model = _empty(folder, layout, read_header(folder / "model.safetensors").values())
    if getattr(model, "pooler", None) is not None and not any(name.startswith("pooler.") for name in tensors):
        model.pooler = None
    try:
        smaller = rewrite_torch(model, layout, plan)
    except (AttributeError, AssertionError, IndexError, TypeError, RuntimeError, ArithmeticError) as err:
        raise PlanMismatch(f"{folder}/config.json does not fit its layout: {_problem(err)}. {REWRITE_HINT}") from err
    try:
        # Assigned, so that half-precision weights stay half; copied, because the file's tensors are not aligned.
        smaller.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as err:
        raise PlanMismatch(
            f"{folder}/model.safetensors does not fit its plan: {_problem(err)}. {REWRITE_HINT}"
        ) from err
    with wall(f"{folder}/config.json cannot be used", REWRITE_HINT):
        smaller.tie_weights(missing_keys=set())  # equal ones become one again: they were stored each on its own
    if saved.weights_sha256 != sha256_file(folder / "model.safetensors"):
        raise PlanMismatch(f"{folder}/model.safetensors is not the file that was saved here. {REWRITE_HINT}")
    return PrunedModel(smaller.eval(), plan, layout, saved.report)


def read_saved(folder: Path) -> tuple[Saved, ModelLayout, PruningPlan]:
    """What the folder of a pruned model says of itself, without its weights.

    Raises: BadInput, PlanMismatch: files are missing, damaged, or do not belong together.
    """
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder / MANIFEST} does not exist: {folder} is not a pruned model. {REWRITE_HINT}")
    saved = read_stored(Saved, folder / MANIFEST, REWRITE_HINT)
    layout = read_stored(ModelLayout, folder / "layout.json", REWRITE_HINT)
    plan = PruningPlan.read(folder / "plan.json", REWRITE_HINT, layout)
    if saved.plan_hash != plan.hash:
        raise PlanMismatch(f"{folder}/plan.json is not the plan that made these weights. {REWRITE_HINT}")
    return saved, layout, plan


def load(folder: str | Path) -> Any:
    """A pruned model, ready for `transformers.pipeline`: the original class with smaller layers.

    Of a network that was cut in its graph: the graph as a torch module, which returns a dict of its outputs.
    Raises: BadInput, PlanMismatch: as `load_pruned`.
    """
    from optin_deploy.jobs import stored

    if stored.is_stored(path := _folder(folder)):
        return stored.load(path)
    return load_pruned(folder).model


def _folder(given: str | Path) -> Path:
    """The path of a folder that exists or could be made.

    Raises: BadInput: no path, or one that no folder can have.
    """
    try:
        name = os.fspath(given)
        folder = Path(name) if name and "\0" not in name else None  # bytes are no path here
        nearest = None if folder is None else next(path for path in (folder, *folder.parents) if path.exists())
    except (OSError, TypeError) as err:
        raise BadInput(f"{given!r} cannot be a folder of a pruned model: {err}.") from err
    if folder is None or nearest is None or not nearest.is_dir() or not folder.resolve().name:
        raise BadInput(f"{given!r} cannot be a folder of a pruned model. Give the path of a folder of its own.")
    return folder if folder.name else folder.resolve()


def _empty(folder: Path, layout: ModelLayout, stored: Collection[Stored]) -> Any:
    """A dense model of the stored class with fresh weights; the class must be one of transformers' own."""
    name = layout.model_class
    found = getattr(transformers, name, None) if re.fullmatch(r"[A-Za-z0-9]+", name) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise BadInput(
            f"{folder}/layout.json names class {name!r}, which transformers {transformers.__version__} lacks."
        )
    path = folder / "config.json"
    try:
        with wall(f"{path} cannot be used", CONFIG_HINT):
            data = read_config(path)
            sketch(path, data, stored, found, ratio=DENSE_RATIO)
            return found(make_config(path, data))
    except BadInput as err:
        raise BadInput(f"{err} {REWRITE_HINT}") from err


def _problem(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
