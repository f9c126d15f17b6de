"""The stage that tunes the cut network of an output folder without labels: the same files, with nearer weights."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch

from optin_deploy.checkpoint.reloading import differs, load
from optin_deploy.checkpoint.smaller import read_saved, save
from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.torch import tensors
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.files.descriptors import remove_folder
from optin_deploy.files.names import PRUNED
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.stages import ABOUT, MADE_FROM_MODEL, StoredCut, tuned_key, without_module
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.graph import Network
from optin_deploy.network.learned import learned
from optin_deploy.network.module import CUT
from optin_deploy.network.sealed import finished, store
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.network.unused import tidied
from optin_deploy.pruning.stored import mark
from optin_deploy.tuning.label_free import tune
from optin_deploy.tuning.settings import STATE, LabelFree


def tune_stage(
    workspace: Workspace, prepared: Prepared, made: StoredCut, tuning: LabelFree, *, progress: Progress = silent
) -> StoredCut:
    """Tune what `rewrite_stage` left, and write model.onnx and model/ anew; a tuning that was killed is gone on from.

    Raises: BadInput: the network cannot be trained; says why.
    """
    if made.tuned is not None:
        return made
    ready, path, scratch = prepared.ready, workspace.root / PRUNED, workspace.root / STATE
    before = finished(path)
    assert before is not None, "the rewrite has written it"
    key = tuned_key(before.key, tuning)
    scratch.mkdir(exist_ok=True)
    smaller = tidied(made.network, without=POOLED)
    network, record = tune(ready, smaller, tuning, state=scratch / f"{key[:16]}.safetensors", progress=progress)
    about = {**asdict(tuning), **asdict(record), "quality_before": ready.quality_of(smaller).to_json()}
    for name in MADE_FROM_MODEL:  # model.onnx too: killed now, there is none rather than one beside another model/
        workspace.record.remove(name)
    tuned = replace(made, network=network, tuned=about, reused=False)
    tuned = replace(tuned, why_graph=_write_module(workspace, prepared, tuned))
    about = {name: getattr(tuned, name) for name in ("error", "skipped", "why_graph", "compensated", "tuned")}
    store(network, path, key, {**mark(ready.subject.hash, made.plan.hash), ABOUT: json.dumps(about)}, anew=True)
    remove_folder(scratch)
    return tuned


def _write_module(workspace: Workspace, prepared: Prepared, tuned: StoredCut) -> str:
    """Write model/ with the tuned weights, where there is one. Returns: why there is none; empty where there is."""
    loaded, folder = prepared.dense.loaded, workspace.model_folder
    if loaded is None or tuned.why_graph:
        return tuned.why_graph
    module, (saved, plan) = load(folder), read_saved(folder)
    why = f"what was tuned is no weight of {saved.model_class}"
    if _given(module, tuned.network):
        save(
            *(module, saved.sizes, plan, folder),
            preprocessor=loaded.preprocessor,
            files=loaded.files,
            about=saved.about,
        )
        why = differs(folder, tuned.network, prepared.ready.found.probes)
    return without_module(workspace, why)


def _given(module: torch.nn.Module, network: Network) -> bool:
    """Give a module the learned weights of its graph; False: one of them is no tensor of the module."""
    held, names = tensors(module), learned(network)
    values = {CUT.sub("", name): torch_tensor(network.weights[name]) for name in names}
    if len(values) < len(names) or any(name not in held or held[name].shape != values[name].shape for name in values):
        return False
    with torch.no_grad():
        for name, value in values.items():
            held[name].copy_(value)
    return True
