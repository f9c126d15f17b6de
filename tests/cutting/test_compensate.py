"""Weights repaired on the graph: least squares on activations that are computed by hand, or by hooks on modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optin_deploy.common.regression import RIDGES
from optin_deploy.cutting.compensate import Compensation, compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.scoring.hearing import token_weights
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from support.own_regression import best_ridge, images, inputs_of, texts
from support.tiny_networks import Image, made
from support.tiny_scoring import (
    BERT,
    DINOV2,
    LAYERS,
    SWIGLU,
    VIT,
    Batch,
    Family,
    bert,
    dinov2,
    image_batch,
    one_thread,
    vit,
)

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

Keep = Mapping[str, Sequence[int]]


def subject_of(module: nn.Module, x: Tensor, **more: object) -> Subject:
    name = "pixels" if isinstance(module, Image) else "x"
    return Subject.make(find(read_module(module.eval(), {name: x}, dynamo=False)), **more)  # type: ignore[arg-type]


def named(subject: Subject, part: str) -> str:
    return next(name for name in subject.layout.by_name if part in name)


def weight(done: Compensation | Network, name: str) -> np.ndarray:
    network = done if isinstance(done, Network) else done.network
    return torch_tensor(network.weights[name]).double().numpy()


# --- modules ----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Neurons whose result is scaled by a vector and added to what was there."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=bias)
        self.scale = nn.Parameter(torch.linspace(0.3, 2.0, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.scale * self.down(self.up(x).tanh())).mean(1))


KEPT = [0, 2, 3, 5, 8]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_scaled_branch_solves_the_regression_of_its_docstring(bias: bool) -> None:
    torch.manual_seed(0)
    module = Scaled(bias).double()
    x = torch.randn(15, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    with torch.no_grad():
        hidden = module.up(x).tanh()
        lost = hidden.clone()
        lost[..., KEPT] = 0
        target = module.scale * (lost @ module.down.weight.T)
        w, b = best_ridge(hidden[..., KEPT].numpy(), target.numpy(), RIDGES, bias)
    scale = module.scale.detach().numpy()
    expected = module.down.weight.detach().numpy().copy()
    expected[:, KEPT] += (w / scale).T
    done = compensated(subject, {named(subject, "neurons"): KEPT}, [{"x": x[:7]}, {"x": x[7:]}])
    assert np.allclose(weight(done, "down.weight"), expected, atol=1e-9)
    if bias:
        assert np.allclose(weight(done, "down.bias"), module.down.bias.detach().numpy() + b / scale, atol=1e-9)
    assert np.array_equal(weight(subject.structure.network, "down.weight"), module.down.weight.detach().numpy())
    first = done.repaired[0]
    assert first.side == "output"
    assert first.after < first.before


def test_what_a_later_product_reads_is_brought_back_by_its_weight() -> None:
    torch.manual_seed(0)
    module = Scaled().double()
    x = torch.randn(15, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    done = compensated(subject, {named(subject, "neurons"): KEPT}, [{"x": x}])
    half = Scaled().double()
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        half.down.weight.copy_(torch.from_numpy(weight(done, "down.weight")))
        half.down.bias.copy_(torch.from_numpy(weight(done, "down.bias")))
        half.down.weight[:, [unit for unit in range(9) if unit not in KEPT]] = 0
        dense, found = ((x + m.scale * m.down(m.up(x).tanh())).mean(1).numpy() for m in (module, half))
        w, b = best_ridge(found[:, None], (dense - found)[:, None], RIDGES)
    old = module.head.weight.detach().numpy()
    told = done.repaired[-1]
    assert (len(done.repaired), told.side) == (2, "input")
    if told.ridge is None:  # no better on samples that the solution has not seen
        assert np.array_equal(weight(done, "head.weight"), old)
    else:
        assert np.allclose(weight(done, "head.weight"), old + old @ w.T, atol=1e-9)
        assert np.allclose(weight(done, "head.bias"), module.head.bias.detach().numpy() + old @ b, atol=1e-9)


class Normed(nn.Module):
    """Convolutions without bias, of which a BatchNorm shifts the last before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 5, 3, padding=1, stride=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.norm(self.second(self.first(x).relu()))).relu().mean((2, 3)))


