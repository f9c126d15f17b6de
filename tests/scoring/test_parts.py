"""Scoring in parts: many processes, some of them killed, give the scores of one, and no finished part is done again."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optin_deploy.errors import BadInput
from optin_deploy.files.names import LOCK
from optin_deploy.files.ownership import RECORD
from optin_deploy.jobs.stages import score_stage
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.pruning.pruning import score
from optin_deploy.scoring.parts import FolderStore, MemoryStore, Part, PartsLeft, Worker, run_parts, worker_of
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.terms import ROWS, Terms
from optin_deploy.scoring.unit_scores import UnitScores
from support.part_workers import LEFT, SETTINGS, SOURCE, Log, Workers, prepared, small_parts, watched


@dataclass(frozen=True)
class Few:
    """What has units."""

    name: str
    units: int


FIRST, SECOND = Few("o", 3), Few("down", 4)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny matrices."""


@pytest.fixture(autouse=True)
def _small_parts() -> Iterator[None]:
    with small_parts():
        yield


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.close()


def some_terms(*branches: Few, seed: int = 0) -> Terms:
    generator = torch.Generator().manual_seed(seed)
    sums = {b: torch.rand(ROWS, b.units, generator=generator, dtype=torch.float64) for b in branches}
    return Terms(sums, samples=3, probes=4, output_probes=2, forward_seconds=0.5, seconds=1.5, peak_bytes=1000)


def same(a: Terms | None, b: Terms) -> bool:
    assert a is not None
    return a.sums.keys() == b.sums.keys() and all(torch.equal(a.sums[key], b.sums[key]) for key in b.sums)


def fake_parts(count: int, order: list[str]) -> list[Part]:
    """Parts that note when they are done."""

    def part(index: int) -> Part:
        def work(progress: Any) -> Terms:
            order.append(f"p{index}")
            progress(1, 2)
            return some_terms(FIRST, seed=index)

        return Part(f"p{index}", 10 * (index + 1), work)

    return [part(index) for index in range(count)]


def ignore(done: int, total: int) -> None:
    """No progress."""


# --- which worker a process is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard", "environment", "worker"),
    [
        (None, {}, Worker(0, 1, helps=True)),
        ("1/1", {}, Worker(0, 1, helps=False)),
        ("1/4", {}, Worker(0, 4, helps=False)),
        ("4/4", {}, Worker(3, 4, helps=False)),
        (None, {"RANK": "2", "WORLD_SIZE": "4"}, Worker(2, 4, helps=True)),
        (None, {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "3"}, Worker(0, 4, helps=True)),
        ("2/3", {"RANK": "0", "WORLD_SIZE": "4"}, Worker(1, 3, helps=False)),
    ],
)
def test_a_shard_or_torchrun_says_which_worker_this_is(
    shard: str | None, environment: dict[str, str], worker: Worker
) -> None:
    assert worker_of(shard, environment) == worker


@pytest.mark.parametrize("shard", ["0/4", "5/4", "x", "", "1", "1/", "/4", "1/0", "-1/4", "1/-4", "1/4/2", "1.5/4"])
def test_an_impossible_shard_is_refused_with_the_possible_ones(shard: str) -> None:
    with pytest.raises(BadInput, match="1/4") as caught:
        worker_of(shard, {})
    assert f"--shard {shard}" in str(caught.value).replace("'", "")


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "4"},
        {"RANK": "1", "WORLD_SIZE": "many"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "1"},  # of another launcher
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_an_impossible_rank_is_refused_by_the_name_of_its_variable(environment: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="WORLD_SIZE"):
        worker_of(None, environment)


# --- who does what ----------------------------------------------------------------------------------------------


def test_a_worker_does_its_own_parts_first_and_then_takes_over_the_others() -> None:
    order: list[str] = []
    found = run_parts(fake_parts(7, order), MemoryStore(), Worker(1, 3), ignore)
    assert order == ["p1", "p4", "p0", "p2", "p3", "p5", "p6"]
    assert all(same(terms, some_terms(FIRST, seed=index)) for index, terms in enumerate(found))


