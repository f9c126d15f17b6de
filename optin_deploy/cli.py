"""The command line: its commands, errors as one line each, and an exit code of errors.EXIT_CODES."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from tempfile import NamedTemporaryFile
from typing import Any, NoReturn

import typer

from optin_deploy.commands import (
    artifacts,
    finetuning,
    gating,
    networks,
    planning,
    profiling,
    pushing,
    scoring,
    serving,
)
from optin_deploy.commands import export as job
from optin_deploy.commands import show as looking
from optin_deploy.common.processors import limit_libraries
from optin_deploy.common.version import __version__
from optin_deploy.errors import EXIT_CODES, OWN_FAULT, BadInput, OptinError
from optin_deploy.reporting.terminal import Once, quiet_libraries

INTERRUPTED = 130
TRACEBACK = "--traceback"
"""Anywhere on the command line: show where an error came from."""
NO_MEMORY = ("not enough memory", "out of memory", "allocate memory", "bad allocation")
"""How torch and the engines say it."""
LESS_MEMORY = "Use fewer or shorter samples (--samples, --seq-len), smaller --at, or a --memory-budget"
app = typer.Typer(
    name="optin",
    help="Make a trained transformer physically smaller and measurably faster, with no retraining.",
    epilog="Exit codes: "
    + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    + f". {TRACEBACK} shows where an error came from; `optin --version` prints the version.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Base of all errors of the command line itself; typer brings its own copy of click or uses the installed one."""

COMMANDS = (
    (job.export, job.EXPORT_EXAMPLES),
    (scoring.score, scoring.SCORE_EXAMPLES),
    (planning.plan, planning.PLAN_EXAMPLES),
    (planning.sweep, planning.SWEEP_EXAMPLES),
    (planning.rewrite, planning.REWRITE_EXAMPLES),
    (finetuning.finetune, finetuning.FINETUNE_EXAMPLES),
    (artifacts.build, artifacts.BUILD_EXAMPLES),
    (artifacts.bench, artifacts.BENCH_EXAMPLES),
    (profiling.profile, profiling.PROFILE_EXAMPLES),
    (gating.gate, gating.GATE_EXAMPLES),
    (serving.ship, serving.SHIP_EXAMPLES),
    (serving.serve_check, serving.CHECK_EXAMPLES),
    (pushing.push, pushing.PUSH_EXAMPLES),
    (networks.inspect, networks.INSPECT_EXAMPLES),
    (looking.show, looking.SHOW_EXAMPLES),
    (looking.report, looking.REPORT_EXAMPLES),
    (looking.doctor, looking.DOCTOR_EXAMPLES),
)
"""Commands in the order of `--help`, each with the examples below its own help."""
for command, examples in COMMANDS:
    app.command(epilog=examples)(command)


def main() -> None:
    """Entry point `optin`."""
    _leave(app)


def export_main() -> None:
    """Entry point `optin-export`, the same as `optin export`."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    alone.command(name="optin-export", epilog=job.EXPORT_EXAMPLES, no_args_is_help=True)(job.export)
    _leave(alone)


def _leave(program: Callable[..., object]) -> NoReturn:
    """Run a typer app and end the process; Ctrl-C is not heard once the outcome is known, nor while Python ends."""
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        code = _run(program)
    except KeyboardInterrupt:  # while an error was told
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(program: Callable[..., object]) -> int:
    """Run a typer app; every error becomes one line and an exit code, an interrupt stops the work once."""
    arguments = [argument for argument in sys.argv[1:] if argument != TRACEBACK]
    shown = len(arguments) < len(sys.argv) - 1
    handler = logging.StreamHandler()
    handler.addFilter(Once())
    logging.basicConfig(format="%(message)s", handlers=[handler])  # or a library sets another form in the middle
    quiet_libraries()
    limit_libraries()
    if arguments == ["--version"]:
        typer.echo(f"optin-deploy {__version__}")
        return 0
    try:
        _check_given(arguments)
        code = program(_joined(arguments), standalone_mode=False)
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; finished stages are kept, run the same command again to go on", err=True)
        return INTERRUPTED
    except USAGE_ERROR as err:
        err.show()
        return int(err.exit_code)
    except (BrokenPipeError, SystemExit):  # whoever reads our output has seen enough; typer exits then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:  # noqa: BLE001  # the last wall: whatever comes is told in one line
        if shown:
            traceback.print_exc()
        return _report(err)


def _check_given(arguments: Sequence[str]) -> None:
    """Refuse an empty value, as of an unset variable of the shell: as a path it would be the current folder.

    Raises: BadInput.
    """
    for before, argument in zip(("the command", *arguments), arguments, strict=False):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            where = f"{argument} has" if argument.strip() else f"after {before} there is"
            raise BadInput(f"{where} an empty value; perhaps a variable of the shell is not set. Give one.")


def _interrupt_once(number: int, frame: object) -> None:
    """Ctrl-C stops the work; pressed again while things are put in order, it is not heard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _report(err: Exception) -> int:
    """Print an error in one line. Returns: its exit code."""
    if isinstance(err, OptinError):
        text, code = str(err), err.exit_code
    elif isinstance(err, MemoryError) or any(words in str(err) for words in NO_MEMORY):
        text, code = f"not enough memory: {_first_line(err)}. {LESS_MEMORY}", BadInput.exit_code
    elif isinstance(err, OSError):
        text, code = f"{err}. Check the path, its permissions and the free space.", BadInput.exit_code
    else:
        text, code = f"{type(err).__name__}: {_first_line(err)}. {_kept(err)}", OWN_FAULT
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)
    return code


def _kept(err: Exception) -> str:
    """Write the traceback to a file, and say where it is and what to do with it."""
    about = f"optin-deploy {__version__}, Python {platform.python_version()}, {platform.platform()}"
    lines = [about, shlex.join(sys.argv), *traceback.format_exception(err)]
    try:
        with NamedTemporaryFile("w", prefix="optin-error-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write("\n".join(lines))
        where = f"the traceback is in {file.name}"
    except OSError as full:
        where = f"the traceback could not be written ({full}); {TRACEBACK} shows it"
    return f"This is a fault of optin-deploy, not of your input: {where}. Please report it with that file."


def _first_line(err: Exception) -> str:
    return next(iter(str(err).strip().splitlines()), "no message")[:300].rstrip(".")


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
