"""Values of which commands share the options: each option once, with its default, its help and its panel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from optin_deploy.commands.amounts import share_of, size_of
from optin_deploy.errors import BadInput
from optin_deploy.jobs.job import Job
from optin_deploy.measuring.points import Point, parse_points
from optin_deploy.planning.budget import Limits, TimeTarget, check_tokens, parse_latency
from optin_deploy.scoring.settings import PAPER, Features, ScoreSettings

of_budget = partial(typer.Option, rich_help_panel="Budget: all that is given must hold")
in_time = partial(typer.Option, rich_help_panel="Budget in time")
of_scoring = partial(typer.Option, rich_help_panel="Scoring")
of_tensorrt = partial(typer.Option, rich_help_panel="TensorRT")
"""Options in the panels of `--help`."""
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a transformers model, or an .onnx file.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of an earlier command.")]
FolderOrFile = Annotated[
    Path, typer.Argument(metavar="DIR|FILE.onnx", help="Output folder of an earlier command, or an ONNX file.")
]
Compensation = Annotated[bool, typer.Option(help="Re-solve the kept projections in closed form.")]
Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        help="Rows that judge the models, as --calibration takes them; nothing learns from them. [default: held-out "
        "calibration rows]",
    ),
]
EngineAlign = Annotated[
    str | None,
    typer.Option(
        metavar="N|KIND=N,...",
        help="Neurons, channels and widths in multiples of this, also by kind: neurons=16,channels=8. [default: the "
        "engine's: CPU 16, GPU 64]",
    ),
]
ProfileSizes = Annotated[
    list[str] | None,
    of_tensorrt(
        "--profile",
        metavar="SIZES",
        help="min, opt and max sizes of the engine: batch=1,8,32 seq=16,128,512 (the default); repeatable.",
    ),
]
OfEngine = Annotated[
    list[str] | None,
    typer.Option("--engine-option", metavar="NAME=VALUE", help="Option that an added engine has; repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, write nothing.")]
Threads = Annotated[int, typer.Option(help="Threads of the engine; 0 = its default.")]


@dataclass(frozen=True)
class Writing:
    """How a command treats what is there already."""

    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write also where optin-deploy did not make what is there; files in the way are kept as NAME.kept1.",
        ),
    ] = False
    dry_run: DryRun = False


@dataclass(frozen=True)
class BudgetOptions:
    """What may stay, or what may be lost."""

    flops: Annotated[
        float | None,
        of_budget(
            parser=share_of,
            metavar="SHARE",
            help="Share of the dense MACs to keep, 0.6 or 60%. [default: 0.6 without another budget]",
        ),
    ] = None
    params: Annotated[
        float | None,
        of_budget(parser=share_of, metavar="SHARE", help="Share of the dense parameters to keep, 0.6 or 60%."),
    ] = None
    size: Annotated[str | None, of_budget(help="Most that all weights may take in float32, e.g. 60MiB.")] = None
    max_drop: Annotated[
        float | None,
        of_budget(
            help="Points of the metric that may be lost: the smallest such model is found by bisection. Instead of a "
            "budget."
        ),
    ] = None

    def limits(self) -> Limits:
        """Return these as `Limits`, checked."""
        return Limits(self.flops, self.params, size_of(self.size, "--size"), self.max_drop, self.time())

    def time(self) -> TimeTarget | None:
        """Return the budget in time; there is none."""
        return None


@dataclass(frozen=True)
class BudgetInTime(BudgetOptions):
    """The same, and a budget in measured time."""

    latency: Annotated[str | None, in_time(help="Longest time of a batch at the first --at, measured: 4.0ms.")] = None
    speedup: Annotated[float | None, in_time(help="How much faster than the dense model at the first --at.")] = None
    throughput: Annotated[float | None, in_time(help="Least samples a second at the first --at.")] = None
    latency_table: Annotated[
        Path | None,
        in_time(
            help="Written by optin profile for this model and engine. [default: measured, kept in the output folder]"
        ),
    ] = None

    def time(self) -> TimeTarget | None:
        """Return the one budget in time that was given, or None.

        Raises: BadInput: there are two.
        """
        latency_ms = None if self.latency is None else parse_latency(self.latency)
        asked = {"--latency": latency_ms, "--speedup": self.speedup, "--throughput": self.throughput}
        targets = [TimeTarget(option, value) for option, value in asked.items() if value is not None]
        if len(targets) > 1:
            raise BadInput(f"{' and '.join(map(str, targets))}: give one of them.")
        return targets[0] if targets else None


@dataclass(frozen=True)
class Making:
    """How a plan is found, and the model made by it."""

    evaluation: Eval = None
    align: EngineAlign = None
    allocation: Annotated[
        str,
        typer.Option(
            help="Where to cut: curves (least error after compensation), uniform (equal widths a layer) or paper "
            "(global ranking)."
        ),
    ] = Job.allocation
    tokens: Annotated[
        float | None,
        typer.Option(
            parser=share_of,
            metavar="SHARE",
            help="Mean share of the tokens that stay, in (0, 1]: those of images that are alike are merged, block by "
            "block, those of texts dropped; widths get what is left of the budget. [default: all stay]",
        ),
    ] = None
    drop_tokens: Annotated[
        bool,
        typer.Option(
            "--drop-tokens", help="Tokens that go are dropped, not merged into those that are like them. Texts need it."
        ),
    ] = False
    compensation: Compensation = Job.compensation

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_tokens(self.tokens)


@dataclass(frozen=True)
class Scoring:
    """How units are scored."""

    scorer: Annotated[str, of_scoring(help="sketch (fast) or exact (one partial forward a unit).")] = (
        ScoreSettings.scorer
    )
    paper: Annotated[
        bool,
        of_scoring(
            "--paper",
            help="With --scorer exact: FFN outputs of 768 tokens drawn across each batch, as in the authors' code.",
        ),
    ] = False
    weighting: Annotated[
        str,
        of_scoring(
            help="paper (all later layers add up), normalised (their mean) or output (only the model's output)."
        ),
    ] = ScoreSettings.weighting
    kl_weight: Annotated[
        float | None, of_scoring(min=0, help="Weight of the output term. [default: a tenth of the trajectory term]")
    ] = None
    memory_budget: Annotated[
        str | None,
        of_scoring(help="Memory that scoring may take beyond the model, e.g. 2GiB. [default: most of what is free]"),
    ] = None

    def settings(self) -> ScoreSettings:
        """Return these as `ScoreSettings`, checked."""
        chosen = PAPER if self.paper else Features()
        return ScoreSettings(self.scorer, self.weighting, self.kl_weight, chosen)  # type: ignore[arg-type]

    def memory(self) -> int | None:
        """Return the budget of memory in bytes."""
        return size_of(self.memory_budget, "--memory-budget")


@dataclass(frozen=True)
class Engine:
    """Which engine, and in which type."""

    engine: Annotated[
        str,
        typer.Option(
            help="onnx (ONNX Runtime) and openvino on CPU, ort-cuda, ort-trt, torch, torch-compile, aoti, trt or "
            "trt-rtx."
        ),
    ] = Job.engine
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16 or int8; trt also tf32. [default: fp32; for trt fp16]")
    ] = None


@dataclass(frozen=True)
class Measuring:
    """The points at which artifacts are measured."""

    at: Annotated[
        list[str] | None, typer.Option(help="Point to measure at, e.g. batch=8,seq=128; repeatable. [default: batch=1]")
    ] = None
    threads: Threads = Job.threads

    def points(self) -> tuple[Point, ...]:
        """Return the points, checked."""
        return parse_points(self.at) or (Point(),)


@dataclass(frozen=True)
class Building:
    """How artifacts are built."""

    pool: Annotated[
        str | None,
        typer.Option(help="How the model pools, such as mean or cls: add output sentence_embedding."),
    ] = None
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Also export and measure the dense model.")] = (
        Job.dense
    )
    profile: ProfileSizes = None
    workspace: Annotated[str | None, of_tensorrt(help="Scratch memory of kernels, e.g. 4GiB.")] = None
    timing_cache: Annotated[Path | None, of_tensorrt(help="File of measured kernel times, reused by later builds.")] = (
        None
    )
    compatible: Annotated[
        list[str] | None, of_tensorrt(help="version (loads in later ones) or hardware (any GPU from Ampere on).")
    ] = None
    weights: Annotated[
        str | None, of_tensorrt(help="fixed, refittable, or stripped (put in from the ONNX at load). [default: fixed]")
    ] = None
    engine_option: OfEngine = None
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Exit 0 if only the engine build is left to do.")
    ] = False