def test_a_shard_does_only_its_own_parts_and_says_how_many_are_left() -> None:
    order: list[str] = []
    with pytest.raises(PartsLeft, match=r"worker 2 of 3 has done its parts; 5 of 7 are left to others\.") as caught:
        run_parts(fake_parts(7, order), MemoryStore(), Worker(1, 3, helps=False), ignore)
    assert order == ["p1", "p4"]
    assert caught.value.exit_code == 0


def test_the_last_shard_returns_the_results_of_all_in_order() -> None:
    store, order = MemoryStore(), []
    parts = fake_parts(5, order)
    for index in (2, 0):
        with pytest.raises(PartsLeft):
            run_parts(parts, store, Worker(index, 3, helps=False), ignore)
    found = run_parts(parts, store, Worker(1, 3, helps=False), ignore)
    assert order == ["p2", "p0", "p3", "p1", "p4"]
    assert all(same(terms, some_terms(FIRST, seed=index)) for index, terms in enumerate(found))


def test_in_a_further_round_a_shard_does_what_nobody_works_on_but_waits_for_nobody(tmp_path: Path) -> None:
    store, order = FolderStore(tmp_path, [FIRST]), []
    parts = fake_parts(4, order)
    with store.claimed("p2", wait=False) as mine:
        assert mine
        with pytest.raises(PartsLeft, match="1 of 4 are left"):
            run_parts(parts, store, Worker(1, 2, helps=False), ignore, further=True)
    assert order == ["p1", "p3", "p0"]
    assert len(run_parts(parts, store, Worker(0, 2, helps=False), ignore, further=True)) == 4
    assert order == ["p1", "p3", "p0", "p2"]


def test_a_shard_without_parts_of_its_own_leaves_at_once() -> None:
    order: list[str] = []
    with pytest.raises(PartsLeft, match="worker 3 of 3 has done its parts; 2 of 2 are left"):
        run_parts(fake_parts(2, order), MemoryStore(), Worker(2, 3, helps=False), ignore)
    assert order == []
    assert len(run_parts(fake_parts(2, order), MemoryStore(), Worker(2, 3), ignore)) == 2


@pytest.mark.parametrize("helps", [True, False])
def test_progress_rises_to_the_cost_of_all_parts(helps: bool) -> None:
    seen: list[tuple[int, int]] = []
    store = MemoryStore({"p1": some_terms(FIRST, seed=1)})
    with suppress(PartsLeft):
        run_parts(fake_parts(4, []), store, Worker(0, 2, helps), lambda done, total: seen.append((done, total)))
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {100}
    assert done[-1] == (100 if helps else 40)  # p0 and p2


def test_the_seconds_of_a_part_are_kept_with_it() -> None:
    def work(progress: Any) -> Terms:
        time.sleep(0.02)
        return some_terms(FIRST)

    store = MemoryStore()
    (found,) = run_parts([Part("p", 1, work)], store, Worker(), ignore)
    assert 0.02 <= found.seconds < 1
    assert store.parts["p"] == found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_a_part_the_finished_ones_stay_and_it_can_be_claimed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    store, order = FolderStore(tmp_path, [FIRST]), []
    parts = fake_parts(3, order)

    def fail(progress: Any) -> Terms:
        raise error("inside")

    with pytest.raises(error, match="inside"):
        run_parts([*parts[:2], replace(parts[2], work=fail)], store, Worker(), ignore)
    assert order == ["p0", "p1"]
    run_parts(parts, store, Worker(), ignore)
    assert order == ["p0", "p1", "p2"]


# --- files of parts ---------------------------------------------------------------------------------------------


def test_a_part_survives_the_disk(tmp_path: Path) -> None:
    store, wanted = FolderStore(tmp_path / "deep" / "folder", [FIRST, SECOND]), some_terms(FIRST, SECOND)
    assert store.get("p") is None
    store.put("p", wanted)
    found = store.get("p")
    assert same(found, wanted)
    assert replace(found, sums={}) == replace(wanted, sums={})
    assert sorted(path.name for path in store.folder.iterdir()) == [RECORD, "p.safetensors"]


def test_a_part_holds_some_of_the_branches(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, [FIRST, SECOND])
    store.put("p", some_terms(SECOND))
    assert same(store.get("p"), some_terms(SECOND))


