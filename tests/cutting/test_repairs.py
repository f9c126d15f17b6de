"""Repairs of grouped convolutions, BatchNorms, shared matrices and fused nodes, against least squares by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from benchmarks.zoo.repaired import repair
from optin_deploy.common.regression import RIDGES, Moments
from optin_deploy.cutting.compensate import Compensation, compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_onnx import read_proto
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.planning import unit_curves as curves
from optin_deploy.planning.curve import RIDGE, fitted_curve
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from support.one_cut import graph
from support.tiny_networks import made
from support.tiny_scoring import one_thread

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

Keep = Mapping[str, Sequence[int]]
RNG = np.random.default_rng(0)


def subject_of(module: nn.Module, x: Tensor) -> Subject:
    return Subject.make(find(read_module(module.eval(), {"x": x}, dynamo=False)))


def weight(done: Compensation | Network, name: str) -> np.ndarray:
    network = done if isinstance(done, Network) else done.network
    return torch_tensor(network.weights[name]).double().numpy()


def solved(a: np.ndarray, y: np.ndarray, strength: float, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """argmin mean |y - a w - b|^2 + strength * (mean variance of a) * |w|^2, as one least squares."""
    mean_a, mean_y = (each.mean(0) if centred else np.zeros(each.shape[1]) for each in (a, y))
    spread = np.sqrt(strength * ((a - mean_a) ** 2).mean(0).mean() * len(a))
    left = np.concatenate([a - mean_a, spread * np.eye(a.shape[1])])
    w = np.linalg.lstsq(left, np.concatenate([y - mean_y, np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]
    return w, mean_y - mean_a @ w


def fitted(*pairs: tuple[np.ndarray, np.ndarray], centred: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ridge regressions of y on a, each (samples, rows, ..), of one strength, which every fifth sample chooses.

    Zeros where that is no better on them.
    """
    judged = np.arange(len(pairs[0][0])) % 5 == 4

    def flat(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, values.shape[-1])

    def error(a: np.ndarray, y: np.ndarray, strength: float) -> float:
        w, b = solved(flat(a[~judged]), flat(y[~judged]), strength, centred)
        return min(float(((flat(y[judged]) - flat(a[judged]) @ w - b) ** 2).sum()), float((y[judged] ** 2).sum()))

    best = min(RIDGES, key=lambda strength: sum(error(*pair, strength) for pair in pairs))
    found = [solved(flat(a), flat(y), best, centred) for a, y in pairs]
    better = [error(*pair, best) < (pair[1][judged] ** 2).sum() for pair in pairs]
    return [(w * good, b * good) for (w, b), good in zip(found, better, strict=True)]


def test_sums_of_several_groups_are_those_of_each() -> None:
    x, y = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(3, 20, 2, dtype=torch.float64)
    rows = torch.rand(20, dtype=torch.float64)
    together = Moments(4, 2, 3)
    together.add(x, y, rows)
    solution = together.solve(0.1, True)
    for number in range(3):
        alone = Moments(4, 2)
        alone.add(x[number], y[number], rows)
        one = alone.solve(0.1, True)
        assert torch.allclose(solution[0][number], one[0], atol=1e-12)
        assert torch.allclose(together.error(*solution)[number], alone.error(*one), atol=1e-12)


# --- convolutions of groups -------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """Channels mixed, then convolved one by one or in groups, then mixed."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 9, 1), nn.Conv2d(9, 12, 1)
        self.each, self.last = nn.Conv2d(12, 12, 3, padding=1, groups=groups), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.each(self.second(self.first(x).relu()).relu()).relu())


