"""Options of an engine are of its own type: given by flags and `--engine-option`, refused where it has no such one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from optin_deploy.errors import BadInput
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.profiles import Profile
from optin_deploy.exporters.tensorrt_plan import PlanOptions
from optin_deploy.exporters.to_onnx import OnnxExporter
from support.tiny_checkpoint import SEQ_LEN, Shell, bert, lines


@dataclass(frozen=True)
class MyOptions(EngineOptions):
    """Options of an engine that another package could add."""

    streams: int = 1
    cache: Path | None = None
    profiles: tuple[Profile, ...] = ()

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise BadInput(f"streams {self.streams}: give 1 or more.")

    def sizes(self) -> tuple[Profile, ...]:
        """See `EngineOptions.sizes`."""
        return self.profiles


class MyExporter(OnnxExporter):
    """An engine with them."""

    engine = "mine"
    options = MyOptions
    seen: list[EngineOptions] = []  # noqa: RUF012  # emptied by the fixture

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """See `Exporter.check`."""
        self.seen.append(options)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """What the engine `mine` was given."""
    monkeypatch.setitem(ENGINES, "mine", f"{__name__}:MyExporter")
    MyExporter.seen.clear()
    return MyExporter.seen


def dry_run(shell: Shell, out: Path, *options: str) -> tuple[int, str]:
    """Exit code and error of `optin export --dry-run`."""
    data = ("--calibration", lines(), "--seq-len", SEQ_LEN, "--allocation", "uniform")
    ran = shell("optin", "export", bert(), *data, "--out", out, "--dry-run", *options)
    return ran.code, " ".join(ran.err.split())


def test_an_engine_gets_options_of_its_own_type(shell: Shell, seen: list[EngineOptions], tmp_path: Path) -> None:
    given = ("--engine-option", "streams=4", "--engine-option", "cache=a=b", "--profile", "batch=1,2,4 seq=4,8,16")
    assert dry_run(shell, tmp_path / "out", "--engine", "mine", *given) == (0, "")
    assert seen == [MyOptions(4, Path("a=b"), (Profile((1, 2, 4), (4, 8, 16)),))]
    assert seen[0].settings()["streams"] == "4"
    code, said = dry_run(shell, tmp_path / "out", "--engine", "mine", *given, "--at", "batch=5")
    assert code == 2
    assert f"batch=5,seq={SEQ_LEN}, lies outside of --profile batch=1,2,4 seq=4,8,16" in said


@pytest.mark.parametrize(
    ("engine", "options", "says"),
    [
        ("mine", ["streams=many"], "--engine-option: streams: Input should be a valid integer"),
        ("mine", ["streams=0"], "streams 0: give 1 or more"),
        ("mine", ["x=1"], "--engine-option 'x=1' is not known. Engine mine has streams, cache to be given by it."),
        ("mine", ["profiles=1"], "--engine-option 'profiles=1' is not known"),  # it has a flag
        ("mine", ["streams"], "--engine-option 'streams' is not NAME=VALUE"),
        ("mine", ["streams="], "--engine-option 'streams=' is not NAME=VALUE"),
        ("mine", ["streams=1", "streams=1"], "--engine-option 'streams=1' is given twice"),
        ("onnx", ["streams=1"], "Engine onnx has no option to be given by it."),
        ("trt", ["weights=stripped"], "Engine trt has no option to be given by it."),
    ],
)
def test_what_an_engine_has_not_is_refused_by_name(
    shell: Shell, seen: list[EngineOptions], tmp_path: Path, engine: str, options: list[str], says: str
) -> None:
    given = [part for option in options for part in ("--engine-option", option)]
    code, said = dry_run(shell, tmp_path / "out", "--engine", engine, *given)
    assert (code, says in said, seen) == (2, True, []), said


@pytest.mark.usefixtures("seen")
def test_flags_of_other_engines_are_refused(shell: Shell, tmp_path: Path) -> None:
    code, said = dry_run(shell, tmp_path / "out", "--engine", "mine", "--weights", "fixed")
    assert code == 2
    assert "--weights would do nothing" in said


def test_options_of_one_engine_are_none_of_another() -> None:
    assert exporter("trt").options.checked(None) == PlanOptions()
    plan = PlanOptions(weights="stripped")
    assert exporter("trt-rtx").options.checked(plan) is plan
    for engine, other in (("onnx", plan), ("torch", plan), ("trt", MyOptions()), ("trt", EngineOptions())):
        with pytest.raises(BadInput, match=f"{type(other).__name__} are the options of another engine"):
            exporter(engine).options.checked(other)
