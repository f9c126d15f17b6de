"""The pytest plugin in test runs of its own, whether or not its entry point is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optin_deploy.measuring import artifacts as measuring
from optin_deploy.measuring.comparing import comparison_of
from optin_deploy.measuring.timing import PairTiming
from optin_deploy.pytest_plugin import SETTINGS
from support.made_timings import FAILS, HOLDS, STRADDLES, UNSTABLE, FakeMeasuring, made
from support.project import HEAVY, ROOT
from support.tiny_checkpoint import copy_of, finished_job

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "no:optin-deploy", "-p", "optin_deploy.pytest_plugin")
"""By its module alone: where the entry point is installed too, pytest would refuse the same module under two names."""
INNER = ("-W", "default", "-p", "no:hypothesispytest")
"""Within this process: warnings are not errors, and nothing is imported anew for each run."""
TEST = """
    def test_latency(latency_regression):
        latency_regression({arguments})
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def latency(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test that compares by `arguments`, in a folder with `job`, where these timings are found."""
    folder = copy_of(finished_job(), pytester.path / "job")
    comparison_of(folder, threads=1).pin(pytester.path / "baseline.json")

    def run(arguments: str, *timings: PairTiming, flags: tuple[str, ...] = (), source: str = TEST) -> pytest.RunResult:
        monkeypatch.setattr(measuring, "measure_pair", FakeMeasuring(timings))
        pytester.makepyfile(source.format(arguments=arguments))
        return pytester.runpytest_inprocess(*PLUGIN, *INNER, "--strict-markers", *flags)

    return run


@pytest.mark.parametrize(
    ("timing", "flags", "outcome", "says"),
    [
        (HOLDS, (), {"passed": 1}, ""),
        (HOLDS, ("--latency-strict",), {"passed": 1}, ""),
        (FAILS, (), {"failed": 1}, "*1 x 16 fails: candidate / baseline time is 1.200*limit 1.05*"),
        (STRADDLES, (), {"passed": 1, "warnings": 1}, "*LatencyWarning: 1 x 16 is undecided*"),
        (STRADDLES, ("--latency-strict",), {"failed": 1}, "*1 x 16 is undecided*"),
        (UNSTABLE, ("-rs",), {"skipped": 1}, "*SKIPPED*not judged*"),
        (UNSTABLE, ("--latency-strict",), {"failed": 1}, "*1 x 16 is not judged*"),
    ],
)
def test_a_verdict_becomes_a_test_result(
    latency: Run, timing: PairTiming, flags: tuple[str, ...], outcome: dict[str, int], says: str
) -> None:
    ran = latency("'job/dense.onnx'", timing, flags=flags)
    ran.assert_outcomes(**{"warnings": 0, **outcome})
    ran.stdout.fnmatch_lines([says] if says else [])


def test_a_failure_is_a_sentence_without_a_traceback(latency: Run) -> None:
    ran = latency("'job/dense.onnx'", FAILS)
    ran.stdout.no_fnmatch_line("*def test_latency*")
    ran.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_bad_input_fails_with_its_sentence(latency: Run) -> None:
    ran = latency("'job/none.onnx'")
    ran.assert_outcomes(failed=1)
    ran.stdout.fnmatch_lines(["latency_regression: */job/none.onnx does not exist.*"])


@pytest.mark.parametrize(
    ("arguments", "timing", "outcome"),
    [
        ("'job', max_ratio=1.3", made(1.2), "passed"),
        ("'job', max_ratio=1.1", made(1.2), "failed"),
        ("'job', min_speedup=1.5", made(0.6), "passed"),
        ("'job', min_speedup=1.5", made(0.7), "failed"),
        ("candidate='job', baseline='job/dense.onnx', at='batch=2,seq=9', engine='onnx', threads=1", HOLDS, "passed"),
        ("'job', at=['batch=1', 'batch=2'], precision='fp32'", HOLDS, "failed"),  # the second fails, below
        ("'job', max_ratio=1.1, min_speedup=1.5", HOLDS, "failed"),
        ("'job', ratio=1.1", HOLDS, "failed"),
    ],
)
def test_the_call_sets_limit_point_and_engine(latency: Run, arguments: str, timing: PairTiming, outcome: str) -> None:
    ran = latency(arguments, timing, FAILS)
    ran.assert_outcomes(**{outcome: 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("'job', max_ratio='1.5'", "max_ratio='1.5' is a str; give a number such as max_ratio=1.05"),
        ("'job', max_ratio=True", "max_ratio=True is a bool; give a number"),
        ("'job', min_speedup=float('nan')", "min_speedup=nan: give a number"),
        ("'job', threads='2'", "threads='2' is a str; give a whole number such as threads=1"),
        ("'job', threads=1.0", "threads=1.0 is a float; give a whole number"),
        ("'job', at=8", "at=8 is a int; give a text such as at="),
        ("'job', at=[8]", "at=?8? is a list; give a text such as at="),
        ("'job', engine=1", "engine=1 is a int; give a text"),
        ("'job', precision=b'fp32'", "precision=b'fp32' is a bytes; give a text"),
        ("'job', baseline=3", "baseline=3 is a int; give a path"),
        ("None", "candidate=None is a NoneType; give a path"),
        ("['job']", "candidate=?'job'? is a list; give a path"),
    ],
)
def test_a_setting_of_a_wrong_type_is_named_with_an_example(latency: Run, arguments: str, says: str) -> None:
    ran = latency(arguments, HOLDS)
    ran.assert_outcomes(failed=1)
    ran.stdout.fnmatch_lines([f"latency_regression: {says}*"])
    ran.stdout.no_fnmatch_line("*Traceback*")


MARKED = """
    import pytest

    @pytest.mark.latency_regression({arguments})
    def test_marked(latency_regression):
        latency_regression("job")

    @pytest.mark.latency_regression(max_ratio=1.3, at="batch=2")
    def test_overruled(latency_regression):
        found = latency_regression("job", min_speedup=0.5)
        assert [point.batch for point in found.points] == [2]
        assert found.limit.kind == "min_speedup"
"""


@pytest.mark.parametrize(
    ("arguments", "outcome"),
    [
        ("baseline='job/dense.onnx', max_ratio=1.3", {"passed": 2}),
        ("max_ratio=1.1", {"passed": 1, "failed": 1}),
        ("", {"passed": 1, "failed": 1}),  # 1.05 is the default
        ("limit=2", {"passed": 1, "failed": 1}),
        ("'job/dense.onnx'", {"passed": 1, "failed": 1}),
    ],
)
def test_a_marker_gives_defaults_that_the_call_overrules(latency: Run, arguments: str, outcome: dict[str, int]) -> None:
    ran = latency(arguments, made(1.2), made(1.2), made(1.2), source=MARKED)
    ran.assert_outcomes(**outcome)
    if arguments in ("limit=2", "'job/dense.onnx'"):
        ran.stdout.fnmatch_lines([f"latency_regression: unknown: *possible: {SETTINGS[0]}=*"])


def test_paths_are_relative_to_the_tests_own_folder(
    latency: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "measure_pair", FakeMeasuring([HOLDS]))
    below = pytester.mkdir("below")
    (below / "test_below.py").write_text(
        "def test_latency(latency_regression):\n    latency_regression('../job', baseline='../baseline.json')\n"
    )
    pytester.runpytest_inprocess(*PLUGIN, *INNER, below).assert_outcomes(passed=1)


def test_marker_and_option_are_documented(pytester: pytest.Pytester) -> None:
    pytester.runpytest_inprocess(*PLUGIN, *INNER, "--markers").stdout.fnmatch_lines(
        ["@pytest.mark.latency_regression(*"]
    )
    pytester.runpytest_inprocess(*PLUGIN, *INNER, "--help").stdout.fnmatch_lines(["*--latency-strict*"])


def test_the_entry_point_names_the_plugin() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"optin-deploy": "optin_deploy.pytest_plugin"}


def test_loading_the_plugin_loads_nothing_heavy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        import sys

        def test_modules(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("optin_deploy.pytest_plugin")
            assert not {{name.split(".")[0] for name in sys.modules}} & {{*{HEAVY!r}}}
        """
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", *PLUGIN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=pytester.path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_works_by_its_entry_point(pytester: pytest.Pytester, tmp_path: Path) -> None:
    # A distribution that has nothing but the entry point, as reinstalling this project would leave it.
    about = tmp_path / "installed" / "optin_plugin_only-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: optin-plugin-only\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[pytest11]\noptin-deploy = optin_deploy.pytest_plugin\n")
    pytester.makepyfile("def test_it(latency_regression): assert callable(latency_regression)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(about.parent)))}
    for flags in ((), PLUGIN):
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", *flags]
        done = subprocess.run(command, cwd=pytester.path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
