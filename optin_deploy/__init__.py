"""optin-deploy: make a trained transformer physically smaller and measurably faster, with no retraining.

pruned = optin_deploy.prune(model, batches, flops=0.6)
pruned.save("smaller")
model = optin_deploy.load("smaller")

layout = optin_deploy.inspect("model.onnx")
smaller = optin_deploy.cut("model.onnx", {"encoder.layer.0.attention: heads": [0, 2, 3]})
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_deploy.arch.resolve import resolve
    from optin_deploy.arch.spec import ArchSpec
    from optin_deploy.errors import OptinError
    from optin_deploy.jobs.networks import cut, inspect
    from optin_deploy.layout import ModelLayout
    from optin_deploy.plan import Masks, PruningPlan
    from optin_deploy.planning.plan import NetworkPlan
    from optin_deploy.pruned import PrunedModel, load
    from optin_deploy.pruning import prune
    from optin_deploy.scoring.scores import Scores

__version__ = "0.1.0"

_HOMES = {
    "ArchSpec": "optin_deploy.arch.spec",
    "Masks": "optin_deploy.plan",
    "ModelLayout": "optin_deploy.layout",
    "NetworkPlan": "optin_deploy.planning.plan",
    "OptinError": "optin_deploy.errors",
    "PrunedModel": "optin_deploy.pruned",
    "PruningPlan": "optin_deploy.plan",
    "Scores": "optin_deploy.scoring.scores",
    "cut": "optin_deploy.jobs.networks",
    "inspect": "optin_deploy.jobs.networks",
    "load": "optin_deploy.pruned",
    "prune": "optin_deploy.pruning",
    "resolve": "optin_deploy.arch.resolve",
}
"""Public name -> module; imported when first used, so that `import optin_deploy` and `--help` stay quick."""

__all__ = [
    "ArchSpec",
    "Masks",
    "ModelLayout",
    "NetworkPlan",
    "OptinError",
    "PrunedModel",
    "PruningPlan",
    "Scores",
    "cut",
    "inspect",
    "load",
    "prune",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'optin_deploy' has no attribute {name!r}")
