"""`optin_deploy.prune` of modules that no row of the table serves: smaller, proven, nearer to dense than by norms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_networks import VOCABULARY, Image, Text, made
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optin_deploy
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.jobs.modules import PrunedModule
from optin_deploy.network.run import Program
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.widths import best

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def texts(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed))


def distance(one: nn.Module, other: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        wanted, found = other(rows), one(rows)
    return float((found - wanted).norm() / wanted.norm())


def test_a_network_of_convolutions_is_cut_by_a_dataloader() -> None:
    module = made(Image)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = DataLoader(TensorDataset(pictures(), torch.zeros(48)), batch_size=8)
    pruned = optin_deploy.prune(module, loader, flops=0.6, align=2, allocation="uniform")
    assert isinstance(pruned, PrunedModule)
    assert isinstance(pruned.model, Image)
    assert pruned.plan.cost is not None
    assert pruned.plan.cost.macs_pruned <= 0.6 * pruned.plan.cost.macs_dense
    assert sum(p.numel() for p in pruned.model.parameters()) < sum(p.numel() for p in module.parameters())
    assert distance(pruned.model, module, pictures(seed=1)) < 0.1
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)  # the given one is untouched


def test_the_graph_beside_a_module_computes_the_same() -> None:
    pruned = optin_deploy.prune(made(Text), [texts()], flops=0.6, align=4, allocation="uniform")
    rows = texts(9, seed=2)
    with torch.no_grad():
        found = Program(pruned.network)({pruned.network.inputs[0].name: rows}).outputs
        torch.testing.assert_close(pruned.model(rows), next(iter(found.values())), rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_loaded_as_the_graph(tmp_path: Path) -> None:
    pruned = optin_deploy.prune(made(Text), [texts()], flops=0.6, align=4, allocation="uniform")
    assert isinstance(pruned, PrunedModule)
    folder = pruned.save(tmp_path / "smaller")
    rows = texts(9, seed=2)
    with torch.no_grad():
        (found,) = optin_deploy.load(folder)(rows).values()
        torch.testing.assert_close(found, pruned.model(rows), rtol=1e-4, atol=1e-5)
    plan = json.loads((folder / "plan.json").read_text())
    name = next(iter(plan["keep"]))
    plan["keep"][name] = plan["keep"][name][1:]
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanMismatch, match="was cut by plan"):
        optin_deploy.load(folder)


def test_scores_and_compensation_are_nearer_to_dense_than_norms() -> None:
    module, unseen = made(Image), pictures(64, seed=1)
    pruned = optin_deploy.prune(module, [pictures(128)], flops=0.6, align=2, allocation="uniform")
    norms = magnitudes(optin_deploy.inspect(module, {"pixels": pictures(2)}))
    keep = {name: best(norms[name], len(units)) for name, units in pruned.plan.keep.items()}
    by_norms = optin_deploy.cut(module, keep, {"pixels": pictures(2)})
    assert distance(pruned.model, module, unseen) < 0.5 * distance(by_norms, module, unseen)


def test_a_generator_is_read_once() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(6):
            yield {"ids": texts(8, seed)}

    pruned = optin_deploy.prune(made(Text), batches(), flops=0.7, align=4, allocation="paper", compensation=False)
    assert isinstance(pruned.model, Text)


def test_what_does_not_fit_the_forward_is_refused() -> None:
    with pytest.raises(BadInput, match="ids"):
        optin_deploy.prune(made(Text), [{"words": texts()}], flops=0.6)
    with pytest.raises(BadInput, match="--flops"):
        optin_deploy.prune(made(Image), [pictures()], flops=0.01)
