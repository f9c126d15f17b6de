"""Option values as the types that the library takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from optin_deploy.errors import BadInput
from optin_deploy.reporting.terminal import warn

TABLES = (".jsonl", ".csv")
"""Calibration files that have columns."""
PLAN_OPTIONS = ("profile", "profile_sizes", "workspace", "timing_cache", "compatible", "weights")


def given(ctx: typer.Context, *parameters: str) -> list[str]:
    """Those of a command's parameters that stand on the command line, also with their defaults; as they are typed."""
    found = []
    for each in ctx.command.params:
        source = ctx.get_parameter_source(each.name or "")
        if each.name in parameters and source is not None and source.name == "COMMANDLINE":
            typed = each.secondary_opts if ctx.params.get(each.name) is False and each.secondary_opts else each.opts
            found.append(typed[0])
    return found


def refuse_idle(ctx: typer.Context, *parameters: str, why: str) -> None:
    """Refuse options that would do nothing.

    Args: why: ends the sentence.
    Raises: BadInput: names those that were given.
    """
    idle = given(ctx, *parameters)
    if idle:
        them = "it" if len(idle) == 1 else "them"
        raise BadInput(f"{' and '.join(idle)} would do nothing: {why}. Leave {them} out.")


def check_plan_options(ctx: typer.Context, engine: str) -> None:
    """Refuse TensorRT's options for an engine that has none, their defaults too.

    Raises: BadInput.
    """
    from optin_deploy.exporters import exporter

    if not exporter(engine).has_profiles:
        refuse_idle(ctx, *PLAN_OPTIONS, why=f"they are for plans of trt and trt-rtx, and engine {engine} has none")


def check_columns(ctx: typer.Context, *files: Path | None) -> None:
    """Refuse names of columns where no file has any.

    Raises: BadInput.
    """
    if not any(file is not None and file.suffix.lower() in TABLES and not file.is_dir() for file in files):
        why = f"only {' and '.join(TABLES)} files have columns, and none is given"
        refuse_idle(ctx, "text_column", "label_column", "pair_column", why=why)


def writing(command: Callable[..., None]) -> Callable[..., None]:
    """A command that writes into its `folder`: no other job does meanwhile, and files of others stay what they are."""

    @wraps(command)
    def alone(**options: Any) -> None:
        from optin_deploy.jobs.workspace import Workspace

        if options["dry_run"]:
            command(**options)
            return
        with Workspace(options["folder"]).changing(force=options["force"]):
            command(**options)

    return alone


def warn_of_disagreements(folder: Path) -> None:
    """Say what in an output folder does not belong together."""
    from optin_deploy.jobs.belonging import disagreements

    for problem in disagreements(folder):
        warn(problem)


def engine_options(
    profiles: Sequence[str] | None,
    workspace: str | None,
    timing_cache: Path | None,
    compatible: Sequence[str] | None,
    weights: str,
) -> Any:
    """How TensorRT builds its plan, checked."""
    from optin_deploy.exporters.profiles import Profile, parse_profile
    from optin_deploy.exporters.tensorrt_plan import EngineOptions

    return EngineOptions(
        profiles=tuple(map(parse_profile, profiles)) if profiles else (Profile(),),
        workspace_bytes=size_of(workspace, "--workspace"),
        compatible=tuple(compatible or ()),
        weights=weights,
        timing_cache=None if timing_cache is None else timing_cache.absolute(),
    )


def scoring_settings(
    scorer: str,
    paper: bool,
    weighting: str,
    kl_weight: float | None,
    features: str = "block",
    tokens: int | None = None,
    probes: int | None = None,
) -> Any:
    """How units are scored, checked."""
    from optin_deploy.scoring import PAPER, Features, ScoreSettings

    if paper and (features != "block" or tokens is not None):
        raise BadInput("--paper says itself what is compared: leave out --features and --tokens.")
    chosen = PAPER if paper else Features(features, tokens)  # type: ignore[arg-type]  # it checks the name itself
    return ScoreSettings(scorer, weighting, kl_weight, chosen, probes)  # type: ignore[arg-type]


def limits_of(
    flops: float | None,
    params: float | None,
    size: str | None,
    max_drop: float | None,
    *,
    latency: str | None = None,
    speedup: float | None = None,
    throughput: float | None = None,
) -> Any:
    """What may stay, checked."""
    from optin_deploy.planning.budget import Limits, TimeTarget, parse_latency

    latency_ms = None if latency is None else parse_latency(latency)
    asked = {"--latency": latency_ms, "--speedup": speedup, "--throughput": throughput}
    targets = [TimeTarget(option, value) for option, value in asked.items() if value is not None]
    if len(targets) > 1:
        raise BadInput(f"{' and '.join(map(str, targets))}: give one of them.")
    return Limits(flops, params, size_of(size, "--size"), max_drop, targets[0] if targets else None)


def load_of(
    protocol: str, scenario: str | None, seconds: float | None, qps: float | None, target_latency: float | None
) -> Any:
    """What LoadGen sends, checked; None: our own protocol."""
    from optin_deploy.measuring.loadgen import Load

    asked = {"scenario": scenario, "seconds": seconds, "qps": qps, "target_latency_ms": target_latency}
    given = {name: value for name, value in asked.items() if value is not None}
    if protocol not in ("interleaved", "mlperf"):
        raise BadInput(f"--protocol {protocol!r}: possible are interleaved, mlperf.")
    if protocol == "mlperf":
        return Load(**given)  # type: ignore[arg-type]  # a dict forgets which value is of which type
    if given:
        raise BadInput("--scenario, --seconds, --qps and --target-latency are LoadGen's: add --protocol mlperf.")
    return None


def judged_by(source: Any, evaluation: Path | None) -> Any:
    """The same source, judged by the rows of `--eval`."""
    return source if evaluation is None else replace(source, evaluation=str(evaluation.absolute()))


def size_of(text: str | None, option: str) -> int | None:
    """Bytes of a size such as 4GiB."""
    from optin_deploy.common.validation import parse_size

    return None if text is None else parse_size(text, option)


def warn_if_bundled(calibration: Path | None) -> None:
    """The bundled set is for trying things out."""
    if calibration is None:
        warn("no --calibration given: using the small bundled set. Accuracy needs your own data.")


def echo(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)