@pytest.mark.parametrize("groups", [12, 3])
def test_each_group_of_a_convolution_is_a_problem_of_its_own(groups: int) -> None:
    torch.manual_seed(0)
    module = Separable(groups).double().eval()
    x = torch.randn(40, 4, 5, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    kept = [0, 4]
    group = next(group for group in subject.layout.groups if group.units == 9)
    done = compensated(subject, {group.name: kept}, [{"x": x[:4]}, {"x": x[4:]}])
    half = Separable(groups).double().eval()
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(half.second, name).copy_(torch.from_numpy(weight(done, f"second.{name}")))
        dense, lost = module.second(module.first(x).relu()).relu(), half.first(x).relu()
        lost[:, [unit for unit in range(9) if unit not in kept]] = 0
        read = half.second(lost).relu()
        gap = (module.each(dense) - module.each(read)).flatten(2).transpose(1, 2)  # (samples, places, channels)
        patches = nn.functional.unfold(read, 3, padding=1).transpose(1, 2)
    size, taps = 12 // groups, 9 * 12 // groups
    pairs = zip(patches.split(taps, -1), gap.split(size, -1), strict=True)
    moved = 0
    for number, (w, b) in enumerate(fitted(*((a.numpy(), y.numpy()) for a, y in pairs))):
        some = slice(number * size, (number + 1) * size)
        expected = module.each.weight[some].detach().flatten(1).numpy() + w.T
        assert np.allclose(weight(done, "each.weight")[some].reshape(size, -1), expected, atol=1e-9)
        assert np.allclose(weight(done, "each.bias")[some], module.each.bias[some].detach().numpy() + b, atol=1e-9)
        moved += bool(w.any())
    assert moved > groups // 4
    assert done.skipped == ()


def test_of_a_convolution_of_groups_what_stays_is_repaired_and_proven() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4, 5, 6, dtype=torch.float64)
    for groups in (12, 3):
        subject = subject_of(Separable(groups).double(), x)
        keep = {group.name: range(0, group.units, 2) for group in subject.layout.groups}
        assert len(keep) > 1
        done = compensated(subject, keep, [{"x": x}])
        before, after = (weight(each, "each.weight") for each in (subject.structure.network, done))
        assert (before != after).any()
        layout = find(done.network)
        prove(layout, keep, cut(layout, keep), probes_of(done.network))


# --- BatchNorm --------------------------------------------------------------------------------------------------------


