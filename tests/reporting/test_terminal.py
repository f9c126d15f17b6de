"""What is printed where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from optin_deploy.reporting.terminal import Once, print_table, stage_bar


@pytest.mark.parametrize("forced", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_stays_a_log_where_colours_are_forced(
    forced: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(forced, "1")
    with stage_bar("score") as progress:
        for done in range(9):
            progress(done, 9)
    wide = "x" * 100
    print_table(("name",), [(wide,)])
    said = capsys.readouterr()
    assert said.err == "score ...\n"
    assert wide in said.out


def test_a_warning_that_each_stage_repeats_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler, log = logging.StreamHandler(), logging.getLogger("repeats")
    handler.addFilter(Once())
    log.addHandler(handler)
    for rows in ("a.txt", "b.txt", "a.txt"):
        log.warning("%s: no label is used", rows)
    log.removeHandler(handler)
    assert capsys.readouterr().err == "a.txt: no label is used\nb.txt: no label is used\n"
