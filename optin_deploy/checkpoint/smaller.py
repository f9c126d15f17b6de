"""The folder of a cut transformers model: the dense config, smaller weights under their names, and other sizes."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from optin_deploy.common.stored import Stored
from optin_deploy.common.validation import OPEN, STORED
from optin_deploy.common.version import __version__
from optin_deploy.cutting.attributes import Sizes
from optin_deploy.cutting.torch import tensors
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.ownership import Record
from optin_deploy.files.storage import atomic_folder, read_json, sha256_file, sha256_json, write_tensors
from optin_deploy.planning.budget import DEFAULT_FLOPS
from optin_deploy.planning.plan import NetworkPlan

MANIFEST, CONFIG, WEIGHTS, PLAN = "optin.json", "config.json", "model.safetensors", "plan.json"
FIRST_EDITION, FIRST_LAYOUT = 1, "layout.json"
"""The schema_version of folders that rows of a table were needed to read, and a file that only those have."""
JOB, MODEL = "source.json", "model"
"""What a job starts from, beside the folder of its model, and what that folder is called."""
BASE_MODEL = "base_model"
"""What is known of the cut: the dense model's id on the Hub; a folder of this machine is told to nobody."""
LABELS = ("id2label", "label2id")
"""Entries of a config that anybody may change afterwards."""
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Params:
    """Parameters of both models; tied ones count once."""

    __pydantic_config__ = STORED

    dense: int
    pruned: int