class Before(nn.Module):
    """A BatchNorm that reads a stream of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 9, 1), nn.Conv2d(9, 6, 1), nn.Conv2d(4, 6, 1)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm((self.second(self.first(x).relu()) * self.third(x)).relu()).relu())


def test_a_batch_norm_behind_no_product_is_fitted_channel_by_channel() -> None:
    module = made(Before).double().eval()
    x = torch.randn(20, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    subject = subject_of(module, x)
    kept = [0, 1, 4, 6, 7]
    group = next(group for group in subject.layout.groups if group.units == 9)
    done = compensated(subject, {group.name: kept}, [{"x": x}])
    with torch.no_grad():
        lost = module.first(x).relu()
        lost[:, [unit for unit in range(9) if unit not in kept]] = 0
        second = nn.Conv2d(9, 6, 1).double()
        second.weight.copy_(torch.from_numpy(weight(done, "second.weight")))
        second.bias.copy_(torch.from_numpy(weight(done, "second.bias")))
        read = (second(lost) * module.third(x)).relu()
        dense = (module.second(module.first(x).relu()) * module.third(x)).relu()
        norm = module.norm
        normal = (read - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
        gap = norm(dense) - norm(read)
        pairs = zip(*(each.flatten(2).movedim(1, 0)[..., None].numpy() for each in (normal, gap)), strict=True)
        scale, shift = norm.weight.numpy(), norm.bias.numpy()
    moved = 0
    for channel, (w, b) in enumerate(fitted(*pairs)):
        assert np.allclose(weight(done, "norm.weight")[channel], scale[channel] + w[0, 0], atol=1e-9)
        assert np.allclose(weight(done, "norm.bias")[channel], shift[channel] + b[0], atol=1e-9)
        moved += bool(w.any())
    assert moved > 2


# --- matrices that several products read ------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer, used three times."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 40), nn.Linear(40, 6, bias=bias), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(x + self.down(self.up(x).tanh()))
        return self.head(x)


def errors(subject: Subject, done: Network, keep: Keep, x: Tensor) -> tuple[float, float]:
    layout = find(done)
    smaller = cut(layout, keep)
    prove(layout, keep, smaller, probes_of(done))
    with torch.no_grad():
        dense, found, without = (
            next(iter(Program(each)({"x": x}).outputs.values()))
            for each in (subject.structure.network, smaller, cut(subject.layout, keep))
        )
    return float((found - dense).square().mean()), float((without - dense).square().mean())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_matrix_that_several_products_read_is_one_problem(bias: bool) -> None:
    torch.manual_seed(0)
    module = Shared(bias).double()
    x, unseen = torch.randn(2, 40, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    keep = {subject.layout.groups[0].name: range(0, 40, 2)}
    done = compensated(subject, keep, [{"x": x[:13]}, {"x": x[13:]}])
    assert done.skipped == ()
    assert len(done.network.weights) == len(subject.structure.network.weights)
    repaired, without = errors(subject, done.network, keep, unseen)
    assert repaired < 0.5 * without


def test_what_three_places_tell_is_one_least_squares_where_they_do_not_change_each_other() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.down(self.up(x * factor).tanh()).tanh() for factor in (0.5, 1.0, 2.0)], -1)

    torch.manual_seed(0)
    module = Side().double()
    x = torch.randn(15, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    kept = [0, 2, 3, 5, 8]
    done = compensated(subject, {subject.layout.groups[0].name: kept}, [{"x": x}])
    with torch.no_grad():
        hidden = torch.cat([module.up(x * factor).tanh() for factor in (0.5, 1.0, 2.0)], 1).numpy()
    old = module.down.weight.detach().numpy()
    ((w, b),) = fitted((hidden[..., kept], hidden[..., [1, 4, 6, 7]] @ old[:, [1, 4, 6, 7]].T))
    assert np.allclose(weight(done, "down.weight")[:, kept], old[:, kept] + w.T, atol=1e-3)
    assert np.allclose(weight(done, "down.bias"), module.down.bias.detach().numpy() + b, atol=1e-3)


def test_a_shared_matrix_has_the_curve_of_one_regression_over_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Shared().double()
    x = torch.randn(40, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    (group,) = subject.layout.groups
    scores = {group.name: torch.arange(40.0)}
    measured: list[tuple[list[int], list[float]]] = []
    monkeypatch.setattr(curves, "fitted_curve", lambda *given: measured.append(given[:2]) or fitted_curve(*given))
    curve = curves.unit_curves(subject, scores, [{"x": x}])[group.name]
    ((counts, errors),) = measured
    count = counts[2]
    fit, judge = x[[n for n in range(40) if n % 4 != 3]], x[3::4]
    kept, lost_ones = sorted(curve.order[:count]), sorted(curve.order[count:])
    with torch.no_grad():
        hidden, stream = [], fit
        for _ in range(3):
            hidden.append(module.up(stream).tanh())
            stream = module.norm(stream + module.down(hidden[-1]))
        flat = torch.cat(hidden).flatten(0, 1)
        lost = flat[:, lost_ones] @ module.down.weight[:, lost_ones].T
        w, b = solved(flat[:, kept].numpy(), lost.numpy(), RIDGE)
        half = copy.deepcopy(module)
        half.down.weight[:, kept] += torch.from_numpy(w.T)
        half.down.weight[:, lost_ones] = 0
        half.down.bias += torch.from_numpy(b)
        dense, found = (subject.read({subject.reading.output: each(judge)}, None) for each in (module, half))
        expected = float(output_distance(dense, found.values).mean())
    assert np.isclose(errors[2], expected, rtol=1e-6)


# --- nodes that do more than multiply ---------------------------------------------------------------------------------


def real(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: Sequence[str], output: str, domain: str = "com.microsoft", **more: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], domain=domain, **more)


FIRST = [helper.make_node("MatMul", ["x", "up"], ["a"]), helper.make_node("Tanh", ["a"], ["h"])]
CONVOLVED = [helper.make_node("Conv", ["x", "up"], ["a"]), helper.make_node("Tanh", ["a"], ["h"])]
LAST = [helper.make_node("MatMul", ["p", "end"], ["out"])]
GEMM = {"up": real(6, 9), "w": real(9, 8), "b": real(8), "end": real(8, 3)}
CONV = {"up": real(9, 6, 1, 1), "w": real(8, 9, 3, 3), "b": real(8), "end": real(3, 8, 1, 1)}
FUSED: dict[str, tuple[list[onnx.NodeProto], Mapping[str, np.ndarray], np.ndarray]] = {
    "FusedGemm": ([*FIRST, node("FusedGemm", ["h", "w", "b"], "p", activation="Relu"), *LAST], GEMM, real(40, 6)),
    "GemmFastGelu": ([*FIRST, node("GemmFastGelu", ["h", "w", "b"], "p"), *LAST], GEMM, real(20, 3, 6)),
    "FusedMatMul": (
        [*FIRST, node("FusedMatMulActivation", ["h", "w"], "p", activation="Relu", alpha=0.5), *LAST],
        {name: value for name, value in GEMM.items() if name != "b"},
        real(20, 3, 6),
    ),
    "BiasGelu": (
        [*FIRST, helper.make_node("MatMul", ["h", "w"], ["m"]), node("BiasGelu", ["m", "b"], "p"), *LAST],
        GEMM,
        real(20, 3, 6),
    ),
    "FusedConv": (
        [
            *CONVOLVED,
            node("FusedConv", ["h", "w", "b"], "p", activation="Relu", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["p", "end"], ["out"]),
        ],
        CONV,
        real(20, 6, 4, 5),
    ),
    "FusedConv, another added": (
        [
            *CONVOLVED,
            helper.make_node("Conv", ["x", "side"], ["z"]),
            node("FusedConv", ["h", "w", "b", "z"], "p", activation="Relu", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["p", "end"], ["out"]),
        ],
        {**CONV, "side": real(8, 6, 1, 1)},
        real(20, 6, 4, 5),
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_product_in_a_fused_node_is_solved_for_before_what_follows(case: str) -> None:
    nodes, weights, x = FUSED[case]
    network = read_proto(graph(nodes, weights, {"x": x}))
    batch = {"x": torch.from_numpy(x)}
    layout = find(network, [batch, {"x": batch["x"][:3]}])
    subject = Subject.make(layout)
    group = next(group for group in layout.groups if group.units == 9)
    kept = [0, 2, 3, 5, 6, 8]
    done = compensated(subject, {group.name: kept}, [batch])
    assert done.skipped == ()
    hidden = Program(network)(batch, watch=["h"]).watched["h"].double()
    matrix = torch.from_numpy(weights["w"]).double() * (0.5 if case == "FusedMatMul" else 1)
    if hidden.dim() == 4:
        hidden = nn.functional.unfold(hidden, 3, padding=1).transpose(1, 2)
        matrix = matrix.flatten(1).T
    hidden = hidden.reshape(len(x), -1, len(matrix))
    columns = np.arange(len(matrix)).reshape(9, -1)[kept].ravel()
    others = np.setdiff1d(np.arange(len(matrix)), columns)
    pair = hidden[..., columns].numpy(), (hidden[..., others] @ matrix[others]).numpy()
    ((w, b),) = fitted(pair, centred="b" in weights)
    found = torch.from_numpy(weight(done, "w"))
    found = found.flatten(1).T if found.dim() == 4 else found * (0.5 if case == "FusedMatMul" else 1)
    assert np.abs(w).max() > 1e-2
    assert np.allclose(found[columns].numpy(), matrix[columns].numpy() + w, atol=1e-4)
    if "b" in weights:
        assert np.allclose(weight(done, "b"), weights["b"] + b, atol=1e-4)


def test_what_is_scaled_otherwise_from_place_to_place_follows_its_own_dense_output() -> None:
    nodes = [*FIRST, helper.make_node("MatMul", ["h", "w"], ["m"]), helper.make_node("Mul", ["m", "s"], ["p"]), *LAST]
    weights = {**{name: GEMM[name] for name in ("up", "w", "end")}, "s": real(3, 1)}
    batch = {"x": torch.from_numpy(real(20, 3, 6))}
    network = read_proto(graph(nodes, weights, {"x": batch["x"].numpy()}))
    layout = find(network, [batch])
    group = next(group for group in layout.groups if group.units == 9)
    done = compensated(Subject.make(layout), {group.name: [0, 2, 3, 5]}, [batch])
    hidden = Program(network)(batch, watch=["h"]).watched["h"].double().numpy()
    others = [1, 4, 6, 7, 8]
    lost = hidden[..., others] @ weights["w"].astype(np.float64)[others]
    ((w, _),) = fitted((hidden[..., [0, 2, 3, 5]], lost), centred=False)
    assert np.allclose(weight(done, "w")[[0, 2, 3, 5]], weights["w"][[0, 2, 3, 5]] + w, atol=1e-4)


# --- sizes told by a weight -------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A convolution without bias, whose zeros an exporter sizes by the weight, and groups that are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm, self.last = nn.GroupNorm(4, 12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x).relu())).relu())


def test_a_shape_of_a_weight_that_is_used_in_part_tells_what_is_used() -> None:
    torch.manual_seed(0)
    network = read_module(Grouped().eval(), {"x": torch.randn(2, 3, 6, 7)})
    layout = find(network)
    assert {group.units for group in layout.groups} == {8, 4}
    keep = {group.name: [0, 2] for group in layout.groups}
    prove(layout, keep, cut(layout, keep), probes_of(network))
    done = compensated(Subject.make(layout), keep, [{"x": torch.randn(12, 3, 6, 7)}])
    assert not done.skipped, "who asks for the shape alone reads no entry"


# --- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "albert", "convnext", "resnet"])
def test_families_are_made_smaller_and_what_is_repaired_is_nearer(name: str) -> None:
    found = repair(name, "torchscript", rows=20, unseen=8)
    assert found.proof < 1e-9
    assert found.skipped == {}
    assert found.repaired < found.cut
