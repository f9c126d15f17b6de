"""The command line: its commands, errors as one line each, and an exit code of errors.EXIT_CODES."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import typer

from optin_deploy.commands import artifacts, gating, job, looking, planning, profiling, scoring, serving
from optin_deploy.errors import EXIT_CODES, BadInput, OptinError
from optin_deploy.processors import limit_libraries
from optin_deploy.terminal import quiet_libraries

app = typer.Typer(
    name="optin",
    help="Make a trained transformer physically smaller and measurably faster, with no retraining.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ". "
    "`optin --version` prints the version.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

INTERRUPTED = 130
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Base of all errors of the command line itself; typer brings its own copy of click or uses the installed one."""

COMMANDS = (
    (job.export, job.EXPORT_EXAMPLES),
    (scoring.score, scoring.SCORE_EXAMPLES),
    (planning.plan, planning.PLAN_EXAMPLES),
    (planning.sweep, planning.SWEEP_EXAMPLES),
    (planning.rewrite, planning.REWRITE_EXAMPLES),
    (artifacts.build, artifacts.BUILD_EXAMPLES),
    (artifacts.bench, artifacts.BENCH_EXAMPLES),
    (profiling.profile, profiling.PROFILE_EXAMPLES),
    (gating.gate, gating.GATE_EXAMPLES),
    (serving.ship, serving.SHIP_EXAMPLES),
    (serving.serve_check, serving.CHECK_EXAMPLES),
    (looking.show, looking.SHOW_EXAMPLES),
    (looking.report, looking.REPORT_EXAMPLES),
    (looking.doctor, looking.DOCTOR_EXAMPLES),
)
"""In the order of `--help`, with what stands under each one's own."""
for command, examples in COMMANDS:
    app.command(epilog=examples)(command)


def main() -> None:
    """Entry point `optin`."""
    sys.exit(_run(app))


def export_main() -> None:
    """Entry point `optin-export`, the same as `optin export`."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    alone.command(name="optin-export", epilog=job.EXPORT_EXAMPLES, no_args_is_help=True)(job.export)
    sys.exit(_run(alone))


def _run(program: Callable[..., object]) -> int:
    """Run a typer app; errors of ours become one line and their exit code."""
    quiet_libraries()
    limit_libraries()
    if sys.argv[1:] == ["--version"]:
        typer.echo(f"optin-deploy {version('optin-deploy')}")
        return 0
    try:
        code = program(_joined(sys.argv[1:]), standalone_mode=False)
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except OptinError as err:
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(err), err=True)
        return err.exit_code
    except USAGE_ERROR as err:
        err.show()
        return int(err.exit_code)
    except OSError as err:
        typer.echo(f"error: {err}. Check the path, its permissions and the free space.", err=True)
        return BadInput.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; finished stages are kept, run the same command again to go on", err=True)
        return INTERRUPTED


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--profile batch=1,8,32 seq=16,128,384` as one value, so that people need not quote it."""
    joined: list[str] = []
    for argument in arguments:
        of_profile = len(joined) > 1 and joined[-2] == "--profile"
        if of_profile and argument.startswith(("batch=", "seq=")):
            joined[-1] += f" {argument}"
        else:
            joined.append(argument)
    return joined
