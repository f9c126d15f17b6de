"""optin-deploy: make a trained transformer physically smaller and measurably faster, with no retraining.

Prune, save and load a model, or choose by hand what stays of a network:

    pruned = optin_deploy.prune(model, batches, flops=0.6)
    pruned.save("smaller")
    model = optin_deploy.load("smaller")

    layout = optin_deploy.inspect("model.onnx")
    smaller = optin_deploy.cut("model.onnx", {"encoder.layer.0.attention: heads": [0, 2, 3]})
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optin_deploy.common.version import __version__ as __version__

if TYPE_CHECKING:
    from optin_deploy.checkpoint.sentence_transformer import load_sentence_transformer
    from optin_deploy.errors import OptinError
    from optin_deploy.planning.plan import NetworkPlan
    from optin_deploy.pruning.modules import PrunedModel, load, prune
    from optin_deploy.pruning.networks import cut, inspect
    from optin_deploy.scoring.unit_scores import UnitScores
    from optin_deploy.structure.groups import Layout

_HOMES = {
    "Layout": "optin_deploy.structure.groups",
    "NetworkPlan": "optin_deploy.planning.plan",
    "OptinError": "optin_deploy.errors",
    "PrunedModel": "optin_deploy.pruning.modules",
    "UnitScores": "optin_deploy.scoring.unit_scores",
    "cut": "optin_deploy.pruning.networks",
    "inspect": "optin_deploy.pruning.networks",
    "load": "optin_deploy.pruning.modules",
    "load_sentence_transformer": "optin_deploy.checkpoint.sentence_transformer",
    "prune": "optin_deploy.pruning.modules",
}
"""Public name -> module; imported when first used, so that `import optin_deploy` and `--help` stay quick."""

__all__ = [
    "Layout",
    "NetworkPlan",
    "OptinError",
    "PrunedModel",
    "UnitScores",
    "cut",
    "inspect",
    "load",
    "load_sentence_transformer",
    "prune",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'optin_deploy' has no attribute {name!r}")