@dataclass(frozen=True)
class Saved(Stored):
    """The optin.json in the folder of a cut model."""

    schema_version = 2
    hint = "Run `optin-export MODEL --out DIR` again."
    __pydantic_config__ = OPEN

    model_class: str
    """A class of transformers."""
    plan_hash: str
    network: str | None
    """`network_hash` of what the plan was made for."""
    weights_sha256: str
    """Hash of the file model.safetensors."""
    config_sha256: str
    """Hash of the entries of config.json without the labels; see `config_hash`."""
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    """Sizes beside the weights, other than the class makes them: by module, then by attribute."""
    params: Params
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the cut."""

    @property
    def sizes(self) -> Sizes:
        """The attributes as a cut gives them."""
        return {(path, name): size for path, inner in self.attributes.items() for name, size in inner.items()}


def fits(module: nn.Module) -> bool:
    """Is this a class of transformers, which a folder can name?"""
    kind = type(module)
    return isinstance(module, transformers.PreTrainedModel) and getattr(transformers, kind.__name__, None) is kind


def save(
    module: nn.Module,
    attributes: Sizes,
    plan: NetworkPlan,
    folder: Path,
    *,
    preprocessor: Any = None,
    files: Mapping[str, bytes] = NOTHING,
    about: Mapping[str, Any] = NOTHING,
) -> Path:
    """Write a cut model to a folder, whole or not at all.

    All tensors are stored, also buffers that a state_dict leaves out: whoever loads them has to compute none.
    Args:
        module: of a class of transformers; see `fits`. attributes: what the cut set in it. plan: it was cut by.
        preprocessor: tokenizer or processor, saved beside the weights.
        files: what is written unchanged, by path in the folder: in place of what transformers would write.
        about: what else the manifest says.
    Returns: the folder.
    Raises: BadInput: somebody else's files are there, the disk is full, or no class of transformers is given.
    """
    if not fits(module):
        raise BadInput(f"{type(module).__name__} is no class of transformers {transformers.__version__}.")
    config: Any = copy.copy(module.config)
    config.architectures = [type(module).__name__]
    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        if preprocessor is not None:
            preprocessor.save_pretrained(temporary)
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        write_tensors(temporary / WEIGHTS, tensors(module), _metadata(plan, about))
        plan.write(temporary / PLAN)
        saved = Saved(
            model_class=type(module).__name__,
            plan_hash=plan.hash,
            network=plan.network,
            weights_sha256=sha256_file(temporary / WEIGHTS),
            config_sha256=config_hash(temporary / CONFIG, ""),
            attributes=_by_module(attributes),
            params=Params(_dense_params(module), count(module)),
            about=dict(about),
        )
        saved.write(temporary / MANIFEST)
    return folder


def read_saved(folder: Path) -> tuple[Saved, NetworkPlan]:
    """Read what the folder of a cut model says of itself, without its weights.

    Raises: BadInput, PlanMismatch: files are missing, damaged, of the first edition, or do not belong together.
    """
    path, hint = folder / MANIFEST, remedy(folder)
    if not path.is_file():
        if (folder / CONFIG).is_file() and folder.name != MODEL and not (folder / JOB).is_file():
            out = f"{folder.resolve().name}-{DEFAULT_FLOPS}"
            export = shlex.join(["optin-export", str(folder), "--flops", str(DEFAULT_FLOPS), "--out", out])
            hint = f"It holds a dense one. Make it smaller with `{export}`, then load {out}."
        raise BadInput(f"{path} does not exist: {folder} is not a pruned model. {hint}")
    if (folder / FIRST_LAYOUT).is_file() or read_json(path, hint, ours=True).get("schema_version") == FIRST_EDITION:
        raise BadInput(f"{folder} was written by the first edition of optin-deploy, which this one cannot read. {hint}")
    saved, plan = Saved.read(path, hint), NetworkPlan.read(folder / PLAN, hint)
    if saved.plan_hash != plan.hash:
        raise PlanMismatch(f"{folder / PLAN} is not the plan that made these weights. {hint}")
    return saved, plan


def intact(folder: Path, plan: str) -> bool:
    """Does the folder hold what was saved there, cut by the plan of this hash?"""
    try:
        saved, _ = read_saved(folder)
        same = saved.plan_hash == plan and sha256_file(folder / WEIGHTS) == saved.weights_sha256
        return same and not changed_beside(folder, saved)
    except (BadInput, PlanMismatch, OSError):
        return False


def check_weights(folder: Path) -> Path:
    """Return the file with the weights, which must be the one that was saved.

    Raises: BadInput, PlanMismatch.
    """
    path, (saved, _) = folder / WEIGHTS, read_saved(folder)
    if not path.is_file() or sha256_file(path) != saved.weights_sha256:
        raise PlanMismatch(f"{path} is not the file that was saved here. {remedy(folder)}")
    return path


def changed_beside(folder: Path, saved: Saved) -> list[str]:
    """Names of files beside the weights that are not as they were saved; labels in the config do not count.

    Raises: BadInput: the config is damaged.
    """
    record = Record(folder)
    changed = [name for name in record.names() if name not in (WEIGHTS, CONFIG) and not record.owns(folder / name)]
    same = saved.config_sha256 == config_hash(folder / CONFIG, remedy(folder))
    return changed if same else [CONFIG, *changed]


def remedy(folder: Path) -> str:
    """The command that makes the folder of a model again, with the model that its job names."""
    out, model = folder.parent if folder.name == MODEL else folder, "MODEL"
    try:
        named = read_json(out / JOB, "").get("model") if out is not folder else None
    except (BadInput, OSError):
        named = None
    if isinstance(named, str) and named.isprintable():
        model = shlex.quote(named)
    return f"Run `optin-export {model} --out {out}` again."


def config_hash(path: Path, hint: str) -> str:
    """Hash what a config says of a model; what its classes are called may change.

    Raises: BadInput: it is damaged or absent; ends with the hint.
    """
    entries = read_json(path, hint)
    return sha256_json({name: value for name, value in entries.items() if name not in LABELS})


def home_in(folder: Path) -> Path | None:
    """The folder of a saved model: `model` of an output folder, or the folder itself; None: no model is saved there."""
    return next((home for home in (folder / MODEL, folder) if (home / MANIFEST).is_file()), None)


def folder_of(given: str | os.PathLike[str]) -> Path:
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


def count(module: nn.Module) -> int:
    """Count parameters; tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _dense_params(module: nn.Module) -> int:
    """Those of the same class before a cut, which the config still describes."""
    with torch.device("meta"):
        dense = type(module)(copy.deepcopy(module.config))
    drop_pooler(dense, tensors(module))
    return count(dense)


def drop_pooler(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Take the pooler away where it has weights, of which none is stored: its model was loaded without one."""
    pooler = getattr(module, "pooler", None)
    if isinstance(pooler, nn.Module) and tensors(pooler) and not any(name.startswith("pooler.") for name in stored):
        module.pooler = None  # type: ignore[assignment]  # transformers' own way to have none


def _metadata(plan: NetworkPlan, about: Mapping[str, Any]) -> dict[str, str]:
    """What the file of the weights says of itself; Hugging Face loaders ask for the format."""
    made_from = {"plan": plan.hash, "network": plan.network, BASE_MODEL: about.get(BASE_MODEL)}
    made_by = {name: value for name, value in made_from.items() if isinstance(value, str)}
    return {"format": "pt", "optin_deploy": __version__, **made_by}


def _by_module(attributes: Sizes) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (path, name), size in attributes.items():
        found.setdefault(path, {})[name] = size if isinstance(size, int) else list(size)
    return found