def _rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **about: str | None) -> None:
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **about}
    old = {name: tensor.clone() for name, tensor in load_file(path).items()}
    wanted = {name: value for name, value in metadata.items() if value is not None}
    save_file({**old, **tensors} if tensors else old, path, wanted)


def _with_value(path: Path, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["o"][1, 2] = value
    _rewritten(path, tensors)


def _figures(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            figures = json.loads(file.metadata()["figures"])
        _rewritten(path, figures=json.dumps(change(figures)))

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "only a header": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("scores"),
    "NaN": lambda path: _with_value(path, math.nan),
    "infinity": lambda path: _with_value(path, -math.inf),
    "other units": lambda path: _rewritten(path, {"o": torch.ones(ROWS, 4, dtype=torch.float64)}),
    "other rows": lambda path: _rewritten(path, {"o": torch.ones(2, 3, dtype=torch.float64)}),
    "transposed": lambda path: _rewritten(path, {"o": torch.ones(3, ROWS, dtype=torch.float64)}),
    "float32": lambda path: _rewritten(path, {"o": torch.ones(ROWS, 3)}),
    "a foreign branch": lambda path: _rewritten(path, {"other": torch.ones(ROWS, 3, dtype=torch.float64)}),
    "no branch": lambda path: save_file({}, path, {"part": "p", "figures": "{}"}),
    "another tool's": lambda path: save_file({"o": torch.ones(ROWS, 3, dtype=torch.float64)}, path),
    "another part's": lambda path: _rewritten(path, part="p2"),
    "of no part": lambda path: _rewritten(path, part=None),
    "no figures": lambda path: _rewritten(path, figures=None),
    "broken figures": lambda path: _rewritten(path, figures='{"samples": 3'),
    "figures null": _figures(lambda figures: None),
    "figures a list": _figures(list),
    "a figure missing": _figures(lambda figures: {name: x for name, x in figures.items() if name != "samples"}),
    "a figure more": _figures(lambda figures: {**figures, "colour": 1}),
    "a figure as text": _figures(lambda figures: {**figures, "samples": "3"}),
    "a figure negative": _figures(lambda figures: {**figures, "probes": -1}),
    "a figure NaN": _figures(lambda figures: {**figures, "seconds": math.nan}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_file_is_no_finished_part(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    store = FolderStore(tmp_path, [FIRST, SECOND])
    store.put("p", some_terms(FIRST))
    damage(tmp_path / "p.safetensors")
    assert store.get("p") is None


def test_the_damages_spoil_a_file_by_what_they_change_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, [FIRST, SECOND])
    store.put("p", some_terms(FIRST))
    _rewritten(tmp_path / "p.safetensors")
    _figures(lambda figures: figures)(tmp_path / "p.safetensors")
    assert same(store.get("p"), some_terms(FIRST))
    _with_value(tmp_path / "p.safetensors", 7.0)
    assert float(store.get("p").sums[FIRST][1, 2]) == 7.0


# --- locks ------------------------------------------------------------------------------------------------------


def test_only_one_claims_a_part_at_a_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "new" / "folder", [])
    with store.claimed("p", wait=False) as first, store.claimed("p", wait=False) as again:
        assert (first, again) == (True, False)
        with store.claimed("other", wait=False) as other:
            assert other
    with store.claimed("p", wait=False) as later:
        assert later


@pytest.mark.slow
def test_the_lock_of_a_killed_process_falls(tmp_path: Path, workers: Workers, log: Log) -> None:
    store = FolderStore(tmp_path / "parts", [])
    holder = workers.start("hold", folder=str(store.folder), name="p", log=str(log.path))
    _wait_until(lambda: log.lines() == [("claimed", "p")])
    with store.claimed("p", wait=False) as mine:
        assert not mine
    assert workers.wait(workers.start("try_to_claim", folder=str(store.folder), name="p")) == 1
    os.kill(holder, signal.SIGKILL)
    assert workers.wait(holder) == -signal.SIGKILL
    assert workers.wait(workers.start("try_to_claim", folder=str(store.folder), name="p")) == 0
    with store.claimed("p", wait=True) as mine:
        assert mine


def test_who_waits_for_a_part_gets_it_when_its_worker_is_killed(tmp_path: Path, workers: Workers, log: Log) -> None:
    store, order = FolderStore(tmp_path / "parts", [FIRST]), []
    holder = workers.start("hold", folder=str(store.folder), name="p1", log=str(log.path))
    _wait_until(lambda: log.lines() == [("claimed", "p1")])
    parts = fake_parts(3, order)

    def kill(progress: Any) -> Terms:
        os.kill(holder, signal.SIGKILL)
        return some_terms(FIRST)

    found = run_parts([parts[0], parts[1], replace(parts[2], work=kill)], store, Worker(), ignore)
    assert order == ["p0", "p1"]
    assert len(found) == 3
    assert workers.wait(holder) == -signal.SIGKILL


def test_locks_need_a_file_that_can_be_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system takes a lock for a lock of bytes: shared on a file open for reading, alone for writing."""
    flock, asked = fcntl.flock, []

    def of_nfs(file: Any, kind: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        asked.append(kind)
        if mode == (os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    store = FolderStore(tmp_path / "parts", [FIRST])
    store.put("p", some_terms(FIRST))
    with store.shared(lambda: True), store.claimed("p", wait=False) as mine:
        assert mine
        with store.shared(lambda: True):
            pass
        assert store.folder.exists()  # another stands here
    assert not store.folder.exists()
    assert len(asked) == 5


def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def _no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.parametrize(("take_away", "warned"), [(_no_locks, True), (_no_module, False)])
def test_without_locks_shards_give_the_same_scores(
    tmp_path: Path,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    take_away: Callable[[pytest.MonkeyPatch], None],
    warned: bool,
) -> None:
    take_away(monkeypatch)
    workspace = claim(tmp_path)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            shard(workspace, "sketch", log, Worker(index, 3, helps=False))
    check(workspace, "sketch")
    assert log.scored_again() == []
    assert ("no locks on this file system" in caplog.text) == warned


# --- clearing away ----------------------------------------------------------------------------------------------


def test_the_last_one_to_leave_clears_the_parts_away(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "parts" / "key", [FIRST])
    written = False
    with store.shared(lambda: written) as first:
        store.put("p", some_terms(FIRST))
        with store.shared(lambda: written) as second:
            written = True
        with store.shared(lambda: written) as third:
            assert store.folder.exists()
    assert (first, second, third) == (False, False, True)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_unfinished_scores_stay_and_locks_alone_go(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "parts" / "key", [FIRST])
    with store.shared(lambda: False), store.claimed("p", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []
    with store.shared(lambda: False), store.claimed("p", wait=False):
        store.put("p", some_terms(FIRST))
    assert store.get("p") is not None


def test_parts_of_other_settings_stay(tmp_path: Path) -> None:
    mine, others = (FolderStore(tmp_path / "parts" / key, [FIRST]) for key in ("mine", "others"))
    others.put("p", some_terms(FIRST))
    with mine.shared(lambda: True):
        mine.put("p", some_terms(FIRST))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["others"]


def test_who_leaves_parts_just_before_the_scores_are_written_clears_away_too(tmp_path: Path) -> None:
    """It saw a part missing, and stood here still while the other one finished it and left."""
    store = FolderStore(tmp_path / "parts" / "key", [FIRST])
    written = False
    with pytest.raises(PartsLeft, match="left"), store.shared(lambda: written):
        store.put("p", some_terms(FIRST))
        with store.shared(lambda: written):
            written = True
        assert store.folder.exists()
        raise PartsLeft("left")
    assert list(tmp_path.iterdir()) == []


def test_who_comes_while_the_folder_is_cleared_away_stands_in_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "parts" / "key", [FIRST])
    flock, times = fcntl.flock, 0

    def late(file: Any, kind: int) -> None:
        nonlocal times
        times += 1
        if times == 1:  # the file was opened, and only then the last one left
            shutil.rmtree(tmp_path / "parts")
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with store.shared(lambda: False):
        assert store.folder.with_name(f"{store.folder.name}.lock").exists()
        with store.shared(lambda: True):
            pass
        assert store.folder.with_name(f"{store.folder.name}.lock").exists()


def test_workers_that_come_and_go_at_the_same_moment_do_not_trip_over_each_other(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "parts" / "key", [FIRST])

    def come_and_go() -> None:
        for _ in range(300):
            with store.shared(lambda: True):
                pass

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go) for _ in range(4)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_no_lock_can_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "parts").symlink_to(tmp_path / "nowhere" / "deeper")
    with (
        pytest.raises(BadInput, match="parts"),
        FolderStore(tmp_path / "parts", []).claimed("p", wait=False),
    ):
        pass


# --- whole scorings ---------------------------------------------------------------------------------------------


@cache
def single(scorer: str) -> UnitScores:
    """What one process finds, with no files."""
    with small_parts():
        return score(prepared().ready, SETTINGS[scorer])


def claim(folder: Path) -> Workspace:
    return Workspace.claim(folder / "out", SOURCE)


def shard(workspace: Workspace, scorer: str, log: Log, worker: Worker | None = None) -> bool | None:
    """Found finished scores (True), wrote them (False), or left parts to others (None)."""
    with watched(log), suppress(PartsLeft):
        return score_stage(workspace, prepared(), SETTINGS[scorer], worker=worker)
    return None


def check(workspace: Workspace, scorer: str, *, killed: int = 0) -> None:
    """The scores are written, and are those of one process to the last bit; nothing else is left."""
    found, expected = workspace.read_scores(), single(scorer)
    assert list(found.scores) == list(expected.scores)
    for name in found.scores:
        assert torch.equal(found.scores[name], expected.scores[name])
        assert torch.equal(found.errors[name], expected.errors[name])
    for name in ("samples", "probes", "output_probes", "masked_samples", "kl_weight", "rank_stability"):
        assert found.provenance[name] == expected.provenance[name]
    # A killed process cannot remove its hidden temporary file.
    ours = (RECORD, LOCK)
    names = sorted(
        path.name
        for path in workspace.root.iterdir()
        if path.name not in ours and (killed == 0 or not path.name.endswith(".tmp"))
    )
    assert names == ["dense.onnx", "scores.safetensors", "source.json"]


def test_the_scorings_of_these_tests_have_many_parts_and_the_sketch_a_second_round(tmp_path: Path, log: Log) -> None:
    for scorer in SETTINGS:
        assert shard(claim(tmp_path / scorer), scorer, log) is False
    assert len(log.parts()) == len(set(log.parts())) > 30
    for started in ("sketch-0000-probes-0-", "sketch-0000-probes-2-", "masked-0003-0004", "masked-0003-0006"):
        assert any(f"/{started}" in part for part in log.parts())


@pytest.mark.parametrize("scorer", SETTINGS)
@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (2, 0, 1), (4, 1, 3, 0, 2)], ids=str)
def test_shards_one_after_another_give_the_scores_of_one_process(
    tmp_path: Path, log: Log, scorer: str, order: Sequence[int]
) -> None:
    workspace = claim(tmp_path)
    found = [shard(workspace, scorer, log, Worker(index, len(order), helps=False)) for index in order]
    assert found == [None] * (len(order) - 1) + [False]
    check(workspace, scorer)
    assert sorted(log.parts()) == sorted(set(log.parts())) == sorted(log.parts("finished"))


@pytest.mark.parametrize("scorer", SETTINGS)
@pytest.mark.parametrize("index", [0, 2])
def test_a_single_worker_of_many_that_helps_does_all(tmp_path: Path, log: Log, scorer: str, index: int) -> None:
    workspace = claim(tmp_path)
    assert shard(workspace, scorer, log, Worker(index, 3)) is False
    check(workspace, scorer)
    assert len(log.parts()) == len(set(log.parts()))


@pytest.mark.parametrize("scorer", SETTINGS)
@pytest.mark.parametrize(("count", "helps"), [(5, True), (3, False)])
def test_workers_side_by_side_give_the_scores_of_one_and_do_nothing_twice(
    tmp_path: Path, log: Log, workers: Workers, scorer: str, count: int, helps: bool
) -> None:
    pids = [start(workers, tmp_path, scorer, index, count, log, helps=helps) for index in range(count)]
    codes = [workers.wait(pid) for pid in pids]
    assert set(codes) <= ({0} if helps else {0, LEFT})
    assert 0 in codes
    check(Workspace(tmp_path / "out"), scorer)
    assert sorted(log.parts()) == sorted(set(log.parts())) == sorted(log.parts("finished"))


@pytest.mark.parametrize("worker", [None, Worker(1, 3), Worker(2, 3, helps=False)])
def test_a_second_run_finds_the_finished_scores(tmp_path: Path, log: Log, worker: Worker | None) -> None:
    workspace = claim(tmp_path)
    assert shard(workspace, "exact", log) is False
    done = log.lines()
    assert shard(workspace, "exact", log, worker) is True
    assert log.lines() == done
    check(workspace, "exact")


def test_a_second_run_clears_away_what_a_killed_one_no_longer_could(tmp_path: Path, log: Log) -> None:
    workspace = claim(tmp_path)
    shard(workspace, "exact", log)
    store = FolderStore(workspace.parts_folder / workspace.read_scores().provenance["key"][:16], [])
    store.put("exact-0000-units-000000", some_terms(FIRST))
    assert shard(workspace, "exact", log) is True
    check(workspace, "exact")


def test_finished_parts_are_not_scored_again_after_an_error(tmp_path: Path, log: Log) -> None:
    workspace = claim(tmp_path)

    def stop(done: int, total: int) -> None:
        if len(log.parts("finished")) == 7:
            raise KeyboardInterrupt

    with watched(log), pytest.raises(KeyboardInterrupt):
        score_stage(workspace, prepared(), SETTINGS["exact"], progress=stop)
    assert len(log.parts("finished")) == 7
    assert shard(workspace, "exact", log) is False
    check(workspace, "exact")
    assert log.scored_again() == []
    assert len(log.parts("finished")) == 20


@pytest.mark.parametrize("damage", ["half", "zeros", "absent"])
def test_a_damaged_part_alone_is_scored_again(tmp_path: Path, log: Log, damage: str) -> None:
    workspace = claim(tmp_path)
    assert shard(workspace, "exact", log, Worker(0, 2, helps=False)) is None
    damaged = sorted(workspace.parts_folder.rglob("*.safetensors"))[4]
    DAMAGES[damage](damaged)
    assert shard(workspace, "exact", log, Worker(1, 2, helps=False)) is None  # it is not its own
    assert shard(workspace, "exact", log, Worker(0, 2, helps=False)) is False
    check(workspace, "exact")
    assert log.scored_again() == [f"{damaged.parent.name}/{damaged.stem}"]


def test_the_file_of_another_part_under_a_wrong_name_is_not_trusted(tmp_path: Path, log: Log) -> None:
    workspace = claim(tmp_path)
    assert shard(workspace, "exact", log, Worker(0, 2, helps=False)) is None
    (folder,) = (path for path in workspace.parts_folder.iterdir() if path.is_dir())
    missing = folder / "exact-0000-units-000006.safetensors"
    assert not missing.exists()
    shutil.copyfile(folder / "exact-0000-units-000000.safetensors", missing)
    assert shard(workspace, "exact", log, Worker(1, 2, helps=False)) is False
    check(workspace, "exact")


@pytest.mark.parametrize(
    "other",
    [ScoreSettings("exact", weighting="normalised"), ScoreSettings("exact", kl_weight=0.0), ScoreSettings("sketch")],
    ids=["weighting", "kl_weight", "scorer"],
)
def test_parts_of_other_settings_are_not_used(tmp_path: Path, log: Log, other: ScoreSettings) -> None:
    workspace = claim(tmp_path)
    assert shard(workspace, "exact", log, Worker(0, 2, helps=False)) is None
    mine = log.parts()
    with watched(log):
        assert score_stage(workspace, prepared(), other) is False
    assert not {part.split("/")[0] for part in mine} & {part.split("/")[0] for part in log.parts()[len(mine) :]}
    assert {f"{path.parent.name}/{path.stem}" for path in workspace.parts_folder.rglob("*.safetensors")} == set(mine)
    assert shard(workspace, "exact", log, Worker(1, 2, helps=False)) is False
    check(workspace, "exact")
    assert log.scored_again() == []


def test_the_seed_of_the_source_is_that_of_the_scores(tmp_path: Path, log: Log) -> None:
    workspace = claim(tmp_path)
    score_stage(workspace, replace(prepared(), source=replace(SOURCE, seed=5)), SETTINGS["sketch"])
    found, other = workspace.read_scores(), single("sketch")
    assert found.provenance["seed"] == 5
    assert not all(torch.equal(found.scores[name], other.scores[name]) for name in found.scores)


# --- kill -9 ----------------------------------------------------------------------------------------------------

PAUSE_S = 0.02
"""So much longer takes each part, so that a kill finds workers at work."""


def start(workers: Workers, folder: Path, scorer: str, index: int, count: int, log: Log, *, helps: bool) -> int:
    return workers.start(
        "score",
        out=str(folder / "out"),
        scorer=scorer,
        index=index,
        count=count,
        helps=helps,
        log=str(log.path),
        pause_s=PAUSE_S,
    )


def _wait_until(happened: Callable[[], bool], *, at_most_s: float = 20) -> None:
    deadline = time.monotonic() + at_most_s
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.001)


def kill_two_of_four(workers: Workers, folder: Path, scorer: str, log: Log, *, helps: bool, seed: int) -> list[int]:
    """Exit codes of four workers, two of them killed at random moments."""
    rng = random.Random(seed)
    pids = [start(workers, folder, scorer, index, 4, log, helps=helps) for index in range(4)]
    moments = sorted(rng.randint(1, {"exact": 18, "sketch": 8}[scorer]) for _ in range(2))
    for victim, moment in zip(rng.sample(pids, 2), moments, strict=True):
        _wait_until(lambda lines=moment: len(log.lines()) >= lines, at_most_s=1)
        time.sleep(rng.uniform(0, PAUSE_S))
        os.kill(victim, signal.SIGKILL)
    return [workers.wait(pid) for pid in pids]


@pytest.mark.parametrize(
    "helps",
    [pytest.param(True, id="helping"), pytest.param(False, id="strict shards", marks=pytest.mark.slow)],
)
def test_after_kill_9_the_scores_are_those_of_an_undisturbed_run(tmp_path: Path, workers: Workers, helps: bool) -> None:
    killed = begun = 0
    for seed in range(10):
        folder, scorer = tmp_path / str(seed), ("exact", "sketch")[seed % 2]
        folder.mkdir()
        log = Log(folder / "log")
        codes = kill_two_of_four(workers, folder, scorer, log, helps=helps, seed=seed)
        assert set(codes) <= {0, LEFT, -signal.SIGKILL}, (seed, codes)
        if helps:
            assert codes.count(0) >= 2, (seed, codes)
            assert LEFT not in codes
        else:
            again = [index for index, code in enumerate(codes) if code == -signal.SIGKILL]
            for index in again:
                code = workers.wait(start(workers, folder, scorer, index, 4, log, helps=False))
                assert code in (0, LEFT), (seed, code)
        # Who was killed may have been the last one there, with the scores written: the next run clears away.
        assert workers.wait(start(workers, folder, scorer, 0, 1, log, helps=True)) == 0
        check(Workspace(folder / "out"), scorer, killed=codes.count(-signal.SIGKILL))
        assert log.scored_again() == [], seed
        killed += codes.count(-signal.SIGKILL)
        begun += len(log.parts()) - len(set(log.parts()))
    assert killed >= 8  # else nobody was killed at work, and this is no test
    assert begun >= 3


def test_one_worker_killed_again_and_again_gets_there(tmp_path: Path, workers: Workers) -> None:
    log, rng, kills = Log(tmp_path / "log"), random.Random(0), 0
    while True:
        before = len(log.parts("finished"))
        pid = start(workers, tmp_path, "exact", 0, 1, log, helps=True)
        _wait_until(lambda least=before + 4: len(log.parts("finished")) >= least, at_most_s=1)
        time.sleep(rng.uniform(0, PAUSE_S))
        os.kill(pid, signal.SIGKILL)
        if workers.wait(pid) == 0:
            break
        kills += 1
        assert kills < 30
    assert kills >= 3
    check(Workspace(tmp_path / "out"), "exact", killed=kills)
    assert log.scored_again() == []


def test_the_log_shows_what_is_scored_again(log: Log) -> None:
    for line in ("started a", "started b", "finished a", "started b", "finished b", "started a"):
        log.add(*line.split())
    assert log.scored_again() == ["a"]
