"""What is printed where there is no terminal."""

from __future__ import annotations

import pytest

from optin_deploy.reporting.terminal import print_table, stage_bar


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
