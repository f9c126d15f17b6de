"""Segmentation: folders of photographs and maps, classes of places from queries, and mean IoU through a whole job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from benchmarks.tasks import scenes as module
from benchmarks.zoo.families import FAMILIES
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.class_maps import UNKNOWN, ClassMap
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.errors import BadInput
from optin_deploy.feeds.image_feeds import _check_places, _class_map
from optin_deploy.feeds.rows import Feeds
from optin_deploy.network.graph import Network
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.planning.unit_curves import unit_curves
from optin_deploy.pruning.dense import dense_of
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.source import Source
from optin_deploy.quality.segmentation import SegmentationJudge, largest, mean_iou
from optin_deploy.scoring.masking_units import masked_terms
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.slopes import Projections, slope_terms
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import OUTPUT
from support.tiny_checkpoint import Shell

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, LABELS = 64, 5


def painted(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def photo(path: Path, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3))
    return painted(path, coarse.repeat(10, 0).repeat(12, 1))  # (80, 96, 3)


# --- folders and maps ---


@pytest.mark.parametrize(
    ("photos", "maps"),
    [
        ("leftImg8bit/{}/bonn/a_leftImg8bit.png", "gtFine/{}/bonn/a_gtFine_labelTrainIds.png"),
        ("leftImg8bit/{}/bonn/a_leftImg8bit.png", "gtFine/{}/bonn/a_gtFine_labelIds.png"),
        ("images/{}/a.png", "annotations/{}/a.png"),
        ("images/{}/a.png", "masks/{}/a.png"),
        ("images/{}/deep/a.png", "labels/{}/deep/a.png"),
    ],
)
def test_the_part_that_is_asked_for_is_read_with_its_maps(photos: str, maps: str, tmp_path: Path) -> None:
    learned, judged = ("train", "val") if "bonn" in photos else ("training", "validation")
    for part in (learned, judged):
        photo(tmp_path / photos.format(part))
        painted(tmp_path / maps.format(part), np.zeros((80, 96)))
    photo(tmp_path / photos.format(judged).replace("a", "b", 1) if "bonn" not in photos else tmp_path / "x.png")
    for judging, part in ((False, learned), (True, judged)):
        (first, *_) = read_samples(tmp_path, judging=judging)
        assert (first.image, first.class_map) == (tmp_path / photos.format(part), tmp_path / maps.format(part))
        assert first.label is None


def test_folders_without_parts_and_photographs_without_maps_are_read(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    photo(tmp_path / "images/b.jpg")
    painted(tmp_path / "masks/b.png", np.zeros((80, 96)))
    for judging in (False, True):
        found = read_samples(tmp_path, judging=judging)
        assert [sample.class_map for sample in found] == [None, tmp_path / "masks/b.png"]
    photo(tmp_path / "images/C.PNG")
    upper = painted(tmp_path / "masks/C.PNG", np.zeros((80, 96)))
    assert {sample.image: sample.class_map for sample in read_samples(tmp_path)}[tmp_path / "images/C.PNG"] == upper


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    painted(tmp_path / "masks/other.png", np.zeros((4, 4)))
    with pytest.raises(BadInput, match="has no map for any photograph"):
        read_samples(tmp_path)
    outside = photo(tmp_path / "elsewhere.png")
    inside = tmp_path / "x"
    photo(inside / "images/a.png")
    painted(inside / "masks/a.png", np.zeros((4, 4)))
    (inside / "images/b.png").symlink_to(outside)
    with pytest.raises(BadInput, match="a link that leaves"):
        read_samples(inside)


def test_parts_that_are_missing_or_named_otherwise(tmp_path: Path) -> None:
    photo(tmp_path / "images/training/a.png")
    painted(tmp_path / "annotations/training/a.png", np.zeros((80, 96)))
    assert read_samples(tmp_path)[0].class_map is not None
    with pytest.raises(BadInput, match="but none that judges: validation or val"):
        read_samples(tmp_path, judging=True)
    photo(tmp_path / "images/validation/b.png")
    with pytest.raises(BadInput, match="annotations has parts, but none that judges"):
        read_samples(tmp_path, judging=True)
    painted(tmp_path / "annotations/val/b.png", np.zeros((80, 96)))
    assert read_samples(tmp_path, judging=True)[0].class_map == tmp_path / "annotations/val/b.png"


@pytest.mark.parametrize("place", ["masks", "masks/a.png", "images/deep"])
def test_no_link_leads_out_of_the_folder_or_round_in_it(place: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    photo(outside / "a.png")
    root = tmp_path / "root"
    photo(root / "images/a.png")
    (root / "masks").mkdir()
    if place == "masks":
        (root / "masks").rmdir()
    (root / place).symlink_to(outside / "a.png" if place.endswith("png") else outside, target_is_directory=True)
    with pytest.raises(BadInput, match="a link that leaves"):
        read_samples(root)
    (root / place).unlink()
    painted(root / "masks/b.png", np.zeros((4, 4)))
    (root / "images/round").symlink_to(root / "images")
    with pytest.raises(BadInput, match="folders deep"):
        read_samples(root)


def test_a_map_is_as_large_as_its_photograph_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    tags = Image.Exif()
    tags[274] = 6
    image.save(tmp_path / "a.jpg", exif=tags)
    for shape, fits in (((30, 20), True), ((20, 30), False)):
        found = ClassMap(painted(tmp_path / "a.png", np.zeros(shape)), photograph=tmp_path / "a.jpg")
        if fits:
            assert tuple(found.read().shape) == shape
        else:
            with pytest.raises(BadInput, match=r"a\.png is 30 x 20 pixels and its photograph .*a\.jpg 20 x 30"):
                found.read()


def test_digests_tell_maps_apart_by_what_they_hold(tmp_path: Path) -> None:
    one = ClassMap(painted(tmp_path / "a.png", np.zeros((4, 4)))).digest
    assert ClassMap(tmp_path / "a.png", reduced=True).digest != one
    assert ClassMap(painted(tmp_path / "a.png", np.ones((4, 4)))).digest != one


@pytest.mark.parametrize("entry", ["do_reduce_labels", "reduce_labels"])
def test_labels_are_reduced_as_either_entry_of_a_processor_says(entry: str, tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    painted(tmp_path / "masks/a.png", np.zeros((80, 96)))
    (sample,) = read_samples(tmp_path)
    for values, reduced in (({}, False), ({entry: True}, True)):
        found = _class_map(sample, SimpleNamespace(**values))
        assert found == ClassMap(tmp_path / "masks/a.png", reduced, tmp_path / "images/a.png")


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("SegformerImageProcessor", {"size": {"height": 32, "width": 48}}, None),
        ("Mask2FormerImageProcessor", {"size": {"height": 32, "width": 48}}, None),
        ("Mask2FormerImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 96}}, "pads"),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, "crops"),
    ],
)
def test_processors_that_show_other_places_are_refused(
    kind: str, settings: dict[str, Any], what: str | None, tmp_path: Path
) -> None:
    photo(tmp_path / "images/a.png")
    painted(tmp_path / "masks/a.png", np.zeros((80, 96)))
    (sample,) = read_samples(tmp_path)
    processor = getattr(hf, kind)(**settings)
    if what is None:
        _check_places(sample, processor, 3)
        return
    with pytest.raises(BadInput, match=f"the image processor {what} images"):
        _check_places(sample, processor, 3)


@pytest.mark.parametrize("values", [2**26, 24 * 36, 5 * 24 * 36])
def test_classes_are_scaled_a_few_at_a_time(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.quality.segmentation.VALUES", values)
    picture = torch.randn(7, 6, 9)
    picture[5] = picture[2]  # of equals the first counts
    scaled = nn.functional.interpolate(picture[None], size=(24, 36), mode="bilinear")[0]
    assert torch.equal(largest(picture, 24, 36), scaled.argmax(0))


def test_maps_tell_classes_and_where_there_is_none(tmp_path: Path) -> None:
    values = np.array([[0, 1, 7], [255, 2, 33]])
    plain = ClassMap(painted(tmp_path / "a.png", values)).read()
    assert plain.tolist() == [[0, 1, 7], [UNKNOWN, 2, 33]]
    reduced = ClassMap(tmp_path / "a.png", reduced=True).read()
    assert reduced.tolist() == [[UNKNOWN, 0, 6], [UNKNOWN, 1, 32]]
    ids = ClassMap(painted(tmp_path / "a_gtFine_labelIds.png", values)).read()
    assert ids.tolist() == [[UNKNOWN, UNKNOWN, 0], [UNKNOWN, UNKNOWN, 18]]  # road, bicycle
    palette = Image.fromarray(values.astype(np.uint8), "L").convert("P")
    palette.putdata(values.flatten().tolist())
    palette.save(tmp_path / "p.png")
    assert ClassMap(tmp_path / "p.png").read().tolist() == plain.tolist()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "w.png")
    assert ClassMap(tmp_path / "w.png").read().tolist() == plain.tolist()
    photo(tmp_path / "c.png")
    with pytest.raises(BadInput, match="its pixels are colours"):
        ClassMap(tmp_path / "c.png").read()
    (tmp_path / "d.png").write_bytes(b"none")
    with pytest.raises(BadInput, match="does not open"):
        ClassMap(tmp_path / "d.png").read()


# --- what is compared, and the figure ---


class Queries(nn.Module):
    """Queries with classes and masks, as Mask2Former ends; two branches of neurons are told to one of them alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.wide, self.narrow = nn.Linear(12, 16), nn.Linear(16, 12)
        self.queries = nn.Parameter(torch.randn(1, 6, 12))
        self.classes = nn.Linear(12, LABELS + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        q = self.queries + 0.1 * (self.queries @ x.transpose(1, 2)).softmax(-1) @ x
        masks = (q @ x.transpose(1, 2)).unflatten(2, (pixels.shape[2] // 4, -1))
        return self.classes(q + self.narrow(nn.functional.gelu(self.wide(q)))), masks


def queries() -> tuple[Subject, dict[str, Tensor]]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = read_module(Queries().eval(), {"pixels": pixels}, axes={"pixels": {0: "batch"}})
    model = network.model.clone()
    for output, name in zip(model.graph.outputs, ("class_queries_logits", "masks_queries_logits"), strict=True):
        output.name = name
    found = find_in(Network(model, "queries"))
    return Subject.make(found.layout, dtype=torch.float64), {"pixels": pixels}


def places(outputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of the classes of each place, (samples, places, classes), by loops."""
    classes, masks = outputs["class_queries_logits"].softmax(-1), outputs["masks_queries_logits"].sigmoid()
    worth = sum(classes[:, q, :-1, None, None] * masks[:, q, None] for q in range(classes.shape[1]))
    assert isinstance(worth, Tensor)
    return (worth / worth.sum(1, keepdim=True)).log().flatten(2).transpose(1, 2)


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    return (dense.exp() * (dense - other)).sum(-1).mean(1)


def test_classes_of_places_are_scored_by_both_outputs() -> None:
    subject, batch = queries()
    assert subject.reading == Reading("class_queries_logits", "probabilities", masks="masks_queries_logits")
    dense = subject.run(batch).outputs
    torch.testing.assert_close(subject.read(dense, None).values, places(dense))
    groups = {group: [0, 5] for group in subject.layout.groups if group.kind == "neurons"}
    assert len(groups) == 2
    found = masked_terms(subject, [batch], groups)
    for group, units in groups.items():
        for unit in units:
            kept = torch.ones(1, group.units)
            kept[0, unit] = 0
            masked = subject.run(batch, masks=subject.masks(group, kept)).outputs
            expected = divergence(places(dense), places(masked)).sum()
            assert float(found.sums[group][OUTPUT, unit]) == pytest.approx(float(expected), rel=1e-6)
            assert float(expected) > 1e-9


def test_slopes_go_through_both_outputs() -> None:
    subject, batch = queries()
    groups = [group for group in subject.layout.groups if group.kind == "neurons"]
    found = slope_terms(subject, [batch], Projections(range(0), range(400), 0), groups=groups)
    dense = subject.run(batch).outputs
    step = 1e-4
    for group in groups:
        for unit in (0, 5):
            kept = torch.ones(1, group.units, dtype=torch.float64)
            kept[0, unit] = 1 - step
            moved = divergence(places(dense), places(subject.run(batch, masks=subject.masks(group, kept)).outputs))
            expected = float(moved.sum()) / step**2
            mean = float(found.sums[group][OUTPUT, unit]) / found.output_probes
            assert mean == pytest.approx(expected, rel=0.35)


def test_curves_compare_both_outputs() -> None:
    subject, _ = queries()
    order = {group.name: torch.arange(group.units) for group in subject.layout.groups}
    scores = {name: -each.double() for name, each in order.items()}
    batches = [{"pixels": torch.randn(16, 3, 16, 16)}]
    curves = unit_curves(subject, scores, batches, kinds=("neurons",), token_weights=None)
    assert len(curves) == 2
    for curve in curves.values():
        assert curve.errors[0] > 0


def test_pictures_are_what_transformers_makes_of_the_outputs() -> None:
    outputs = {
        "class_queries_logits": torch.randn(2, 6, LABELS + 1),
        "masks_queries_logits": torch.randn(2, 6, 24, 24),
    }
    reading = Reading("class_queries_logits", "probabilities", masks="masks_queries_logits")
    pictures = reading.read(outputs).pictures
    assert pictures is not None
    ours = nn.functional.interpolate(pictures, (384, 384), mode="bilinear").argmax(1)
    processor = hf.Mask2FormerImageProcessor()
    theirs = processor.post_process_semantic_segmentation(SimpleNamespace(**outputs), target_sizes=[(384, 384)] * 2)
    same = (ours == torch.stack(theirs)).double().mean()  # theirs scales the masks before it squashes them
    assert float(same) > 0.9
    logits = torch.randn(2, LABELS, 16, 16)
    pictures = Reading("logits", "logits").read({"logits": logits}).pictures
    assert pictures is logits


def test_mean_iou_is_that_of_sets_of_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = torch.randn(3, LABELS, 16, 16)
    sizes = [(40, 50), (16, 16), (64, 30)]
    processor: Any = hf.SegformerImageProcessor()
    found = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes=sizes)
    maps = []
    for number, one in enumerate(found):
        wrong = rng.random(one.shape) < 0.3
        values = np.where(wrong, rng.integers(0, LABELS - 1, one.shape), one.numpy())  # the last class: rarely there
        values[0] = 255
        maps.append(ClassMap(painted(tmp_path / f"{number}.png", values)))
    feeds = Feeds(({"x": torch.zeros(2, 1)}, {"x": torch.zeros(1, 1)}), tuple(maps), "here")
    reading = Reading("logits", "logits")
    read = [reading.read({"logits": part}) for part in (logits[:2], logits[2:])]
    judge = SegmentationJudge(read, feeds)
    quality = judge.compare(read)
    wanted, given = (
        np.concatenate([x.flatten() for x in some])
        for some in ([one.read().numpy() for one in maps], [one.numpy() for one in found])
    )
    known = wanted != UNKNOWN
    wanted, given = wanted[known], given[known]
    each = [
        np.sum((wanted == c) & (given == c)) / np.sum((wanted == c) | (given == c))
        for c in range(LABELS)
        if np.sum((wanted == c) | (given == c))
    ]
    assert quality.metric == "mean_iou"
    assert quality.dense == quality.pruned == pytest.approx(np.mean(each))
    assert quality.beside["pixel_accuracy"] == (pytest.approx(np.mean(wanted == given)),) * 2
    other = judge.compare([reading.read({"logits": part}) for part in (logits[:2].roll(1, 1), logits[2:])])
    assert other.pruned < quality.pruned


def test_a_class_that_is_named_in_vain_counts_as_0_and_one_that_is_nowhere_does_not_count() -> None:
    assert mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert mean_iou(torch.tensor([[3, 0, 1], [0, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 4 + 1 + 0) / 3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        wanted, given = rng.integers(0, rng.integers(1, 6, (2, 1)), (2, 12))
        confusion = torch.from_numpy(np.bincount(wanted * 5 + given, minlength=25).reshape(5, 5))
        named = sorted({*wanted, *given})
        assert mean_iou(confusion) == pytest.approx(jaccard_score(wanted, given, labels=named, average="macro"))


def test_a_good_network_that_names_a_few_other_classes_is_no_guess(tmp_path: Path) -> None:
    values = np.arange(16) // 8 * np.ones((16, 1))
    logits = torch.nn.functional.one_hot(torch.from_numpy(values).long(), 10).movedim(-1, 0)[None].float()
    logits[0, 2:, 0, :8] = 2 * torch.eye(8)
    read = Reading("logits", "logits").read({"logits": logits})
    feeds = Feeds(({"x": torch.zeros(1)},), (ClassMap(painted(tmp_path / "a.png", values)),), "here")
    quality = SegmentationJudge([read], feeds).compare([read])
    assert quality.dense == pytest.approx((120 / 128 + 1) / 10)  # one that names 0 alone has 1 / 2 / 2


def test_a_rare_class_that_is_found_can_be_measured(tmp_path: Path) -> None:
    values = np.zeros((16, 16))
    values[0, :4] = 1
    logits = torch.zeros(1, 2, 16, 16)
    logits[0, 1, 0, :8] = 1  # as many pixels wrong as right: no more of them than if none were found
    read = Reading("logits", "logits").read({"logits": logits})
    feeds = Feeds(({"x": torch.zeros(1)},), (ClassMap(painted(tmp_path / "a.png", values)),), "here")
    assert SegmentationJudge([read], feeds).compare([read]).dense == pytest.approx((4 / 8 + 248 / 252) / 2)


def test_maps_of_one_class_judge_a_network_that_is_always_right(tmp_path: Path) -> None:
    feeds = Feeds(({"x": torch.zeros(1)},), (ClassMap(painted(tmp_path / "a.png", np.zeros((16, 16)))),), "here")
    logits = torch.zeros(1, 2, 16, 16)
    logits[0, 0] = 1
    worse = logits.clone()
    worse[0, 1, :4] = 2
    right, wrong = (Reading("logits", "logits").read({"logits": each}) for each in (logits, worse))
    quality = SegmentationJudge([right], feeds).compare([wrong])
    assert (quality.dense, quality.pruned) == (1.0, (0.75 + 0) / 2)
    with pytest.raises(BadInput, match=r"IoU of 75\.0% on the .* All pixels of the maps have the same class: give"):
        SegmentationJudge([wrong], feeds)


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    logits = torch.randn(1, LABELS, 16, 16)
    reading = Reading("logits", "logits")

    def judged(values: np.ndarray, read: Reading = reading) -> None:
        path = painted(tmp_path / "a.png", values)
        SegmentationJudge([read.read({"logits": logits})], Feeds(({"x": torch.zeros(1)},), (ClassMap(path),), "here"))

    with pytest.raises(BadInput, match="the network knows 0 to 4"):
        judged(np.full((16, 16), LABELS))
    with pytest.raises(BadInput, match="no loss can be measured"):
        judged(np.where(np.arange(16) < 15, logits[0].argmin(0).numpy(), 0))
    with pytest.raises(BadInput, match="tells no classes of places"):
        judged(np.zeros((16, 16)), Reading("logits", "regression"))
    with pytest.raises(BadInput, match="no pixel of its 1 maps has a class"):
        judged(np.full((16, 16), 255))
    some = Feeds(({"x": torch.zeros(2)},), (ClassMap(tmp_path / "a.png"), None), "here")
    with pytest.raises(BadInput, match="1 of the 2 rows that judge have no map"):
        SegmentationJudge([], some, strict=True)


# --- whole jobs ---


def checkpoint(name: str, folder: Path) -> Path:
    """A tiny model of a family with random weights, and its processor."""
    model: Any = FAMILIES[name].model().model
    model.save_pretrained(folder)
    kind = {"segformer": hf.SegformerImageProcessor, "mask2former": hf.Mask2FormerImageProcessor}[name]
    kind(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("by_torchscript")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["segformer", "mask2former"])
def test_a_job_tells_mean_iou_on_maps(name: str, tmp_path: Path, shell: Shell) -> None:
    model = checkpoint(name, tmp_path / "model")
    data = tmp_path / "data"
    for part, count in (("training", 12), ("validation", 4)):
        for number in range(count):
            photo(data / "images" / part / f"{number}.png", seed=number + 100 * count)
    network = dense_of(Source(str(model))).network
    processor: Any = hf.AutoImageProcessor.from_pretrained(model)
    program, rng = Program(network), np.random.default_rng(0)
    for path in sorted((data / "images/validation").glob("*.png")):
        pixels = processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"]
        outputs = SimpleNamespace(**program({"pixel_values": pixels}).outputs)
        (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 96)])
        noise = rng.integers(0, LABELS, found.shape)
        painted(data / "annotations/validation" / path.name, np.where(rng.random(found.shape) < 0.5, noise, found))
    out = tmp_path / "out"
    options = ("--calibration", data, "--eval", data, "--allocation", "uniform", "--flops", 0.8, "--no-dense")
    ran = shell("optin-export", model, "--out", out, *options)
    assert ran.code == 0, ran.err
    quality = json.loads((out / "report.json").read_text())["quality"]
    assert (quality["metric"], quality["samples"]) == ("mean_iou", 4)
    assert 0.2 < quality["dense"] < 0.8
    assert "Mean IoU" in (out / "report.md").read_text()
    plan = json.loads((out / "plan.json").read_text())
    assert plan["cost"]["macs_pruned"] <= 0.8 * plan["cost"]["macs_dense"]


# --- the benchmark's scenes ---


@pytest.fixture
def photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    some = [Sample(image=Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))) for _ in range(9)]
    monkeypatch.setattr(module, "photographs", lambda cache, sheets: some)
    monkeypatch.setattr(module, "PARTS", {"training": 3, "validation": 2})


@pytest.mark.usefixtures("photographs")
def test_scenes_are_drawn_once_and_hold_the_pixels_of_their_shapes(tmp_path: Path) -> None:
    folder = module.scenes_folder(tmp_path)
    assert module.scenes_folder(tmp_path) == folder
    for judging, count in ((False, 3), (True, 2)):
        found = read_samples(folder, judging=judging)
        assert len(found) == count
        maps = [ClassMap(sample.class_map).read() for sample in found if sample.class_map is not None]
        assert all(each.shape == (module.SIDE, module.SIDE) for each in maps)
        seen = torch.cat([each.flatten() for each in maps])
        assert set(seen.tolist()) <= set(range(len(module.NAMES)))
        assert 0.05 < float((seen > 0).double().mean()) < 0.8


@pytest.mark.parametrize("shape", module.SHAPES)
def test_outlines_are_apart_however_they_are_turned(shape: str) -> None:
    plain, turned = (module.outline(shape, 64, turn) for turn in (0.0, 1.0))
    assert turned.mean() == pytest.approx(plain.mean(), abs=0.03)
    assert not plain[0].any()
    others = [module.outline(other, 64, 0.0) for other in module.SHAPES if other != shape]
    assert all((plain != other).mean() > 0.08 for other in others)


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("name", module.MODELS)
def test_a_model_learns_from_scenes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(module.RECIPES[name], scenes=4, epochs=1, batch_size=2)
    monkeypatch.setattr(module, "RECIPES", {name: recipe})
    folder = module.trained(name, tmp_path)
    torch.manual_seed(recipe.seed)
    before = module.MODELS[name]()[0].state_dict()
    after = load_dense(str(folder)).model.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[each], value) for each, value in before.items())
    assert (folder / "preprocessor_config.json").is_file()
    assert module.trained(name, tmp_path) == folder


def test_fewer_samples_judge_where_outputs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, _ = queries()
    scores = {group.name: -torch.arange(group.units).double() for group in subject.layout.groups}
    batches = [{"pixels": torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))} for _ in range(20)]
    monkeypatch.setattr("optin_deploy.planning.unit_curves.ROWS", 16)
    whole = unit_curves(subject, scores, batches, kinds=("neurons",))
    monkeypatch.setattr("optin_deploy.planning.unit_curves.MOST_HELD", 1)
    some = unit_curves(subject, scores, batches, kinds=("neurons",))
    for name, curve in whole.items():
        assert some[name].errors != curve.errors
        assert some[name].errors[0] == pytest.approx(curve.errors[0], rel=0.5)