def test_a_convolution_solves_for_patches_in_the_scale_of_its_batch_norm_and_shifts_it() -> None:
    module = made(Normed).double()
    x = torch.randn(10, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    subject = subject_of(module, x)
    kept = [0, 1, 4, 6, 7]
    with torch.no_grad():
        hidden = module.first(x).relu()
        patches = nn.functional.unfold(hidden, 3, padding=1).transpose(1, 2)  # (samples, places, 8 * 9)
        columns = np.array([9 * channel + tap for channel in kept for tap in range(9)])
        other = np.setdiff1d(np.arange(72), columns)
        flat = module.second.weight.flatten(1)
        scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
        target = (patches[..., other] @ flat[:, other].T) * scale
        w, b = best_ridge(patches[..., columns].numpy(), target.numpy(), RIDGES)
        expected = flat.clone()
        expected[:, columns] += torch.from_numpy(w / scale.numpy()).T
        shift = module.norm.bias + torch.from_numpy(b)
    done = compensated(subject, {named(subject, "channels"): kept}, [{"x": x}])
    assert np.allclose(weight(done, "second.weight"), expected.numpy().reshape(5, 8, 3, 3), atol=1e-9)
    assert np.allclose(weight(done, "norm.bias"), shift.numpy(), atol=1e-9)
    assert np.array_equal(weight(done, "norm.weight"), module.norm.weight.detach().numpy())


class Plain(nn.Module):
    """Convolutions one behind the other, a BatchNorm behind the second; nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))


def test_where_nothing_is_added_a_product_follows_its_own_dense_output() -> None:
    module = made(Plain).double()
    x = torch.randn(10, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    subject = subject_of(module, x)
    kept = [0, 1, 4, 6, 7]
    with torch.no_grad():
        hidden = module.first(x).relu().flatten(2).transpose(1, 2)
        flat = module.second.weight.flatten(1)
        scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
        target = (hidden[..., [2, 3, 5]] @ flat[:, [2, 3, 5]].T) * scale
        w, b = best_ridge(hidden[..., kept].numpy(), target.numpy(), RIDGES)
    group = next(group for group in subject.layout.groups if group.units == 8)
    done = compensated(subject, {group.name: kept}, [{"x": x}])
    expected = flat.detach().numpy().copy()
    expected[:, kept] += (w / scale.numpy()).T
    assert np.allclose(weight(done, "second.weight").reshape(6, 8), expected, atol=1e-9)
    assert np.allclose(weight(done, "norm.bias"), module.norm.bias.detach().numpy() + b, atol=1e-9)


# --- the same by other ways -------------------------------------------------------------------------------------------


CASES: dict[str, Callable[[], tuple[nn.Module, Family, list[Batch]]]] = {
    "bert: post-LN": lambda: (bert(), BERT, texts()),
    "vit: pre-LN": lambda: (vit(), VIT, images()),
    "dinov2: LayerScale": lambda: (dinov2(), DINOV2, images()),
    "dinov2: gated FFN": lambda: (dinov2(gated=True), SWIGLU, [image_batch(42, seed=0), image_batch(50, seed=1)]),
}
BETWEEN = {BERT: "intermediate", VIT: "layernorm_after", DINOV2: "norm2", SWIGLU: "norm2"}
"""Of a block: what reads the stream behind its attention."""


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("case", CASES)
def test_every_branch_of_a_transformer_brings_the_stream_back(case: str, kind: str) -> None:
    """Its projection gives what the dense branch gave, and what the stream before it lacks."""
    model, family, batches = CASES[case]()
    subject = Subject.make(find(read(model)))
    groups = [group for group in subject.layout.groups if group.kind in ("heads", "neurons")][: 2 * LAYERS]
    keep = {group.name: (0, 2) if group.kind == "heads" else tuple(range(0, group.units, 2)) for group in groups}
    done = compensated(subject, keep, batches)
    student = copy.deepcopy(model)
    student.load_state_dict(
        {
            name: torch.tensor(weight(done, name)) if name in done.network.weights else old
            for name, old in model.state_dict().items()
        }
    )
    columns: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        layer = number // 2
        for unit in keep[group.name]:
            path, some = family.columns(layer, group.kind, unit)
            columns.setdefault(path, []).extend(some)
    for path, some in columns.items():
        linear = student.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        linear.weight.data[:, np.setdiff1d(np.arange(linear.in_features), some)] = 0
    for layer in range(LAYERS):
        path, block = family.columns(layer, kind, 0)[0], f"{family.blocks}.{layer}"
        before = block if kind == "heads" else f"{block}.{BETWEEN[family]}"
        a, a_student = (inputs_of(each, path, batches) for each in (model, student))
        x, x_student = (inputs_of(each, before, batches) for each in (model, student))
        dense = model.get_submodule(path)
        old, bias = dense.weight.detach().numpy(), dense.bias.detach().numpy()
        scale = np.ones(len(old))
        if family in (DINOV2, SWIGLU):
            number = 1 if kind == "heads" else 2
            scale = model.get_parameter(f"{block}.layer_scale{number}.lambda1").detach().numpy()
        some = columns[path]
        lost = [
            scale * (v @ old.T - v_[:, some] @ old[:, some].T) + r - r_
            for v, v_, r, r_ in zip(a, a_student, x, x_student, strict=True)
        ]
        w, b = best_ridge([each[:, some] for each in a_student], lost, RIDGES)
        np.testing.assert_allclose(weight(done, f"{path}.weight")[:, some], old[:, some] + (w / scale).T, atol=1e-7)
        np.testing.assert_allclose(weight(done, f"{path}.bias"), bias + b / scale, atol=1e-7)
        assert float(np.abs(b).max()) > 1e-3, "there was something to solve"


class Windowed(nn.Module):
    """What is added is computed in shifted windows, or in place: the same, as neurons see one place each."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 6, 6)
        y = x
        if self.windows:
            y = torch.roll(x, (-1, -1), (1, 2))
            y = y.view(-1, 2, 2, 3, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)  # (batch * windows, places, ..)
        y = self.down(self.up(y).relu())
        if self.windows:
            y = y.view(-1, 2, 3, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, 6)
            y = torch.roll(y, (1, 1), (1, 2))
        return x + y


def test_windows_that_are_folded_into_the_batch_change_nothing() -> None:
    torch.manual_seed(0)
    modules = [Windowed(windows).double() for windows in (True, False)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(10, 4, 6, 6, dtype=torch.float64)
    found = []
    for module in modules:
        subject = subject_of(module, x)
        done = compensated(subject, {subject.layout.groups[0].name: KEPT}, [{"x": x[:3]}, {"x": x[3:]}])
        found.append((weight(done, "down.weight"), weight(done, "down.bias")))
    (one, shift), (other, same) = found
    assert np.allclose(one, other, atol=1e-9)
    assert np.allclose(shift, same, atol=1e-9)
    assert not np.allclose(one, modules[0].down.weight.detach().numpy(), atol=1e-3)


# --- what must hold ---------------------------------------------------------------------------------------------------


def test_a_plan_that_keeps_all_changes_nothing() -> None:
    module = made(Image).double()
    subject = subject_of(module, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    keep = {group.name: range(group.units) for group in subject.layout.groups}
    done = compensated(subject, keep, [{"pixels": torch.randn(6, 3, 12, 12, dtype=torch.float64)}])
    assert done.network is subject.structure.network
    assert (done.repaired, done.skipped) == ((), ())


def test_a_unit_that_another_equals_is_cut_without_any_loss() -> None:
    torch.manual_seed(0)
    module = Scaled().double()
    with torch.no_grad():
        module.up.weight[4], module.up.bias[4] = module.up.weight[1], module.up.bias[1]
    x = torch.randn(40, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    keep = {named(subject, "neurons"): [unit for unit in range(9) if unit != 4]}
    done = compensated(subject, keep, [{"x": x}])
    layout = find(done.network)
    smaller = cut(layout, keep)
    prove(layout, keep, smaller, probes_of(done.network))
    with torch.no_grad():
        dense, found, without = (
            next(iter(Program(each)({"x": x}).outputs.values()))
            for each in (subject.structure.network, smaller, cut(subject.layout, keep))
        )
    assert (found - dense).abs().max() < 1e-3 * (without - dense).abs().max()


def nearer(subject: Subject, keep: Mapping[str, range], smaller: Network, unseen: Mapping[str, Tensor]) -> bool:
    """Whether repairs take away half of the squared error, or more, that the same cut makes without them."""
    with torch.no_grad():
        dense, found, without = (
            next(iter(Program(each)(unseen).outputs.values()))
            for each in (subject.structure.network, smaller, cut(subject.layout, keep))
        )
    return bool((found - dense).square().mean() < 0.5 * (without - dense).square().mean())


def test_a_plan_cuts_whole_stages_after_repair_and_is_nearer_to_the_dense_network() -> None:
    module = made(Image).double()
    generator = torch.Generator().manual_seed(0)
    x, unseen = (torch.randn(n, 3, 12, 12, dtype=torch.float64, generator=generator) for n in (24, 12))
    subject = subject_of(module, x)
    keep = {group.name: range(0, group.units, 2) for group in subject.layout.groups if group.kind == "channels"}
    done = compensated(subject, keep, [{"pixels": x}])
    layout = find(done.network)
    assert layout.by_name.keys() == subject.layout.by_name.keys()
    smaller = cut(layout, keep)
    prove(layout, keep, smaller, probes_of(done.network))
    assert nearer(subject, keep, smaller, {"pixels": unseen})


def test_padding_does_not_count() -> None:
    batches = texts()
    other = [{**each, "input_ids": torch.where(each["attention_mask"] > 0, each["input_ids"], 7)} for each in batches]
    subject = Subject.make(find(read(bert())))
    keep = {group.name: range(0, group.units, 2) for group in subject.layout.groups if group.kind == "neurons"}
    one, two = (
        compensated(subject, keep, each, token_weights=token_weights(subject, each)) for each in (batches, other)
    )
    assert len(one.repaired) > 5
    for name in one.network.weights:
        assert np.allclose(weight(one, name), weight(two, name), atol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_stay_so(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(15, 4, 6)
    subject = subject_of(Scaled().to(dtype), x.to(dtype), dtype=torch.float32)
    done = compensated(subject, {named(subject, "neurons"): KEPT}, [{"x": x}])
    before, after = subject.structure.network.weights, done.network.weights
    assert {name: each.dtype for name, each in before.items()} == {name: each.dtype for name, each in after.items()}
    moved = torch_tensor(after["down.weight"]).float() - torch_tensor(before["down.weight"]).float()
    assert moved.abs().max() > 1e-3


def test_what_is_left_of_an_emptied_group_is_the_mean() -> None:
    torch.manual_seed(0)
    module = Scaled().double()
    x = torch.randn(15, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    done = compensated(subject, {named(subject, "neurons"): []}, [{"x": x}])
    with torch.no_grad():
        expected = module.down(module.up(x).tanh()).mean((0, 1))
    assert np.allclose(weight(done, "down.bias"), expected.numpy(), atol=1e-9)
    assert np.array_equal(weight(done, "down.weight"), module.down.weight.detach().numpy())


class Twice(nn.Module):
    """Two branches whose biases are one vector in the file, as exporters store equal ones once."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Scaled(), Scaled()
        self.two.down.bias = self.one.down.bias

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.one, self.two):
            x = x + part.scale * part.down(part.up(x).tanh())
        return x


def test_a_vector_that_several_places_read_is_repaired_for_one_of_them_alone() -> None:
    torch.manual_seed(0)
    module = Twice().double()
    x = torch.randn(30, 4, 6, dtype=torch.float64)
    subject = subject_of(module, x)
    first, second = subject.layout.by_name
    done = compensated(subject, {second: KEPT}, [{"x": x}])
    assert np.array_equal(weight(done, "one.down.bias"), module.one.down.bias.detach().numpy())
    assert np.array_equal(weight(done, "one.down.weight"), module.one.down.weight.detach().numpy())
    assert len(done.network.weights) == len(subject.structure.network.weights) + 1
    both = {first: KEPT, second: KEPT}
    done = compensated(subject, both, [{"x": x}])
    layout = find(done.network)
    prove(layout, both, cut(layout, both), probes_of(done.network))


def test_values_that_take_too_much_memory_are_computed_again_and_give_the_same() -> None:
    module = made(Image).double()
    x = torch.randn(10, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    subject = subject_of(module, x)
    keep = {group.name: range(0, group.units, 2) for group in subject.layout.groups}
    one, other = (compensated(subject, keep, [{"pixels": x}], budget_bytes=budget) for budget in (None, 0))
    assert len(one.repaired) > 5
    for name in one.network.weights:
        assert np.allclose(weight(one, name), weight(other, name), atol=1e-9), name


def test_tokens_of_an_embedding_count_the_same() -> None:
    model, _, batches = CASES["dinov2: LayerScale"]()
    assert token_weights(Subject.make(find(read(model)), kind="embedding"), batches) is None


class Decoder(nn.Module):
    """A picture is made smaller, then larger again by two ConvTransposes, whose places overlap or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, stride=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.larger = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x).relu()
        return self.head(self.larger((self.up(self.down(skip).relu()) + skip).relu()).relu())


def test_a_transposed_convolution_takes_in_what_its_other_inputs_tell_of_those_that_go() -> None:
    module = made(Decoder).double()
    generator = torch.Generator().manual_seed(0)
    x, unseen = (torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=generator) for n in (20, 10))
    subject = subject_of(module, x)
    kept = [0, 1, 4, 6, 7, 9, 11]
    group = next(group for group in subject.layout.groups if group.units == 12)
    done = compensated(subject, {group.name: kept}, [{"x": x[:9]}, {"x": x[9:]}])
    with torch.no_grad():
        hidden = module.down(module.first(x).relu()).relu().flatten(2).mT
        w, _ = best_ridge(hidden[..., kept].numpy(), hidden.numpy() - _spread(hidden.numpy(), kept), RIDGES, False)
    expected = module.up.weight.detach().numpy().copy()
    expected[kept] += np.einsum("kd,dotu->kotu", w, module.up.weight.detach().numpy())
    assert np.allclose(weight(done, "up.weight")[kept], expected[kept], atol=1e-9)
    assert not np.allclose(expected[kept], module.up.weight.detach().numpy()[kept], atol=1e-2)
    keep = {each.name: range(0, each.units, 2) for each in subject.layout.groups}
    done = compensated(subject, keep, [{"x": x}])
    assert (len(done.repaired), done.skipped) == (4, ())
    layout = find(done.network)
    smaller = cut(layout, keep)
    prove(layout, keep, smaller, probes_of(done.network))
    assert nearer(subject, keep, smaller, {"x": unseen})


def _spread(values: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """The same with zeros where units go."""
    found = np.zeros_like(values)
    found[..., kept] = values[..., kept]
    return found
